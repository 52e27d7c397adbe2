"""Hundreds of short tasks, a third of which are set to failed as soon as they have started their children."""

from __future__ import annotations

import os
import select
import time
from collections import Counter
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import SLOTS_TIMEOUT, Outcome, Scenario, find_tracebacks, judge_slots, name_left
from tests.e2e.runs import (
    ANNOUNCEMENTS_MAX_BYTES,
    POLL_INTERVAL,
    count_finished,
    open_announcements,
    read_parent,
)
from tests.e2e.servers import ServerFailedError
from tests.harness.processes import find_processes, read_state, read_strings, wait_for_exit
from tests.harness.supervised import SETTLE_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.deployment import Airflow, Executor, Installation
    from tests.harness.processes import Process

DAG, TASK = "many_tasks", "many"
TASKS = 300
KILLED = range(0, TASKS, 3)
CHILDREN = 2
"""What each of those that are killed starts."""
SLOTS = 16
# From 3.3 on 16 tasks, the scheduler and the API write more than SQLite's one writer at a time can: requests fail.
SQLITE_KEEPS_UP = SpecifierSet("<1.3.0a0", prereleases=True)
VARIABLES = {
    "AIRFLOW__CORE__PARALLELISM": str(SLOTS),
    "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": str(SLOTS),
    "AIRFLOW__CELERY__WORKER_CONCURRENCY": str(SLOTS),
}

LOAD_TIMEOUT = 900.0
"""Seconds for all tasks; two busy cores take 200, and stock supervisors keep slots for many more."""
STATES_INTERVAL = 1.0
ENDED = ("success", "failed")


def kill_many(installation: Installation, executor: Executor) -> Outcome:
    """Run all tasks, set a third of them to failed while they run, and look for what has not ended with them."""
    with (
        run_airflow(installation, executor, variables=VARIABLES) as airflow,
        open_announcements(airflow) as (conf, announcements),
    ):
        run = airflow.client.trigger(DAG, conf)
        deadline = time.monotonic() + LOAD_TIMEOUT
        kill_as_they_start(airflow, run, announcements, deadline)
        states = wait_for_states(airflow, run, deadline)
        seconds = wait_for_slots(airflow)
        wait_for_exit(find_left(airflow, conf["cookie"]), SETTLE_TIMEOUT)
        left = find_left(airflow, conf["cookie"])
        zombies = find_zombies(airflow)
        problems = [
            *judge_slots(seconds),
            *name_left({TASK: left} if left else {}),
            *judge_states(states),
            *([f"{len(zombies)} zombies of the worker"] if zombies else []),
            *find_tracebacks(airflow),
        ]
        by_name = {f"{TASK} {index}": state for index, state in states.items()}
        return Outcome(TASKS + CHILDREN * len(KILLED), left, seconds, by_name, problems)


def kill_as_they_start(airflow: Airflow, run: str, announcements: int, deadline: float) -> None:
    """Set each of the tasks that are to be killed to failed when all of its children have announced themselves."""
    started: Counter[int] = Counter()
    killed: set[int] = set()
    while len(killed) < len(KILLED):
        if time.monotonic() > deadline:
            raise ServerFailedError(
                f"{len(killed)} of {len(KILLED)} tasks had started their children after {LOAD_TIMEOUT:.0f} s.\n"
                f"{airflow.tail_logs()}"
            )
        if not select.select([announcements], [], [], STATES_INTERVAL)[0]:
            continue
        for line in os.read(announcements, ANNOUNCEMENTS_MAX_BYTES).splitlines():
            # An actor's last arguments are the cookie, in which the task's number is, and the FIFO.
            index = int(read_strings(int(line), "cmdline")[-3].split(b".")[1])
            started[index] += 1
            if started[index] == CHILDREN:
                airflow.client.set_failed(DAG, run, TASK, index)
                killed.add(index)


def wait_for_states(airflow: Airflow, run: str, deadline: float) -> dict[int, str | None]:
    """Return the states of all tasks, when all have ended or the deadline has come."""
    while True:
        instances = airflow.client.list_task_instances(DAG, run)
        states = {instance["map_index"]: instance["state"] for instance in instances}
        if all(state in ENDED for state in states.values()) or time.monotonic() > deadline:
            return states
        time.sleep(STATES_INTERVAL)


def wait_for_slots(airflow: Airflow) -> float | None:
    """Return after how many seconds the worker had done with all tasks, None if SLOTS_TIMEOUT passed before."""
    began = time.monotonic()
    while count_finished(airflow) < TASKS:
        if time.monotonic() - began > SLOTS_TIMEOUT:
            return None
        time.sleep(POLL_INTERVAL)
    return time.monotonic() - began


def find_left(airflow: Airflow, cookie: str) -> list[Process]:
    """Return the tasks' own processes, which are children of the worker's, and those that carry the cookie."""
    workers = find_workers(airflow)

    def belongs(pid: int) -> bool:
        marked = any(string.startswith(cookie.encode()) for string in read_strings(pid, "cmdline"))
        return marked or (is_child(pid, workers) and read_state(pid) != "Z")

    return find_processes(belongs)


def find_zombies(airflow: Airflow) -> list[Process]:
    """Return who has ended and was not reaped by the worker or its processes."""
    parents = {airflow.worker.process.pid, *find_workers(airflow)}
    return find_processes(lambda pid: is_child(pid, parents) and read_state(pid) == "Z")


def find_workers(airflow: Airflow) -> set[int]:
    """Return the worker's processes that run the supervisors."""
    main = {airflow.worker.process.pid}
    return {process.pid for process in find_processes(lambda pid: is_child(pid, main))}


def is_child(pid: int, parents: set[int]) -> bool:
    try:
        return read_parent(pid) in parents
    except (FileNotFoundError, ProcessLookupError):
        return False


def judge_states(states: dict[int, str | None]) -> Iterator[str]:
    """Say which tasks are not in the state that they should be in."""
    if len(states) != TASKS:
        yield f"there are {len(states)} tasks and not {TASKS}"
    for index, state in states.items():
        due = "failed" if index in KILLED else "success"
        if state != due:
            yield f"{TASK} {index} is {state} and not {due}"


SCENARIOS = (
    Scenario(
        "load",
        f"{len(KILLED)} of {TASKS} tasks are marked failed under load",
        ("celery",),
        kill_many,
        shows_fault=True,
        releases=SQLITE_KEEPS_UP,
    ),
)
