"""Run many cases of Airflow's own task runner in the environment of a release."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

from patches.releases import find_release
from tests.harness.environments import create_environment
from tests.harness.lines import skips_without_interpreter
from tests.harness.wheels import build_patched_wheel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.harness.environments import Environment
    from tests.harness.real.running import Case, Driver, Result

    Check = Callable[[Case, Result], str | None]
    """Says what is wrong, None if nothing is."""

CASES_AT_A_TIME = 8
STOP = {"AIRFLOW__WORKERS__STOP_SIGNAL_POLICY": "stop"}
USE_EXEC = {"AIRFLOW__CORE__EXECUTE_TASKS_NEW_PYTHON_INTERPRETER": "True"}
EVERY_LINE = SpecifierSet(">=1.0.0", prereleases=True)
# Earlier ones know nothing of coroutines.
ASYNC_TASKS = SpecifierSet(">=1.2.0", prereleases=True)
# Earlier ones know no USE_EXEC.
EXEC_LINES = SpecifierSet(">=1.4.0b1", prereleases=True)
# The oldest release whose runner has no handler for SIGTERM at all, and another protocol.
NO_HANDLER = "1.0.2"


def install(version: str, dist: Path | None = None) -> Environment:
    """Return a complete Airflow, with the patched wheel where there is a folder to build it in."""
    release = find_release(version)
    wheel = build_patched_wheel(release, dist) if dist else None
    with skips_without_interpreter():
        return create_environment(release, wheel=wheel, complete=True)


def run_all(
    driver: Driver, cases: Mapping[str, Case], *, at_a_time: int = CASES_AT_A_TIME
) -> dict[str, Result]:
    order = sorted(cases, key=lambda name: cases[name].grace)  # those that wait for its end begin first
    with ThreadPoolExecutor(at_a_time) as pool:
        return dict(zip(order, pool.map(driver.run, [cases[name] for name in order]), strict=True))


def find_faults_by(
    known: Mapping[str, Check], cases: Mapping[str, Case], results: Mapping[str, Result], *checks: str
) -> dict[str, list[str]]:
    """Return what the checks, or all that are known, find wrong, by the names of the cases."""
    faults = {
        name: [fault for check in checks or known if (fault := known[check](case, results[name]))]
        for name, case in cases.items()
    }
    return {name: found for name, found in faults.items() if found}
