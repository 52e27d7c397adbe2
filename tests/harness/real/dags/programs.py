"""The tasks of `nox -s programs`: what they start is in the variables, and tests/programs/table.py says what that is."""

from __future__ import annotations

import multiprocessing
import time

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, task
from tests.harness.real.telling import tell, wait_until_freed

LONG = 600
"""Seconds that nobody waits for."""
WORKERS = 2


def start_pool() -> None:
    """Give every worker something to do that takes long."""
    pool = multiprocessing.get_context("fork").Pool(WORKERS)
    pool.map(abs, range(WORKERS), chunksize=1)
    for _ in range(WORKERS):
        pool.apply_async(time.sleep, (LONG,))
    tell("ready")
    wait_until_freed()
    raise RuntimeError("it fails by itself")


with DAG("programs", schedule=None):
    BashOperator(task_id="shell", bash_command='eval "$PROGRAM"')
    task(task_id="pool")(start_pool)()
