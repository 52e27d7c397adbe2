"""When each process of one task was born and when it died, before and after the API answered 409."""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.drawing import RUNNER, SUPERVISOR, draw_timelines
from tests.bench.series import Series
from tests.bench.trees import hold
from tests.harness.processes import find_marked
from tests.harness.shapes import Shape, shell
from tests.harness.supervised import end_task, start_supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from tests.bench.setup import Setup
    from tests.harness.environments import Environment
    from tests.harness.processes import Process

# Born a little apart from each other, so that the picture has an order.
PACE = "sleep 0.15"
TASK = Shape(
    "timeline",
    "a shell, a background command, a pipeline, a command whose parent is gone, and one in its own session",
    shell(
        f'echo $$ >>"${{@: -1}}"; {PACE}; "$@" & {PACE}; "$@" | "$@" & {PACE}; '
        f'(nohup "$@" >/dev/null 2>&1 &); {PACE}; setsid "$@" & wait'
    ),
    processes=6,
)
RETURN_TIMEOUT = 20.0
"""Seconds from the order to end until the supervisor must be gone."""
STAT_PARENT, STAT_START_TIME = 1, 19
ENCORE_SECONDS = 1.0
"""Seconds that are watched when the supervisor is gone: what is left then goes on."""


@dataclass(frozen=True)
class Life:
    """One process; times are seconds from the 409."""

    name: str
    born: float
    died: float
    """Infinite if it was left."""


@dataclass(frozen=True)
class Timeline:
    """The processes of one task, supervisor and runner first."""

    contender: str
    lives: list[Life]
    watched_until: float
    verdict: str
    """What became of the supervisor."""


def measure_timeline(setup: Setup) -> list[Series]:
    """Watch the same task on both sides, draw it, and return how long its processes outlived the 409."""
    watched = itertools.count(1)

    def on_watched() -> None:
        setup.on_progress(next(watched) / len(setup.sides))

    timelines = draw_task(setup.sides, setup.settings, setup.folder / "timeline.svg", on_watched)
    return [describe(timeline) for timeline in timelines]


def draw_task(
    sides: Mapping[str, Environment],
    settings: Mapping[str, str],
    file: Path,
    on_watched: Callable[[], object],
) -> list[Timeline]:
    """Watch the same task on all sides, each with its name, and draw what became of its processes."""
    timelines = []
    for side, environment in sides.items():
        timelines.append(record(f"{side} {environment.release.airflow}", environment, settings))
        on_watched()
    draw_timelines(timelines, file)
    return timelines


def describe(timeline: Timeline) -> Series:
    ends = [min(life.died, timeline.watched_until) for life in timeline.lives]
    left = sum(math.isinf(life.died) for life in timeline.lives)
    note = f"{left} left" if left else ""
    return Series(
        "Processes of a task: 409 until death",
        "",
        timeline.contender,
        [end * 1000 for end in ends],
        note=note,
    )


def record(contender: str, environment: Environment, settings: Mapping[str, str]) -> Timeline:
    """Run the task, have its heartbeat answered 409, and watch."""
    with ExitStack() as stack:
        supervisor = stack.enter_context(start_supervised(environment, TASK, "409", env=settings))
        processes = find_marked(supervisor.cookie)
        pids = [process.pid for process in processes]
        names = [
            name_process(process, supervisor.process.pid, supervisor.runner, pids) for process in processes
        ]
        births = [read_birth(pid) for pid in pids]
        conflict = end_task(supervisor)
        deaths, watched_until = watch(stack, supervisor.process.pid, pids)
        verdict = f"still ran {RETURN_TIMEOUT:.0f} s after the 409"
        if supervisor.process.pid in deaths:
            result = json.loads((supervisor.folder / "result.json").read_text())
            conflict = result["conflict_at"]
            after = f"{deaths[supervisor.process.pid] - conflict:.2f} s after the 409"
            verdict = f"crashed {after}" if result["exception"] else f"returned {after}"
    lives = [
        Life(name, born - conflict, deaths.get(pid, math.inf) - conflict)
        for pid, name, born in zip(pids, names, births, strict=True)
    ]
    lives.sort(key=lambda life: life.born)
    return Timeline(contender, lives, watched_until - conflict, verdict)


def name_process(process: Process, supervisor: int, runner: int, pids: Collection[int]) -> str:
    """Say what a process is, and how it has made itself hard to find."""
    if process.pid == supervisor:
        return SUPERVISOR
    if process.pid == runner:
        return RUNNER
    if os.getsid(process.pid) == process.pid:
        return f"{process.name}, own session"
    if int(read_stat(process.pid)[STAT_PARENT]) not in pids:
        return f"{process.name}, parent gone"
    return process.name


def read_stat(pid: int) -> list[str]:
    """Return what follows a process's name in /proc/PID/stat, its state first."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def read_birth(pid: int) -> float:
    """Return when a process was born, in monotonic time, to a hundredth of a second."""
    since_boot = int(read_stat(pid)[STAT_START_TIME]) / os.sysconf("SC_CLK_TCK")
    return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def watch(stack: ExitStack, supervisor: int, pids: list[int]) -> tuple[dict[int, float], float]:
    """Return when each process that died did, and when the watch ended: some time after the supervisor was gone."""
    alive = {hold(stack, pid): pid for pid in pids}
    deaths: dict[int, float] = {}
    until = time.monotonic() + RETURN_TIMEOUT
    while (now := time.monotonic()) < until:
        ended, _, _ = select.select(list(alive), [], [], until - now)
        for pidfd in ended:
            deaths[alive.pop(pidfd)] = time.monotonic()
        if supervisor in deaths:
            until = deaths[supervisor] + ENCORE_SECONDS
    return deaths, until
