"""The command line: python -m tests.programs [--program NAME] [--way NAME] [VERSION ...]."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from patches.commands import interrupt_on_sigterm
from patches.errors import PatchError
from patches.releases import find_release
from patches.wheels import prepare_output
from tests.harness.consoles import explains_failures, open_console
from tests.harness.environments import create_environment
from tests.harness.namespaces import find_refusal
from tests.harness.wheels import DIST, build_patched_wheel
from tests.programs.program import WAYS
from tests.programs.report import find_failures, list_exceptions, make_table, sum_up, write_json
from tests.programs.running import plan, run_all
from tests.programs.table import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from patches.releases import Release
    from tests.programs.program import Program
    from tests.programs.running import Outcome, Run

DEFAULT_VERSIONS = ("3.1.8",)
PROBLEM = 1
ENTERED_BY_ALL = 0o711
# A file has no width of its own; at this one few rows of the table are wrapped.
COLUMNS_IN_FILE = 150


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s programs --", description=__doc__)
    parser.add_argument(
        "versions", nargs="*", default=DEFAULT_VERSIONS, metavar="VERSION", help="of Airflow or its SDK"
    )
    parser.add_argument(
        "--program",
        action="append",
        metavar="TEXT",
        help="only those with this in their name; may be repeated",
    )
    parser.add_argument(
        "--way",
        action="append",
        choices=[way.name for way in WAYS],
        help="end tasks only so; may be repeated",
    )
    parser.add_argument("--large", action="store_true", help="also those whose packages are a large download")
    parser.add_argument("--list", action="store_true", help="only say what would be run, and what is missing")
    return parser.parse_args(arguments)


@explains_failures()
def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if the patched side left nothing that is not documented, 1 if it did, 2 if nothing could be run."""
    options = parse_arguments(arguments)
    console = open_console(COLUMNS_IN_FILE)
    began = time.monotonic()
    failures: list[str] = []
    releases = [find_release(version) for version in options.versions]
    refusal = find_refusal(network=True)
    programs = choose(options.program, console, large=options.large, private=not refusal)
    if options.list:
        for program in programs:
            console.print(program.name)
        return 0
    if refusal:
        console.print(
            f"What counts as left are descendants, for there is no PID namespace: {refusal}", markup=False
        )
    ways = [way for way in WAYS if not options.way or way.name in options.way]
    for release in releases:
        failures += run_release(release, plan(programs, ways), console, own_namespace=not refusal)
    for failure in failures:
        console.print(failure, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Took {time.monotonic() - began:.0f} s.")
    return PROBLEM if failures else 0


def choose(texts: Sequence[str] | None, console: Console, *, large: bool, private: bool) -> list[Program]:
    """Return the programs that are asked for, or all; name those that the machine has not."""
    for text in texts or ():
        if not any(text in program.name for program in PROGRAMS):
            raise PatchError(f"No program has {text!r} in its name: `nox -s programs -- --list` lists them.")
    chosen = []
    for program in PROGRAMS:
        if texts and not any(text in program.name for text in texts):
            continue
        if missing := list(program.list_missing()):
            console.print(f"Not run: {program.name}. It needs {', '.join(missing)}.", highlight=False)
        elif program.large and not large:
            console.print(
                f"Not run: {program.name}. It is a large download: --large has it made.", highlight=False
            )
        elif program.public and not private:
            console.print(f"Not run: {program.name}. It would listen on every network.", highlight=False)
        else:
            chosen.append(program)
    if not chosen:
        raise PatchError("This machine has none of the programs: install one of those that are named above.")
    return chosen


def run_release(release: Release, runs: Sequence[Run], console: Console, *, own_namespace: bool) -> list[str]:
    """Run on a release, stock and patched, report, and return what has failed."""
    folder = DIST / f"programs-{release.airflow}"
    prepare_output(folder)
    console.print(f"Installing Airflow {release.airflow}, stock and patched")
    packages = sorted({package for run in runs for package in run.program.packages})
    sides = {
        patched: create_environment(
            release,
            packages=packages,
            wheel=build_patched_wheel(release, DIST) if patched else None,
            complete=True,
        )
        for patched in (False, True)
    }

    def tell(run: Run, outcome: Outcome) -> None:
        said = outcome.problem or f"{len(outcome.left)} left {outcome.supervisor}".strip()
        console.print(
            f"{run.program.name}, {run.way.title}, {run.side}: {said}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    with tempfile.TemporaryDirectory(prefix="programs-") as name:
        data = Path(name)
        data.chmod(ENTERED_BY_ALL)  # some programs change to a user of their own
        outcomes = run_all(sides, runs, data, own_namespace=own_namespace, on_finished=tell)
    write_json(folder / "outcomes.json", outcomes)
    console.print(make_table(release, outcomes))
    for line in (*list_exceptions(outcomes), *sum_up(outcomes)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Everything that was seen: {folder}", soft_wrap=True, highlight=False)
    return [f"Airflow {release.airflow}, {failure}" for failure in find_failures(outcomes)]


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
