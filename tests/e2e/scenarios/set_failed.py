"""Somebody sets running tasks to failed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.e2e.deployment import run_airflow
from tests.e2e.outcomes import SLOTS_TIMEOUT, Outcome, Scenario, judge_ends, judge_slots, observe_end
from tests.e2e.runs import DAG, PROCESSES, start_run

if TYPE_CHECKING:
    from tests.e2e.deployment import Executor, Installation


def set_failed(installation: Installation, executor: Executor) -> Outcome:
    """Set every task of a run to failed, and wait for the slots."""
    with run_airflow(installation, executor) as airflow, start_run(airflow) as run:
        for task in PROCESSES:
            airflow.client.set_failed(DAG, run.id, task)
        seconds = run.wait_for_slots(SLOTS_TIMEOUT)
        outcome = observe_end(run, states=("failed",), seconds=seconds)
        return replace(outcome, problems=[*judge_slots(seconds), *judge_ends(run), *outcome.problems])


SCENARIOS = (
    Scenario("set-failed", "the tasks are marked failed", ("local", "celery"), set_failed, shows_fault=True),
)
