"""Run trivial tasks in the environment of a release: `python -m tests.bench.worker`, with the repository on PYTHONPATH.

Each line of standard input is a number of tasks to run, one after the other. Each is answered on standard output by a line of
JSON: for every task the nanoseconds that `start()` took, and those from the runner's end until `wait()` returned.
Python 3.9 and the packages of the environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from task_sdk.execution_time.teardown.supervised.supervised_task import Log, describe_task, in_turn

from airflow.sdk.execution_time.supervisor import ActivitySubprocess
from tests.harness.scenario import take_startup_message

CLOCK_BYTES = 8


def end_at_once(clock: int) -> None:
    """Be the task: end, and tell when."""
    os.write(clock, time.monotonic_ns().to_bytes(CLOCK_BYTES, sys.byteorder))


def run_task(logger: Any) -> dict[str, int]:
    """Supervise one task to its end."""
    reader, writer = os.pipe()
    target, task = in_turn(take_startup_message, lambda: end_at_once(writer)), describe_task(logger=logger)
    began = time.monotonic_ns()
    process = ActivitySubprocess.start(target=target, **task)
    started = time.monotonic_ns()
    exit_code = process.wait()
    returned = time.monotonic_ns()
    ended = int.from_bytes(os.read(reader, CLOCK_BYTES), sys.byteorder)
    os.close(reader)
    os.close(writer)
    if exit_code != 0:
        raise RuntimeError(f"a trivial task exited {exit_code}")
    return {"start": started - began, "notice": returned - ended}


def main() -> None:
    # The tasks must not write into the answers: what they print goes where the errors go.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logger = Log().logger
    for line in sys.stdin:
        answers.write(json.dumps([run_task(logger) for _ in range(int(line))]) + "\n")


if __name__ == "__main__":
    main()
