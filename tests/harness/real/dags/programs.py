"""The tasks of `nox -s programs`: what they start is in the variables, and tests/programs/table.py says what that is."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, task

LONG = 600
"""Seconds that nobody waits for."""
WORKERS = 2


def tell_ready() -> None:
    Path(os.environ["TOLD"]).write_text(json.dumps({"event": "ready"}) + "\n")


def fail_when_freed() -> None:
    with Path(os.environ["FREED"]).open() as fifo:
        fifo.readline()
    raise RuntimeError("it fails by itself")


def start_pool() -> None:
    """Give every worker something to do that takes long."""
    pool = multiprocessing.get_context("fork").Pool(WORKERS)
    pool.map(abs, range(WORKERS), chunksize=1)
    for _ in range(WORKERS):
        pool.apply_async(time.sleep, (LONG,))
    tell_ready()
    fail_when_freed()


with DAG("programs", schedule=None):
    BashOperator(task_id="shell", bash_command='eval "$PROGRAM"')
    task(task_id="pool")(start_pool)()
