"""Trivial tasks: how long they take to start, and how late their end is noticed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.bench.load import busy_cores
from tests.bench.series import Series
from tests.bench.setup import HASTE
from tests.bench.workers import start_worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.bench.setup import Setup
    from tests.bench.workers import Timing

ENDS, STARTS, QUICK_TASKS = 1000, 300, 10
"""Ends that are noticed late are rare on idle cores; start() is the same every time."""
BUDGET, QUICK_BUDGET = 150.0, 5.0
"""Seconds for one side, which has its say with fewer tasks then: an end that stock notices late takes 5 s or more."""
WARM_UP_TASKS = 2
"""The first task imports what all later ones find in memory."""
# Changes of the machine's pace, which last longer than that, hit both sides.
TASKS_AT_A_TIME = 5
LATE_MS = 1000
NANOSECONDS_PER_MS = 1_000_000


def measure_noticing(setup: Setup) -> list[Series]:
    """Measure from the runner's last act to the return of wait(), with every core busy.

    With Airflow's default settings; a quick run doesn't wait that long for an end that is noticed by a heartbeat.
    """
    with busy_cores():
        timings = run_in_turn(setup, ENDS, setup.settings)
    return [
        describe_noticing(contender, to_ms([timing["notice"] for timing in measured]))
        for contender, measured in timings.items()
    ]


def describe_noticing(contender: str, samples: list[float]) -> Series:
    late = sum(sample > LATE_MS for sample in samples)
    note = f"{late} later than {LATE_MS / 1000:.0f} s"
    return Series("Noticing the end, cores busy", "", contender, samples, note=note)


def measure_start(setup: Setup) -> list[Series]:
    """Measure `ActivitySubprocess.start()` on idle cores."""
    return [
        Series("ActivitySubprocess.start()", "", contender, to_ms([timing["start"] for timing in measured]))
        for contender, measured in run_in_turn(setup, STARTS, HASTE).items()
    ]


def run_in_turn(setup: Setup, tasks: int, settings: Mapping[str, str]) -> dict[str, list[Timing]]:
    """Run so many trivial tasks on each side, some on one, then some on the other."""
    budget = QUICK_BUDGET if setup.quick else BUDGET
    tasks = QUICK_TASKS if setup.quick else tasks
    sides = list(setup.sides)
    timings: dict[str, list[Timing]] = {side: [] for side in sides}
    spent = dict.fromkeys(sides, 0.0)
    with ExitStack() as stack:
        workers = {side: stack.enter_context(start_worker(setup.sides[side], settings)) for side in sides}
        for worker in workers.values():
            worker.run(WARM_UP_TASKS)
        while unfinished := [side for side in sides if len(timings[side]) < tasks and spent[side] < budget]:
            for side in unfinished:
                began = time.monotonic()
                timings[side] += workers[side].run(min(TASKS_AT_A_TIME, tasks - len(timings[side])))
                spent[side] += time.monotonic() - began
            # Whoever comes first in one round comes last in the next: neither gains from the order.
            sides.reverse()
            parts = [max(len(timings[side]) / tasks, spent[side] / budget) for side in sides]
            setup.on_progress(min(1, *parts))
    return timings


def to_ms(nanoseconds: list[int]) -> list[float]:
    return [value / NANOSECONDS_PER_MS for value in nanoseconds]
