"""The command line: python -m tests.e2e [--scenario NAME] [VERSION ...] [EXECUTOR ...]."""

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
from tests.e2e.client import ApiError
from tests.e2e.deployment import EXECUTORS, Installation, check_tools, install, prepare_database
from tests.e2e.outcomes import Outcome
from tests.e2e.report import Result, find_failures, list_problems, make_table, write_json
from tests.e2e.scenarios import SCENARIOS
from tests.e2e.servers import ServerFailedError
from tests.harness.consoles import explains_failures, open_console, open_error_console
from tests.harness.wheels import DIST, build_patched_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from patches.releases import Release
    from tests.e2e.deployment import Executor
    from tests.e2e.outcomes import Scenario

DEFAULT_VERSIONS = ("3.1.8", "3.3.2")
PROBLEM = 1
# A file has no width of its own; at this one no row of the table is wrapped.
COLUMNS_IN_FILE = 130


@explains_failures(ServerFailedError, ApiError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios; return 0 if all is well, 1 if it is not, 2 if they could not be run."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="nox -s e2e --", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="VERSION|EXECUTOR",
        help=f"versions of Airflow or its SDK ({', '.join(DEFAULT_VERSIONS)} unless given), and executors out of "
        f"{', '.join(EXECUTORS)} (all unless given)",
    )
    parser.add_argument(
        "--scenario", action="append", choices=names, dest="scenarios", help="only this; may be repeated"
    )
    options = parser.parse_args(arguments)
    executors = [word for word in options.what if word in EXECUTORS] or list(EXECUTORS)
    versions = [word for word in options.what if word not in EXECUTORS] or DEFAULT_VERSIONS
    console = open_console(COLUMNS_IN_FILE)
    began = time.monotonic()
    failures: list[str] = []
    releases = [find_release(version) for version in versions]
    check_tools(executors)
    scenarios = list(choose(options.scenarios, open_error_console()))
    for release in releases:
        failures += run_release(release, executors, scenarios, console)
    for failure in failures:
        console.print(failure, style="bold red", highlight=False)
    console.print(f"Took {time.monotonic() - began:.0f} s.")
    return PROBLEM if failures else 0


def choose(names: Sequence[str] | None, errors: Console) -> Iterator[Scenario]:
    """Yield the scenarios named; without names all that this system has what they need for, and say which it has not."""
    for scenario in SCENARIOS:
        if names and scenario.name not in names:
            continue
        try:
            scenario.check()
        except PatchError as error:
            if names:
                raise
            errors.print(f"Not run: {scenario.name}. {error}")
            continue
        yield scenario


def run_release(
    release: Release, executors: Sequence[Executor], scenarios: Sequence[Scenario], console: Console
) -> list[str]:
    """Run the scenarios on a release, stock and patched, report, and return what has failed."""
    folder = DIST / f"e2e-{release.airflow}"
    prepare_output(folder)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="e2e-setup-") as setup:
        console.print(f"Installing Airflow {release.airflow}, stock and patched")
        wheels = {False: None, True: build_patched_wheel(release, DIST)}
        environments = {patched: install(release, wheel) for patched, wheel in wheels.items()}
        database = prepare_database(environments[False], Path(setup))
        for scenario, executor in plan(release, executors, scenarios):
            for patched, environment in environments.items():
                side = "patched" if patched else "stock"
                console.print(f"{side}, {executor}: {scenario.title}", highlight=False)
                logs = folder / f"{scenario.name}-{executor}-{side}"
                installation = Installation(environment, patched, database, logs)
                outcome = run_scenario(scenario, installation, executor, console)
                results.append(Result(scenario, executor, patched, outcome))
                write_json(folder / "outcomes.json", results)
    console.print(make_table(release, results))
    for problem in list_problems(results):
        console.print(problem, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Everything that was seen: {folder}", soft_wrap=True, highlight=False)
    return [f"Airflow {release.airflow}, {failure}." for failure in find_failures(results)]


def run_scenario(
    scenario: Scenario, installation: Installation, executor: Executor, console: Console
) -> Outcome:
    """Return what came of a scenario, be it that it broke off, which shall not cost the others."""
    try:
        return scenario.run(installation, executor)
    except (ServerFailedError, ApiError, TimeoutError) as error:
        console.print(error, soft_wrap=True, markup=False, highlight=False)
        reason = str(error).partition("\n")[0]
        return Outcome(started=0, left=[], seconds=None, states={}, problems=[f"broken off: {reason}"])


def plan(
    release: Release, executors: Sequence[Executor], scenarios: Sequence[Scenario]
) -> Iterator[tuple[Scenario, Executor]]:
    """Yield the scenarios that apply to the release, each with the executors that it is for."""
    for scenario in scenarios:
        if scenario.releases.contains(release.version):
            for executor in executors:
                if executor in scenario.executors:
                    yield scenario, executor


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
