"""Somebody else collects the exit status of every task: the worker has been started with SIGCHLD ignored."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import Outcome, Scenario, find_tracebacks
from tests.e2e.runs import POLL_INTERVAL

if TYPE_CHECKING:
    from tests.e2e.deployment import Airflow, Executor, Installation

DAG = "ends_itself"
STATES = {
    "succeeds": "success",
    "fails": "failed",
    "defers": "deferred",
    "is_rescheduled": "up_for_reschedule",
}
# An ignored signal stays ignored through exec, and then the kernel reaps: wait(2), NOTES.
IGNORING_SIGCHLD = ("env", "--ignore-signal=CHLD")

SUPERVISORS_TIMEOUT = 30.0
"""Seconds after which a supervisor counts as lingering; [core] task_success_overtime ends some after 20."""
SUPERVISORS_DUE = 15.0
"""Seconds from the trigger in which every supervisor has to be done; two busy cores take 10 to start the tasks."""
STATE_TIMEOUT = 10.0
"""Seconds that the scheduler has to take notice of what came of a task."""
SUPERVISOR_DONE = re.compile(r"(?:Task|Workload) finished .*\[supervisor\]")
"""What a supervisor logs as its last word; it begins with Workload from 1.3 on."""


def steal(installation: Installation, executor: Executor) -> Outcome:
    """Run tasks that end in every way, and wait for their supervisors."""
    with run_airflow(installation, executor, worker_prefix=IGNORING_SIGCHLD) as airflow:
        run = airflow.client.trigger(DAG, {})
        seconds = wait_for_supervisors(airflow)
        states = wait_for_states(airflow, run)
        problems = [
            *(
                f"{task} is {states.get(task)} and not {state}"
                for task, state in STATES.items()
                if states.get(task) != state
            ),
            *find_tracebacks(airflow),
        ]
        if seconds is None:
            problems.append(
                f"{count_lingering(airflow)} supervisors had not ended after {SUPERVISORS_TIMEOUT:.0f} s"
            )
        elif seconds > SUPERVISORS_DUE:
            problems.append(
                f"the last supervisor ended after {seconds:.1f} s, more than {SUPERVISORS_DUE:.0f}"
            )
        return Outcome(started=0, left=[], seconds=seconds, states=states, problems=problems)


def wait_for_supervisors(airflow: Airflow) -> float | None:
    """Return after how many seconds the last supervisor was done, None if SUPERVISORS_TIMEOUT passed before."""
    began = time.monotonic()
    while count_lingering(airflow):
        if time.monotonic() - began > SUPERVISORS_TIMEOUT:
            return None
        time.sleep(POLL_INTERVAL)
    return time.monotonic() - began


def count_lingering(airflow: Airflow) -> int:
    return len(STATES) - len(SUPERVISOR_DONE.findall(airflow.worker.log.read_text(errors="replace")))


def wait_for_states(airflow: Airflow, run: str) -> dict[str, str | None]:
    """Return the states of the tasks, when they are what they should be or STATE_TIMEOUT has passed."""
    deadline = time.monotonic() + STATE_TIMEOUT
    while True:
        instances = airflow.client.task_instances(DAG, run)
        states = {task: instance["state"] for task, instance in sorted(instances.items())}
        if states == STATES or time.monotonic() > deadline:
            return states
        time.sleep(POLL_INTERVAL)


SCENARIOS = (Scenario("status-stolen", "other code collects the exit statuses", ("local", "celery"), steal),)
