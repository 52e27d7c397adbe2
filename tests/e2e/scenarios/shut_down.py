"""A worker is shut down: its supervisors alone, or the scheduler or Celery worker that they run below."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.e2e import policies
from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import SLOTS_TIMEOUT, Outcome, Scenario, judge_ends, judge_slots, observe_end
from tests.e2e.runs import DAG, PROCESSES, start_run

if TYPE_CHECKING:
    from tests.e2e.deployment import Executor, Installation

WARM_TIME = 5.0
"""Seconds in which a warm stop must not have ended anything."""
STOP_TIMEOUT = 60.0
"""Seconds that a server has to end once its last task has."""


def signal_supervisors(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGTERM to every supervisor."""
    variables = policies.choose("stop", installation.release)
    with run_airflow(installation, executor, variables=variables) as airflow, start_run(airflow) as run:
        run.signal_supervisors(signal.SIGTERM)
        seconds = run.wait_for_slots(SLOTS_TIMEOUT)
        outcome = observe_end(run, states=("failed",), seconds=seconds)
        return replace(outcome, problems=[*judge_slots(seconds), *judge_ends(run), *outcome.problems])


def stop_group(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGTERM to the scheduler and all in its process group, as an init such as dumb-init does."""
    variables = policies.choose("stop", installation.release)
    with run_airflow(installation, executor, variables=variables) as airflow, start_run(airflow) as run:
        os.killpg(airflow.worker.process.pid, signal.SIGTERM)
        seconds = run.wait_for_slots(SLOTS_TIMEOUT)
        stopped = airflow.worker.wait(STOP_TIMEOUT)
        # With the scheduler gone nobody takes notice of what has become of a task that could not say it.
        outcome = observe_end(run, states=("failed", "running"), seconds=seconds)
        problems = [*judge_slots(seconds), *judge_ends(run), *judge_stop(stopped), *outcome.problems]
        return replace(outcome, problems=problems)


def stop_warm(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGTERM to the Celery worker, which waits for its tasks, and set those to failed."""
    with run_airflow(installation, executor) as airflow, start_run(airflow) as run:
        before = run.find_left()
        airflow.worker.process.send_signal(signal.SIGTERM)
        ended_early = airflow.worker.wait(WARM_TIME) or run.find_left() != before
        for task in PROCESSES:
            airflow.client.set_failed(DAG, run.id, task)
        seconds = run.wait_for_slots(SLOTS_TIMEOUT)
        stopped = airflow.worker.wait(STOP_TIMEOUT)
        outcome = observe_end(run, states=("failed",), seconds=seconds)
        early = ["the warm stop ended tasks"] if ended_early else []
        problems = [*early, *judge_slots(seconds), *judge_ends(run), *judge_stop(stopped), *outcome.problems]
        return replace(outcome, problems=problems)


def stop_cold(installation: Installation, executor: Executor) -> Outcome:
    """Send SIGQUIT to the Celery worker, which waits for nobody."""
    variables = policies.choose("stop", installation.release)
    with run_airflow(installation, executor, variables=variables) as airflow, start_run(airflow) as run:
        airflow.worker.process.send_signal(signal.SIGQUIT)
        seconds = run.wait_for_slots(SLOTS_TIMEOUT)
        stopped = airflow.worker.wait(STOP_TIMEOUT)
        outcome = observe_end(run, states=("failed", "running"), seconds=seconds)
        problems = [*judge_slots(seconds), *judge_ends(run), *judge_stop(stopped), *outcome.problems]
        return replace(outcome, problems=problems)


def judge_stop(stopped: bool) -> list[str]:
    return [] if stopped else [f"the worker had not ended after {STOP_TIMEOUT:.0f} s"]


SCENARIOS = (
    Scenario(
        "supervisors-signalled",
        "the supervisors get SIGTERM",
        ("local", "celery"),
        signal_supervisors,
        shows_fault=True,
    ),
    Scenario(
        "scheduler-stopped",
        "the scheduler and its group get SIGTERM",
        ("local",),
        stop_group,
        shows_fault=True,
    ),
    Scenario("worker-stopped-warm", "the worker is stopped warm", ("celery",), stop_warm),
    Scenario("worker-stopped-cold", "the worker is stopped cold", ("celery",), stop_cold),
)
