"""Somebody clears running tasks, which start anew while their first tries are still being ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import SLOTS_TIMEOUT, Outcome, Scenario, find_tracebacks, name_left
from tests.e2e.runs import ANNOUNCEMENTS, DAG, PROCESSES, start_run
from tests.e2e.servers import ServerFailedError
from tests.harness.processes import wait_for_exit
from tests.harness.supervised import SETTLE_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.deployment import Executor, Installation
    from tests.e2e.runs import Run

FIRST, SECOND = 1, 2


def clear(installation: Installation, executor: Executor) -> Outcome:
    """Clear every task of a run, and look for the first tries' processes when the second ones have started theirs."""
    with run_airflow(installation, executor) as airflow, start_run(airflow) as run:
        airflow.client.clear(DAG, run.id, list(PROCESSES))
        seconds = run.wait_for_slots(SLOTS_TIMEOUT)
        reasons = list(find_reason_not_started(run))
        wait_for_exit(run.list_left(FIRST), SETTLE_TIMEOUT)
        states = run.states()
        left = run.list_left(FIRST)
        problems = [
            *([] if seconds is not None else ["a slot of the first tries was never free"]),
            *reasons,
            *name_left(run.find_left(FIRST)),
            *(f"the second try of {task} is {state}" for task, state in states.items() if state != "running"),
            *find_losses(run),
            *find_tracebacks(airflow),
        ]
        return Outcome(sum(PROCESSES.values()) + len(PROCESSES), left, seconds, states, problems)


def find_reason_not_started(run: Run) -> Iterator[str]:
    """Say why the second tries have not started all that they start; after a crash the scheduler does not let them."""
    try:
        run.wait_for_processes(ANNOUNCEMENTS)
    except ServerFailedError as error:
        yield str(error).partition("\n")[0]


def find_losses(run: Run) -> Iterator[str]:
    """Say where less than all of a second try's processes are there."""
    there = run.find_left(SECOND)
    for task, number in PROCESSES.items():
        if len(there.get(task, [])) != number:
            yield f"of the second try of {task} {len(there.get(task, []))} of {number} processes are there"


SCENARIOS = (Scenario("cleared", "the running tasks are cleared", ("local", "celery"), clear),)
