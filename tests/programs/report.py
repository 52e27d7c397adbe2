"""What the session says: a table, what the machine has not, and a JSON file."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from patches.releases import Release
    from tests.programs.program import Program, Way
    from tests.programs.running import Outcome, Run


def make_table(release: Release, outcomes: Mapping[Run, Outcome]) -> Table:
    """Return a row for each program and way, with stock and patched side by side."""
    table = Table(
        title=f"Airflow {release.airflow}: processes that are left of a task, and seconds until its supervisor was done",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("The task had started", "and ends so"):
        table.add_column(f"\n{heading}")
    for side in ("stock:", "patched:"):
        table.add_column(f"{side}\nleft")
        table.add_column("\nseconds", justify="right", no_wrap=True)
    rows: dict[tuple[Program, Way], dict[bool, list[str]]] = {}
    for run, outcome in outcomes.items():
        rows.setdefault((run.program, run.way), {})[run.patched] = list_cells(run, outcome)
    before = None
    for (program, way), sides in rows.items():
        name = "" if program == before else program.name
        table.add_row(name, way.title, *sides.get(False, ["", ""]), *sides.get(True, ["", ""]))
        before = program
    return table


def list_cells(run: Run, outcome: Outcome) -> list[str]:
    """Return what is left, and the seconds."""
    if outcome.problem:
        return ["[red]not started[/]", ""]
    said = [count_names(outcome.left), outcome.supervisor]
    good = not outcome.left and not outcome.supervisor
    colour = "green" if good else "yellow" if is_documented(run, outcome) else "red"
    text = "; ".join(each for each in said if each)
    return [f"[{colour}]{text}[/]", "" if outcome.seconds is None else f"{outcome.seconds:.1f}"]


def count_names(names: Iterable[str]) -> str:
    """Return how many there are, and of what name."""
    counts = Counter(names)
    if not counts:
        return "0"
    listed = ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())
    return f"{counts.total()} ({listed})".replace("[", r"\[")


def is_documented(run: Run, outcome: Outcome) -> bool:
    """Tell whether the patched side has left nothing but what the documents say that it leaves."""
    may_stay = run.program.stays if run.way.name in (run.program.stays_after or [run.way.name]) else {}
    return run.patched and not outcome.supervisor and set(outcome.left) <= set(may_stay)


def find_failures(outcomes: Mapping[Run, Outcome]) -> Iterator[str]:
    """Yield why the session has failed."""
    for run, outcome in outcomes.items():
        where = f"{run.program.name}, {run.way.title}, {run.side}"
        if outcome.problem:
            yield f"{where}: nothing can be said. {outcome.problem}"
        elif run.patched and outcome.supervisor:
            yield f"{where}: the supervisor {outcome.supervisor}"
        elif run.patched and not is_documented(run, outcome):
            yield f"{where}: left {count_names(outcome.left)}"


def list_exceptions(outcomes: Mapping[Run, Outcome]) -> Iterator[str]:
    """Yield a line for each program that has left what the documents say that it leaves."""
    left: dict[tuple[str, str], set[str]] = {}
    for run, outcome in outcomes.items():
        for name in outcome.left if is_documented(run, outcome) else ():
            left.setdefault((run.program.name, run.program.stays[name]), set()).add(name)
    for (program, reason), names in left.items():
        yield f"Of {program} the patched side leaves {', '.join(sorted(names))}: {reason}."


def sum_up(outcomes: Mapping[Run, Outcome]) -> Iterator[str]:
    """Yield a sentence on each side."""
    for patched in (False, True):
        mine = {run: outcome for run, outcome in outcomes.items() if run.patched == patched}
        side = "Patched" if patched else "Stock"
        left = sum(len(outcome.left) for outcome in mine.values())
        unclean = sum(bool(outcome.left) for outcome in mine.values())
        wrong = sum(bool(outcome.supervisor) for outcome in mine.values())
        yield (
            f"{side}: {left} processes left by {unclean} of {len(mine)} tasks, "
            f"{wrong} supervisors crashed, hung or died."
        )


def write_json(path: Path, outcomes: Mapping[Run, Outcome]) -> None:
    """Write every outcome."""
    rows = [
        {
            "program": run.program.name,
            "way": run.way.title,
            "side": run.side,
            "left": outcome.left,
            "seconds": outcome.seconds,
            "supervisor": outcome.supervisor,
            "problem": outcome.problem,
        }
        for run, outcome in outcomes.items()
    ]
    path.write_text(f"{json.dumps(rows, indent=1)}\n")
