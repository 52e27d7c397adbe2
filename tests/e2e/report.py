"""What the end-to-end tests say: a table, the problems, and a JSON file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from patches.releases import Release
    from tests.e2e.deployment import Executor
    from tests.e2e.outcomes import Outcome, Scenario

PLAIN = "sleeps"


class Result(NamedTuple):
    """A scenario that was run, and what came of it."""

    scenario: Scenario
    executor: Executor
    patched: bool
    outcome: Outcome

    @property
    def side(self) -> str:
        return "patched" if self.patched else "stock"


def make_table(release: Release, results: Sequence[Result]) -> Table:
    """Return a row for each scenario and executor, with stock and patched side by side."""
    table = Table(
        title=f"Airflow {release.airflow}: what is left of tasks, how long these and a plain @task take, and what is wrong",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("Scenario")
    table.add_column("executor")
    for side in ("stock:", "patched:"):
        for heading in (f"{side}\nleft", "\nslots", "\n@task", "\nproblems"):
            table.add_column(heading, no_wrap=True)
    rows: dict[tuple[str, str], dict[bool, list[str]]] = {}
    for result in results:
        row = rows.setdefault((result.scenario.title, result.executor), {})
        row[result.patched] = describe(result.outcome)
    for (title, executor), sides in rows.items():
        table.add_row(title, executor, *sides.get(False, [""] * 4), *sides.get(True, [""] * 4))
    return table


def describe(outcome: Outcome) -> list[str]:
    slots = "" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
    left = (
        paint(f"{len(outcome.left)} of {outcome.started}", good=not outcome.left) if outcome.started else ""
    )
    return [
        left,
        slots,
        f"{outcome.ends[PLAIN]:.1f} s" if PLAIN in outcome.ends else "",
        paint(str(len(outcome.problems)), good=not outcome.problems),
    ]


def paint(text: str, *, good: bool) -> str:
    return f"[{'green' if good else 'red'}]{text}[/]"


def list_problems(results: Iterable[Result]) -> Iterator[str]:
    """Yield a line for each scenario with problems."""
    for result in results:
        if result.outcome.problems:
            where = f"{result.side}, {result.executor}, {result.scenario.name}"
            yield f"{where}: {'; '.join(result.outcome.problems)}."


def find_failures(results: Iterable[Result]) -> Iterator[str]:
    """Yield why the run as a whole has failed: a problem of the patched side, or a fault that stock does not show."""
    for result in results:
        where = f"{result.scenario.name} with {result.executor}"
        if result.patched and result.outcome.problems:
            yield f"{where}: the patched side has problems"
        if not result.patched and result.scenario.shows_fault and not result.outcome.left:
            yield f"{where}: stock leaves nothing, so this shows nothing"


def write_json(path: Path, results: Iterable[Result]) -> None:
    """Write every outcome."""
    rows = [
        {
            "scenario": result.scenario.name,
            "executor": result.executor,
            "side": result.side,
            **result.outcome.to_json(),
        }
        for result in results
    ]
    path.write_text(f"{json.dumps(rows, indent=1)}\n")
