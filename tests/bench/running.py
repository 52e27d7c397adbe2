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
    from tests.bench.setup import Setup

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
        supervisors = {
            side: stack.enter_context(start_supervised(environment, SHAPE, "success", env=settings))
            for side, environment in setup.sides.items()
        }
        time.sleep(SETTLE_SECONDS)
        before = {side: count_wake_ups(each.process.pid) for side, each in supervisors.items()}
        began = time.monotonic()
        time.sleep(seconds)
        minutes = (time.monotonic() - began) / 60
        measured = {}
        for side, each in supervisors.items():
            wake_ups = count_wake_ups(each.process.pid) - before[side]
            measured["wake-ups of the supervisor", "per min", side] = wake_ups / minutes
            measured["memory of the supervisor", "MiB", side] = read_memory(each.process.pid)
            measured["memory of the runner", "MiB", side] = read_memory(each.runner)
        return measured


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
