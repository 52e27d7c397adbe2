"""What the demo says."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from tests.demo.runs import RETURN_TIMEOUT
from tests.harness.supervised import HEARTBEAT_INTERVAL, KILL_GRACE, SOCKET_CLEANUP_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from rich.console import Console

    from patches.releases import Release
    from tests.demo.runs import Run
    from tests.demo.told import Told, ToldRun
    from tests.harness.supervised import Ending, Outcome

TITLES: dict[Ending, str] = {
    "409": "the task is marked failed",
    "sigterm": "the worker is shut down",
}
NOT_ENDED = (
    "From Airflow 3.4 on a worker that is shut down lets its tasks finish, patched unless [workers] stop_signal_policy is "
    "stop, so there is nothing to show."
)


def print_report(  # noqa: PLR0917  # what is reported, in the order of the report
    console: Console,
    release: Release,
    wheel: Path,
    picture: Path,
    outcomes: Mapping[Run, Outcome],
    told: Mapping[ToldRun, Told],
) -> None:
    """Print a table for each ending, what its words mean, and how it went."""
    for ending, title in TITLES.items():
        runs = {run: outcome for run, outcome in outcomes.items() if run.ending == ending}
        if runs:
            console.print()
            console.print(make_table(f"Airflow {release.airflow}: {title}", runs))
        else:
            console.print(NOT_ENDED)
    console.print()
    console.print(make_told_table(f"Airflow {release.airflow}: tasks that start nothing", told))
    for sentence in explain(outcomes):
        console.print(sentence, highlight=False)
    console.print()
    console.print(summarize("Stock", outcomes, patched=False), style="bold", highlight=False)
    console.print(summarize("Patched", outcomes, patched=True), style="bold", highlight=False)
    console.print(f"The patched wheel: {wheel}", soft_wrap=True, highlight=False)
    console.print(
        f"Every process of one task, from birth to death: {picture}", soft_wrap=True, highlight=False
    )


def make_table(title: str, outcomes: Mapping[Run, Outcome]) -> Table:
    """Return a row for each shape, with the stock and the patched outcome side by side."""
    table = open_table(
        title, "The task had started", "stock:\nleft", "\nsupervisor", "patched:\nleft", "\nsupervisor"
    )
    rows: dict[str, list[str]] = {}
    for run, outcome in outcomes.items():
        cells = rows.setdefault(run.shape.sentence, [])
        cells += [describe_left(run, outcome), describe_supervisor(outcome)]
    for sentence, cells in rows.items():
        table.add_row(sentence, *cells)
    return table


def make_told_table(title: str, told: Mapping[ToldRun, Told]) -> Table:
    """Return a row for each task and end, with both sides."""
    columns = [
        heading for side in ("stock:", "patched:") for heading in (f"{side}\nleft", "\nsupervisor", "\ntold")
    ]
    table = open_table(title, "The task", *columns)
    rows: dict[str, list[str]] = {}
    # Stock first, as in the columns.
    for run, outcome in told.items():
        colour = "green" if outcome.right else "red"
        cells = (f"{outcome.left} of 1", outcome.supervisor, outcome.state or "")
        rows.setdefault(run.sentence, []).extend(f"[{colour}]{cell}[/]" for cell in cells)
    for sentence, row in rows.items():
        table.add_row(sentence, *row)
    return table


def open_table(title: str, first: str, *headings: str) -> Table:
    """Return a table without rows, whose first column may be wrapped."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def describe_left(run: Run, outcome: Outcome) -> str:
    # The runner, the task's own process, counts too: it may be left as well.
    total = run.shape.processes + 1
    return f"[{'red' if outcome.left else 'green'}]{len(outcome.left)} of {total}[/]"


def describe_supervisor(outcome: Outcome) -> str:
    if outcome.hung:
        return f"[red]still ran[/] after {RETURN_TIMEOUT:.0f} s"
    if outcome.killed_by is not None:
        return f"[red]died of {signal.Signals(outcome.killed_by).name}[/]"
    if outcome.exception is not None:
        return f"[red]crashed[/], {outcome.seconds:.1f} s"
    return f"returned, {outcome.seconds:.1f} s"


def explain(outcomes: Mapping[Run, Outcome]) -> Iterator[str]:
    """Yield what a newcomer needs to read the table."""
    crashes = sorted({outcome.exception for outcome in outcomes.values() if outcome.exception is not None})
    yield "Left is what still runs of the task when its supervisor is gone; the task's own process counts, too."
    yield (
        "The supervisor is the worker's process that watches one task. It learns that the task was set to failed when "
        "the API answers its heartbeat with 409; when the worker is shut down it gets SIGTERM. Seconds count from then."
    )
    yield (
        "A task that Airflow's own runner runs does not end on SIGTERM: stock calls on_kill and goes on, patched "
        "interrupts it then. Told is what the API is told of it; one that is marked failed has its state."
    )
    for crash in crashes:
        yield f"It crashed with [red]{crash}[/]."
    yield (
        f"So that you see it sooner, the supervisor here sends a heartbeat every {HEARTBEAT_INTERVAL} s, kills a task "
        f"that does not end within {KILL_GRACE} s and gives up on open sockets after {SOCKET_CLEANUP_TIMEOUT} s. "
        "Airflow's defaults are 5 s, 60 s (before Airflow 3.4 always 5 s) and 60 s."
    )


def summarize(name: str, outcomes: Mapping[Run, Outcome], *, patched: bool) -> str:
    side = [outcome for run, outcome in outcomes.items() if run.patched == patched]
    left = sum(len(outcome.left) for outcome in side)
    failed = sum(not outcome.returned for outcome in side)
    return f"{name}: {left} processes left, {failed} of {len(side)} supervisors crashed, hung or died of a signal."
