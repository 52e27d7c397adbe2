"""Tasks that start nothing, run by Airflow's own task runner and told to stop."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.harness.real.running import Case, start_driver
from tests.harness.supervised import ENDS_TASK_ON_SIGTERM, KILL_GRACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.environments import Environment
    from tests.harness.real.running import Driver, Result

PATIENCE = 8.0
"""Seconds for which a supervisor is watched: more than the grace period."""
# Of tests/harness/real/dags/told.py.
SENTENCES = {
    ("sleeps", "409"): "a plain @task that sleeps: it is marked failed",
    ("sleeps", "SIGTERM"): "a plain @task that sleeps: the worker is shut down",
    ("flag", "SIGTERM"): "an operator whose on_kill removes its work: the worker is shut down",
}


@dataclass(frozen=True)
class ToldRun:
    """One task that is told to stop."""

    task: str
    end: str
    patched: bool

    @property
    def sentence(self) -> str:
        return SENTENCES[self.task, self.end]

    def run(self, driver: Driver) -> Told:
        case = Case(self.task, self.end, grace=KILL_GRACE, patience=PATIENCE)
        return describe(case, driver.run(case))


@dataclass(frozen=True)
class Told:
    """What came of it."""

    left: int
    """Processes, of which the task has one."""
    supervisor: str
    """What became of the supervisor."""
    state: str | None
    """What the API was told."""
    right: bool


def plan_told(sides: dict[bool, Environment]) -> dict[bool, list[ToldRun]]:
    """Return the runs of each side."""
    ends_on_sigterm = ENDS_TASK_ON_SIGTERM.contains(sides[False].release.version)
    cases = [(task, end) for task, end in SENTENCES if end != "SIGTERM" or ends_on_sigterm]
    return {patched: [ToldRun(*case, patched) for case in cases] for patched in sides}


def run_told(
    sides: dict[bool, Environment],
    runs: dict[bool, list[ToldRun]],
    on_finished: Callable[[], object],
) -> dict[ToldRun, Told]:
    """Run one after the other: whoever interrupts this interrupts the one that runs."""
    told = {}
    for patched, environment in sides.items():
        with start_driver(environment) as driver:
            for run in runs[patched]:
                told[run] = run.run(driver)
                on_finished()
    return told


def describe(case: Case, result: Result) -> Told:
    """Say what came of a run; right is one that ended in failure, with nothing left and within the grace period."""
    state = result.states[-1] if result.states else None
    in_time = result.seconds is not None and result.seconds < KILL_GRACE
    right = in_time and not result.left and state == (None if case.end == "409" else "failed")
    return Told(len(result.left), describe_supervisor(result), state, right)


def describe_supervisor(result: Result) -> str:
    if result.hung:
        return f"still ran after {PATIENCE:.0f} s"
    if result.killed_by is not None:
        return f"died of {signal.Signals(result.killed_by).name}"
    if result.exception is not None or result.seconds is None:
        return "crashed"
    return f"returned, {result.seconds:.1f} s"
