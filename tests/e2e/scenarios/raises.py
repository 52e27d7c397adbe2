"""A task raises an exception, which its runner reports before it exits with 0."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import psutil

from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import Outcome, Scenario, find_tracebacks, judge_task_log, name_left
from tests.e2e.runs import PROCESSES, start_run
from tests.harness.processes import find_marked, wait_for_exit
from tests.harness.supervised import SETTLE_TIMEOUT

if TYPE_CHECKING:
    from tests.e2e.deployment import Executor, Installation
    from tests.e2e.runs import Run
    from tests.harness.processes import Process

TASK = "children"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGTERM")
"""What the children that are left need, of which one is deaf."""


def end_first_child(installation: Installation, executor: Executor) -> Outcome:
    """End the child that the task waits for, and wait until the task has failed."""
    with run_airflow(installation, executor) as airflow, start_run(airflow) as run:
        children = find_marked(f"{run.cookie}.{TASK}.1")
        first = min(children, key=lambda child: psutil.Process(child.pid).create_time())
        os.kill(first.pid, signal.SIGTERM)
        run.wait_for_states("failed", tasks=[TASK])
        wait_for_exit(find_left(run), SETTLE_TIMEOUT)
        left, state = find_left(run), run.states()[TASK]
        problems = [
            *name_left({TASK: left} if left else {}),
            *([] if state == "failed" else [f"{TASK} is {state}"]),
            *judge_task_log(run, SIGNALS, TASK),
            *find_tracebacks(airflow),
        ]
        return Outcome(PROCESSES[TASK] + 1, left, None, {TASK: state}, problems)


def find_left(run: Run) -> list[Process]:
    return run.find_left().get(TASK, [])


SCENARIOS = (Scenario("raises", "a task raises an exception", ("local",), end_first_child, shows_fault=True),)
