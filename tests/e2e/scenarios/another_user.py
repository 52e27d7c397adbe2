"""Tasks of another user than their unprivileged worker's are ended: the sudoers permit it or not, or the supervisor dies."""

from __future__ import annotations

import pwd
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.deployment import DAGS, install, run_airflow
from tests.e2e.outcomes import (
    SLOTS_TIMEOUT,
    Outcome,
    Scenario,
    find_tracebacks,
    judge_slots,
    observe_end,
    read_events,
)
from tests.e2e.runs import DAG, PROCESSES, start_run
from tests.harness.processes import find_processes, is_inside
from tests.harness.shapes import NOT_ENDED_EVENT
from tests.harness.users import OTHER, PYTHON, WORKER, check_users, make_place, permit
from tests.harness.wheels import build_patched_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.deployment import Airflow, Executor, Installation
    from tests.e2e.runs import Run
    from tests.harness.processes import Process

# The run_as_user of every task that has none of its own.
RUN_AS_USER = {"AIRFLOW__CORE__DEFAULT_IMPERSONATION": OTHER}
ORPHAN_GRACE = 8.0
"""Seconds in which a task whose supervisor has died is gone, if it can notice that: five, and what a busy machine needs."""
PLACE_FOLDERS = ("tests", "tests/harness", DAGS)


def set_failed_permitted(installation: Installation, executor: Executor) -> Outcome:
    """Set every task of a run to failed where the worker may run everything as the tasks' user."""
    with enter_place(installation) as copy, start_run_as_other(copy, executor, "ALL") as run:
        seconds = set_failed(run)
        outcome = observe_end(run, states=("failed",), seconds=seconds)
        problems = [*judge_slots(seconds), *outcome.problems]
        left = find_others(run.airflow)
        if left:
            problems.append(f"of {OTHER} are left: {', '.join(process.name for process in left)}")
        return replace(outcome, left=left, problems=problems)


def set_failed_forbidden(installation: Installation, executor: Executor) -> Outcome:
    """Set every task of a run to failed where the worker may start an interpreter as their user, and nothing else."""
    with (
        enter_place(installation) as copy,
        start_run_as_other(copy, executor, str(copy.environment.python)) as run,
    ):
        seconds = set_failed(run)
        run.wait_for_states("failed")
        left, states = find_others(run.airflow), run.states()
        problems = [
            *judge_slots(seconds),
            *(f"{task} is {state}" for task, state in states.items() if state != "failed"),
            *judge_refusals(run, left),
            *find_tracebacks(run.airflow),
        ]
        return Outcome(sum(PROCESSES.values()) + len(PROCESSES), left, seconds, states, problems)


def kill_supervisors(installation: Installation, executor: Executor) -> Outcome:
    """Kill the supervisors of tasks of another user, which is the README's limit: these tasks run on."""
    with enter_place(installation) as copy, start_run_as_other(copy, executor, "ALL") as run:
        run.signal_supervisors(signal.SIGKILL)
        time.sleep(ORPHAN_GRACE)
        left = find_others(run.airflow)
        problems = [] if left else ["nothing is left, so the README need not name this limit"]
        return Outcome(sum(PROCESSES.values()) + len(PROCESSES), left, None, run.states(), problems)


@contextmanager
def enter_place(installation: Installation) -> Iterator[Installation]:
    """Yield the same installation in a folder that other users may enter, wherever the repository is."""
    with make_place(PLACE_FOLDERS) as place:
        wheel = build_patched_wheel(installation.release, place) if installation.patched else None
        environment = install(installation.release, wheel, python=PYTHON, cache=place / "environments")
        yield replace(installation, environment=environment, place=place)


@contextmanager
def start_run_as_other(installation: Installation, executor: Executor, commands: str) -> Iterator[Run]:
    """Start a run whose tasks run as the other user, under servers of one who may run some commands as that user."""
    temporary = installation.place / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    # Neither of them gets through sudo, whatever SETENV permits: sudo drops the one, and ld.so(8) the other before it.
    variables = installation.place / "variables"
    variables.write_text(f"PYTHONPATH={installation.place}\nTMPDIR={temporary}\n")
    with (
        permit(f"SETENV: {commands}", defaults=[f"env_file={variables}", "!secure_path"]),
        run_airflow(installation, executor, user=WORKER, variables=RUN_AS_USER) as airflow,
        start_run(airflow) as run,
    ):
        yield run


def set_failed(run: Run) -> float | None:
    """Set every task to failed, and return after how many seconds the slots were free."""
    for task in PROCESSES:
        run.airflow.client.set_failed(DAG, run.id, task)
    return run.wait_for_slots(SLOTS_TIMEOUT)


def find_others(airflow: Airflow) -> list[Process]:
    """Return the processes of the tasks' user: their own, below sudo, and those that they have started."""
    uid = pwd.getpwnam(OTHER).pw_uid

    def belongs(pid: int) -> bool:
        with suppress(FileNotFoundError):
            return Path(f"/proc/{pid}").stat().st_uid == uid and is_inside(pid, airflow.folder)
        return False

    return find_processes(belongs)


def judge_refusals(run: Run, left: list[Process]) -> Iterator[str]:
    """Say if what is left is not told by one error, in the log of its task, with what sudo said."""
    told = set()
    for task in PROCESSES:
        events = read_events(run, task, NOT_ENDED_EVENT)
        if len(events) > 1 or any("sudoers must permit" not in event["reason"] for event in events):
            yield f"the log of {task} has {len(events)} errors: {events}"
        told |= {process["pid"] for event in events for process in event["processes"]}
    if not left:
        yield "nothing is left, so this shows nothing"
    untold = [f"{process.name} ({process.pid})" for process in left if process.pid not in told]
    if untold:
        yield f"no task's log has an error about {', '.join(untold)}"


SCENARIOS = (
    Scenario(
        "another-user",
        "tasks of another user (run_as_user) are marked failed",
        ("local",),
        set_failed_permitted,
        shows_fault=True,
        check=check_users,
    ),
    Scenario(
        "another-user-forbidden",
        "the same, and the sudoers forbid to end them",
        ("local",),
        set_failed_forbidden,
        check=check_users,
    ),
    Scenario(
        "another-user-orphaned",
        "their supervisors get SIGKILL, and they run on",
        ("local",),
        kill_supervisors,
        check=check_users,
    ),
)
