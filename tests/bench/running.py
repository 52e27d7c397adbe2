"""What a running task costs its supervisor."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.series import Series
from tests.harness.shapes import BY_NAME
from tests.harness.supervised import start_supervised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.bench.setup import Setup
    from tests.harness.environments import Environment

ROUNDS = 3
SILENT_SECONDS, QUICK_SILENT_SECONDS = 60.0, 3.0
SETTLE_SECONDS = 1.0
"""What the start has set going is over then."""
SHAPE = BY_NAME["plain"]
# Airflow's default, for every heartbeat is a wake-up.
SETTINGS = {"AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "5"}
KIB_PER_MIB = 1024


def measure_running(setup: Setup) -> list[Series]:
    """Measure the supervisor's wake-ups, and the anonymous memory of supervisor and runner, while a task is silent."""
    rounds, seconds = (1, QUICK_SILENT_SECONDS) if setup.quick else (ROUNDS, SILENT_SECONDS)
    samples: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds):
        for key, value in watch_silent_tasks(setup, seconds).items():
            samples.setdefault(key, []).append(value)
        setup.on_progress((number + 1) / rounds)
    return [
        Series("A silent task", case, contender, measured, unit=unit)
        for (case, unit, contender), measured in sorted(samples.items(), key=lambda item: item[0][:2])
    ]


def watch_silent_tasks(setup: Setup, seconds: float) -> dict[tuple[str, str, str], float]:
    """Run a task on each side at the same time; return what was measured by case, unit and contender."""
    with ExitStack() as stack:
        settings = SETTINGS | setup.settings
        pids = {side: start_task(stack, environment, settings) for side, environment in setup.sides.items()}
        time.sleep(SETTLE_SECONDS)
        before = {side: count_wake_ups(supervisor) for side, (supervisor, _) in pids.items()}
        began = time.monotonic()
        time.sleep(seconds)
        minutes = (time.monotonic() - began) / 60
        measured = {}
        for side, (supervisor, runner) in pids.items():
            wake_ups = count_wake_ups(supervisor) - before[side]
            measured["wake-ups of the supervisor", "per min", side] = wake_ups / minutes
            measured["memory of the supervisor", "MiB", side] = read_memory(supervisor)
            measured["memory of the runner", "MiB", side] = read_memory(runner)
        return measured


def start_task(stack: ExitStack, environment: Environment, settings: Mapping[str, str]) -> tuple[int, int]:
    """Return the PIDs of a supervisor and its runner, which the stack ends."""
    supervisor, runner = stack.enter_context(start_supervised(environment, SHAPE, "success", env=settings))
    return supervisor.process.pid, runner


def count_wake_ups(pid: int) -> int:
    """Return how often the threads of a process have gone to sleep of their own accord."""
    statuses = Path(f"/proc/{pid}/task").glob("*/status")
    return sum(read_number(status, "voluntary_ctxt_switches") for status in statuses)


def read_memory(pid: int) -> float:
    """Return the MiB of a process that are no files', and so don't depend on who else has mapped them."""
    return read_number(Path(f"/proc/{pid}/smaps_rollup"), "Anonymous") / KIB_PER_MIB


def read_number(file: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+)", file.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{file} has no {name}")
    return int(found[1])
