"""Run task-sdk/tests in the environment of a release."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from patches.environments import TEST_PACKAGES
from patches.releases import last_of_lines
from patches.rules import TESTS, load_changes, select_names
from tests.harness.environments import clean_env, create_environment
from tests.harness.namespaces import isolate
from tests.harness.processes import kill_inside
from tests.upstream.results import read_report
from tests.upstream.suites import FINISHED, quote_end

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patches.releases import Release
    from tests.harness.environments import Environment
    from tests.upstream.results import Result

TIMEOUT = 1800
# Show on a stock wheel what goes wrong there; the other modules test what only the patched one has.
SCENARIOS = (
    "teardown/supervised/test_exit.py",
    "teardown/supervised/test_stopping.py",
    "teardown/supervised/test_truth.py",
    "teardown/supervised/test_*leftovers.py",
    "teardown/supervised/test_orphans.py",
    "teardown/supervised/test_runtimes.py",
    "teardown/supervised/test_session.py",
    "teardown/supervised/test_stolen_status.py",
)
# The oldest and the newest interpreters, where the preferred one is in between.
FURTHER_PYTHONS = [
    ("1.0.6", "3.9"),
    ("1.1.8", "3.10"),
    ("1.2.2", "3.12"),
    ("1.3.2", "3.13"),
    ("1.4.0b2", "3.13"),
]
Run = tuple[str, "str | None"]
"""A version of the SDK and an interpreter, None for the preferred one."""
RUNS: list[Run] = [*((release.version, None) for release in last_of_lines()), *FURTHER_PYTHONS]


def name_run(run: Run) -> str:
    return "-".join(filter(None, run))


def install_release(release: Release, *, wheel: Path | None = None, python: str | None = None) -> Environment:
    """Return an environment for our tests, with the stock SDK or with a patched wheel."""
    return create_environment(release, packages=TEST_PACKAGES, wheel=wheel, python=python)


def run_our_tests(
    environment: Environment,
    *patterns: str,
    names: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> dict[str, Result]:
    """Run the modules of task-sdk/tests that are for the release, and return the results by "TestA::test_b".

    `names`, which are such, are all that is run, with those whose names begin alike; every test if there are none.
    `variables` are set for the run, which inherits none.

    Raises RuntimeError with the end of pytest's output when the run itself failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        options = [*make_options(folder), *select(environment.release, patterns or ("test_*.py",))]
        if names:
            options += ["-k", " or ".join(name.rpartition("::")[2] for name in names)]
        try:
            run_pytest(environment, folder, options, variables or {})
        finally:
            # A pytest that hangs, and is killed, has its supervisors and their tasks run on.
            kill_inside(folder)
        results = read_report(folder / "report.xml")
    return {name.partition("::")[2]: result for name, result in results.items()}


def run_pytest(
    environment: Environment, folder: Path, options: Sequence[str], variables: Mapping[str, str]
) -> None:
    """Run pytest in a folder; raise RuntimeError with the end of its output if it does not get to its end."""
    log = folder / "log"
    try:
        with log.open("wb") as output:
            process = subprocess.run(
                [*isolate(), environment.python, "-m", "pytest", *options],
                cwd=folder,
                env={**clean_env(folder, python=environment.python), **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pytest did not end within {TIMEOUT} s; its output:\n{quote_end(log)}") from None
    if process.returncode not in FINISHED:
        raise RuntimeError(f"pytest exited {process.returncode}; its output:\n{quote_end(log)}")


def make_options(folder: Path) -> list[str]:
    """Return the options of a run whose report goes into a folder."""
    return [
        "--config-file=/dev/null",
        f"--rootdir={TESTS}",
        f"--junit-xml={folder / 'report.xml'}",
        *("-p", "no:cacheprovider", "-o", "junit_family=xunit1"),
    ]


def select(release: Release, patterns: Sequence[str]) -> list[str]:
    """Return the paths of the release's modules that match one of the patterns, like test_child_*.py."""
    files = {TESTS / file for change in load_changes() for file in select_names(change.tests, release)}
    # Sorted: pytest 9 loses a folder's conftest when it comes back to the folder.
    return [str(file) for file in sorted(files) if any(map(file.match, patterns))]
