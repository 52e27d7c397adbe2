"""The command line: python -m tests.demo [VERSION]."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from patches.commands import interrupt_on_sigterm
from patches.releases import find_release
from tests.bench.timeline import draw_task
from tests.demo.report import print_report
from tests.demo.runs import plan_runs, run_all
from tests.demo.told import plan_told, run_told
from tests.harness.consoles import explains_failures, open_console
from tests.harness.supervised import SupervisorFailedError
from tests.harness.wheels import DIST, build_patched_wheel, install_both

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tests.demo.runs import Run
    from tests.demo.told import Told, ToldRun
    from tests.harness.supervised import Outcome

DEFAULT_VERSION = "3.1.8"
PROBLEM = 1
# A file has no width of its own; at this one no row of a table is wrapped.
COLUMNS_IN_FILE = 100


@explains_failures(SupervisorFailedError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if all is well with the patched side, 1 if it is not, 2 if there was no demo."""
    parser = argparse.ArgumentParser(prog="nox -s demo --", description=__doc__)
    parser.add_argument(
        "version", nargs="?", default=DEFAULT_VERSION, metavar="VERSION", help="of Airflow or its SDK"
    )
    version = parser.parse_args(arguments).version
    console = open_console(COLUMNS_IN_FILE)
    began = time.monotonic()
    outcomes, told = run_demo(version, console)
    console.print(f"Took {time.monotonic() - began:.0f} s.")
    unclean = any(run.patched and not outcome.clean for run, outcome in outcomes.items())
    wrong = any(run.patched and not outcome.right for run, outcome in told.items())
    return PROBLEM if unclean or wrong else 0


def run_demo(version: str, console: Console) -> tuple[dict[Run, Outcome], dict[ToldRun, Told]]:
    """Build, install, run and report."""
    release = find_release(version)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        building = progress.add_task(f"Building the patched SDK {release.version}", total=1)
        installing = progress.add_task(f"Installing Airflow {release.airflow}, stock and patched", total=2)
        running = progress.add_task("Ending tasks and looking for what is left", total=None)
        telling = progress.add_task("Telling plain tasks to stop", total=None)
        drawing = progress.add_task("Drawing the processes of one task", total=2)
        wheel = build_patched_wheel(release, DIST)
        progress.advance(building)
        sides = install_both(release, wheel, lambda: progress.advance(installing))
        runs = plan_runs(sides)
        progress.update(running, total=len(runs))
        outcomes = run_all(runs, lambda: progress.advance(running))
        told_runs = plan_told(sides)
        progress.update(telling, total=sum(map(len, told_runs.values())))
        told = run_told(sides, told_runs, lambda: progress.advance(telling))
        picture = DIST / f"timeline-{release.airflow}.svg"
        named = {"stock": sides[False], "patched": sides[True]}
        draw_task(named, {}, picture, lambda: progress.advance(drawing))
    print_report(console, release, wheel, picture, outcomes, told)
    return outcomes, told


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
