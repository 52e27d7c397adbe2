"""What the demo runs: every shape of what a task starts, ended in two ways, stock and patched."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.harness.shapes import SHAPES
from tests.harness.supervised import ENDS_TASK_ON_SIGTERM, kill_supervisors, run_supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.harness.environments import Environment
    from tests.harness.shapes import Shape
    from tests.harness.supervised import Ending, Outcome

RETURN_TIMEOUT = 20.0
"""Seconds from a task's end after which its supervisor counts as hung: what it waits for takes 8 at most."""
# A supervised task uses the processor while it starts and then waits.
RUNS_PER_PROCESSOR = 4
STOP_INTERVAL = 0.1


@dataclass(frozen=True)
class Run:
    """One task under one supervisor."""

    shape: Shape
    ending: Ending
    environment: Environment
    patched: bool


def plan_runs(sides: dict[bool, Environment]) -> list[Run]:
    """Return the runs in the order of the report."""
    endings: list[Ending] = ["409"]
    if ENDS_TASK_ON_SIGTERM.contains(sides[False].release.version):
        endings.append("sigterm")
    return [
        Run(shape, ending, environment, patched)
        for ending in endings
        for shape in SHAPES
        for patched, environment in sides.items()
    ]


def run_all(runs: Sequence[Run], on_finished: Callable[[], object]) -> dict[Run, Outcome]:
    """Run some at a time; when interrupted, end those that run."""
    workers = RUNS_PER_PROCESSOR * (os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        futures = {run: pool.submit(run_one, run) for run in runs}
        try:
            for future in as_completed(futures.values()):
                future.result()
                on_finished()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # What was cancelled before a worker saw it never counts as done to wait().
            begun = [future for future in futures.values() if not future.cancelled()]
            # Again and again, for a run may have been about to start its supervisor.
            while wait(begun, STOP_INTERVAL).not_done:
                kill_supervisors()
            raise
    return {run: future.result() for run, future in futures.items()}


def run_one(run: Run) -> Outcome:
    return run_supervised(run.environment, run.shape, run.ending, timeout=RETURN_TIMEOUT)
