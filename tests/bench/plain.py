"""How long a task that starts nothing, and knows nothing of signals, keeps its slot once its end was asked for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.bench.series import Series
from tests.harness.real.running import Case, start_driver
from tests.harness.supervised import SupervisorFailedError

if TYPE_CHECKING:
    from tests.bench.setup import Setup
    from tests.harness.real.running import Driver

ROUNDS = 5
DEFAULT_GRACE, QUICK_GRACE = 60, 1
"""Seconds of [core] killed_task_cleanup_time, which stock heeds from 3.4 on; before, it is always 5 there."""
PATIENCE = 90.0
TASK = "sleeps"


def measure_plain(setup: Setup) -> list[Series]:
    """Measure from the 409 to the supervisor's return, with Airflow's own task runner, first one side, then the other."""
    rounds, grace = (1, QUICK_GRACE) if setup.quick else (ROUNDS, DEFAULT_GRACE)
    case = Case(TASK, "409", grace=grace, patience=PATIENCE)
    samples: dict[str, list[float]] = {side: [] for side in setup.sides}
    with ExitStack() as stack:
        drivers = {
            side: stack.enter_context(start_driver(environment)) for side, environment in setup.sides.items()
        }
        for number in range(rounds):
            for side, driver in drivers.items():
                samples[side].append(measure_case(driver, case))
            setup.on_progress((number + 1) / rounds)
    return [
        Series("A plain @task: 409 until its slot is free", "", side, measured)
        for side, measured in samples.items()
    ]


def measure_case(driver: Driver, case: Case) -> float:
    """Return the milliseconds."""
    result = driver.run(case)
    if result.seconds is None or result.left:
        raise SupervisorFailedError(f"{case.task} did not end; its supervisor's output:\n{result.output}")
    return result.seconds * 1000
