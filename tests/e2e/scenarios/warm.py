"""A worker, or a supervisor, is told to stop, and lets its task finish first."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e import policies
from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import Outcome, Scenario, find_tracebacks
from tests.e2e.runs import (
    ANNOUNCEMENTS_MAX_BYTES,
    POLL_INTERVAL,
    STATE_TIMEOUT,
    open_announcements,
    read_parent,
)
from tests.e2e.scenarios.shut_down import STOP_TIMEOUT, judge_stop
from tests.e2e.servers import wait_until
from tests.harness.processes import has_exited

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.deployment import Airflow, Executor, Installation

DAG = TASK = "waits"
NOTICE_TIMEOUT = 10.0
"""Seconds in which who was told to stop says so, or nobody does, as the supervisors of stock."""
ENDED = ("success", "failed")
PATIENT_SUPERVISOR = "it lets the task finish"
PATIENT_CELERY = "Warm shutdown"
PATIENT_EXECUTOR = "waiting for running tasks to finish"


@dataclass(frozen=True)
class Waiting:
    """A task that ends well when it is given the word."""

    airflow: Airflow
    run: str
    word: int
    """The descriptor of the FIFO that takes it."""
    runner: int
    runner_pidfd: int

    def wait_for_notice(self, notice: str) -> None:
        """Return when somebody has said in a log that the task may finish, or ended it, or NOTICE_TIMEOUT has passed."""
        deadline = time.monotonic() + NOTICE_TIMEOUT
        while not has_exited(self.runner_pidfd) and time.monotonic() < deadline:
            if any(notice in text for text in self.airflow.read_logs().values()):
                return
            time.sleep(POLL_INTERVAL)

    def finish(self) -> Outcome:
        """Give the word, unless it is too late, and describe what came of the task."""
        ended_early = has_exited(self.runner_pidfd)
        os.write(self.word, b"\n")
        deadline = time.monotonic() + STATE_TIMEOUT
        while (state := self._read_state()) not in ENDED and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL)
        problems = [
            *(["the task was ended"] if ended_early else []),
            *([] if state == "success" else [f"{TASK} is {state}"]),
            *find_tracebacks(self.airflow),
        ]
        return Outcome(started=0, left=[], seconds=None, states={TASK: state}, problems=problems)

    def _read_state(self) -> str | None:
        state: str | None = self.airflow.client.task_instances(DAG, self.run)[TASK]["state"]
        return state


@contextmanager
def start_waiting(airflow: Airflow) -> Iterator[Waiting]:
    """Start the task, and yield it when it waits."""
    with open_announcements(airflow) as (conf, announcements):
        path = Path(conf["folder"]) / "word"
        os.mkfifo(path)
        path.chmod(0o666)
        # Held open at both ends, as the announcements are.
        word = os.open(path, os.O_RDWR)
        runner_pidfd = None
        try:
            run = airflow.client.trigger(DAG, conf)
            os.set_blocking(announcements, False)
            read: list[bytes] = []

            def is_announced() -> bool:
                try:
                    read.append(os.read(announcements, ANNOUNCEMENTS_MAX_BYTES))
                except BlockingIOError:
                    return False
                return True

            wait_until(is_announced, *airflow.servers, what="the task waits")
            runner = int(read[0])
            runner_pidfd = os.pidfd_open(runner)
            yield Waiting(airflow, run, word, runner, runner_pidfd)
        finally:
            os.close(word)
            if runner_pidfd is not None:
                os.close(runner_pidfd)


def interrupt_worker(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGINT to the Celery worker and all in its process group, as its terminal does on Ctrl-C."""
    with run_airflow(installation, executor) as airflow, start_waiting(airflow) as waiting:
        os.killpg(airflow.worker.process.pid, signal.SIGINT)
        waiting.wait_for_notice(PATIENT_CELERY)
        return finish_both(waiting)


def stop_scheduler(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGTERM to the scheduler alone, whose LocalExecutor waits for its tasks."""
    with run_airflow(installation, executor) as airflow, start_waiting(airflow) as waiting:
        airflow.worker.process.send_signal(signal.SIGTERM)
        waiting.wait_for_notice(PATIENT_EXECUTOR)
        return finish_both(waiting)


def finish_both(waiting: Waiting) -> Outcome:
    """Let the task finish, and wait for the worker, which then has nothing more to do."""
    outcome = waiting.finish()
    stopped = waiting.airflow.worker.wait(STOP_TIMEOUT)
    return replace(outcome, problems=[*judge_stop(stopped), *outcome.problems])


def signal_patient_supervisor(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGTERM to a supervisor that is to let its task finish."""
    variables = policies.choose("finish", installation.release)
    with (
        run_airflow(installation, executor, variables=variables) as airflow,
        start_waiting(airflow) as waiting,
    ):
        os.kill(read_parent(waiting.runner), signal.SIGTERM)
        waiting.wait_for_notice(PATIENT_SUPERVISOR)
        return waiting.finish()


SCENARIOS = (
    Scenario("worker-interrupted", "Ctrl-C at a Celery worker's terminal", ("celery",), interrupt_worker),
    Scenario("scheduler-signalled", "the scheduler alone gets SIGTERM", ("local",), stop_scheduler),
    Scenario(
        "supervisor-patient",
        "a supervisor gets SIGTERM, and its policy is to finish",
        ("local", "celery"),
        signal_patient_supervisor,
    ),
)
