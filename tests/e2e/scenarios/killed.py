"""Supervisors are killed, or the Celery worker above them: nobody is left who could end their tasks."""

from __future__ import annotations

import signal
import time
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import Outcome, Scenario, judge_on_kill, name_left
from tests.e2e.runs import POLL_INTERVAL, PROCESSES, start_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.e2e.deployment import Airflow, Executor, Installation
    from tests.e2e.runs import Run

VARIABLES = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
}
"""Have the server give up a task soon, after which it would start a retry."""
THREADS = {"AIRFLOW__CELERY__POOL": "threads"}
"""Have a Celery worker supervise its tasks in threads of its main process."""
GRACE_DUE = 8.0
"""Seconds in which everything has to be gone: the grace period of 5, a second for the kill, and a busy machine's two."""
GIVE_UP_TIMEOUT = 90.0
"""Seconds that the server has to give up all tasks."""


def kill_supervisors(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGKILL to every supervisor."""
    return lose_supervisors(
        installation, executor, lambda _airflow, run: run.signal_supervisors(signal.SIGKILL)
    )


def kill_worker(
    installation: Installation, executor: Executor, variables: Mapping[str, str] = MappingProxyType({})
) -> Outcome:
    """Send SIGKILL to the Celery worker, whose pool dies with it, or which supervises all its tasks itself."""
    return lose_supervisors(
        installation, executor, lambda airflow, _run: airflow.worker.process.kill(), variables=variables
    )


def lose_supervisors(
    installation: Installation,
    executor: Executor,
    kill: Callable[[Airflow, Run], None],
    *,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Kill what watches the tasks, and see what is there when the server would start them anew."""
    settings = {**VARIABLES, **variables}
    with run_airflow(installation, executor, variables=settings) as airflow, start_run(airflow) as run:
        kill(airflow, run)
        began = time.monotonic()
        seconds = wait_until_nothing_left(run, began + GRACE_DUE)
        left = run.find_left()
        problems = [*name_left(left), *judge_on_kill(run), *find_copies(run)]
        return Outcome(
            started=sum(PROCESSES.values()) + len(PROCESSES),
            left=[process for processes in left.values() for process in processes],
            seconds=None if seconds is None else seconds - began,
            states=run.states(),
            problems=problems,
        )


def wait_until_nothing_left(run: Run, until: float) -> float | None:
    """Return when nothing was left, None if something is when the time is up."""
    while run.list_left():
        if time.monotonic() > until:
            return None
        time.sleep(POLL_INTERVAL)
    return time.monotonic()


def find_copies(run: Run) -> Iterator[str]:
    """Say which tasks run when the server has given them up: it would start another copy of each that has a retry."""
    watched = set(PROCESSES)
    deadline = time.monotonic() + GIVE_UP_TIMEOUT
    while watched and time.monotonic() < deadline:
        for task, state in run.states().items():
            if task in watched and state != "running":
                watched.remove(task)
                if task in run.find_left():
                    yield f"{task} runs on, and is {state}: its retry would run beside it"
        time.sleep(POLL_INTERVAL)
    for task in sorted(watched):
        yield f"the server has not given up {task}"


SCENARIOS = (
    Scenario(
        "supervisors-killed",
        "the supervisors get SIGKILL",
        ("local", "celery"),
        kill_supervisors,
        shows_fault=True,
    ),
    Scenario("worker-killed", "the Celery worker gets SIGKILL", ("celery",), kill_worker, shows_fault=True),
    # A stock supervisor of 3.3 and newer starts no task in another thread than the main one.
    Scenario(
        "worker-with-threads-killed",
        "the same, with a pool of threads",
        ("celery",),
        partial(kill_worker, variables=THREADS),
    ),
)
