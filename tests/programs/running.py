"""Start the programs in tasks, end these, and see what is left: stock beside patched, each in a PID namespace of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tests.e2e.servers import find_free_port
from tests.harness.real.running import DriverFailedError, start_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from tests.harness.environments import Environment
    from tests.harness.real.running import Driver, Result
    from tests.programs.program import Program, Way

LANES = 3
"""Drivers of each side. Each runs one case at a time, for what is new is the case's."""
QUOTED_LINES = 5


@dataclass(frozen=True)
class Run:
    """A program whose task ends in one way on one side."""

    program: Program
    way: Way
    patched: bool

    @property
    def side(self) -> str:
        """The name of the side."""
        return "patched" if self.patched else "stock"


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    left: tuple[str, ...] = ()
    """Names of the processes that were left, that of the task included."""
    seconds: float | None = None
    """From the order to end, or the end of the task itself, until the supervisor has returned, or, where it is dead, until nothing
    was left; None if that has never been."""
    supervisor: str = ""
    """What was wrong with the supervisor, if anything was."""
    problem: str = ""
    """Why nothing can be said."""


def plan(programs: Iterable[Program], ways: Sequence[Way]) -> list[Run]:
    """Return the runs, stock beside patched."""
    return [Run(program, way, patched) for program in programs for way in ways for patched in (False, True)]


def run_all(
    sides: Mapping[bool, Environment],
    runs: Sequence[Run],
    folder: Path,
    *,
    own_namespace: bool,
    on_finished: Callable[[Run, Outcome], object],
) -> dict[Run, Outcome]:
    """Run all; whatever interrupts this ends the drivers with all that they have started."""
    pool = ThreadPoolExecutor(len(sides) * LANES)
    outcomes = {}
    try:
        with ExitStack() as stack:
            drivers: dict[bool, SimpleQueue[Driver]] = {side: SimpleQueue() for side in sides}
            for side, environment in sides.items():
                for _ in range(LANES):
                    drivers[side].put(
                        stack.enter_context(start_driver(environment, own_namespace=own_namespace))
                    )
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            futures = {
                pool.submit(
                    run,
                    each,
                    drivers[each.patched],
                    folder / str(number),
                    sides[each.patched].python,
                    everything=own_namespace,
                ): each
                for number, each in enumerate(runs)
            }
            for future in as_completed(futures):
                each = futures[future]
                outcomes[each] = future.result()
                on_finished(each, outcomes[each])
    finally:
        pool.shutdown()
    return {each: outcomes[each] for each in runs}


def run(each: Run, drivers: SimpleQueue[Driver], data: Path, python: Path, *, everything: bool) -> Outcome:
    """Run one by a driver that has nothing else to do."""
    driver = drivers.get()
    try:
        data.mkdir()
        settings = {"DATA": str(data), "PORT": str(find_free_port()), "PYTHON": str(python)}
        case = each.way.make_case(each.program, settings, everything=everything)
        return describe(each.way, driver.run(case))
    except DriverFailedError as error:
        return Outcome(problem=explain(error, data / "log"))
    finally:
        drivers.put(driver)


def explain(error: DriverFailedError, log: Path) -> str:
    """Return the end of what the program has said, or else of what the driver says."""
    said = log.read_text(errors="replace").strip() if log.exists() else ""
    text = "\n".join((said or str(error)).splitlines()[-QUOTED_LINES:])
    return f"The program was not there in time: {text}"


def describe(way: Way, result: Result) -> Outcome:
    """Say what came of a case; the program must have been there."""
    if not result.count("ready"):
        return Outcome(problem="the task has ended before the program was there")
    supervisor = "hung" if result.hung else f"crashed: {result.exception}" if result.exception else ""
    dead = result.killed_by is not None
    if dead and (way.end, way.to) != ("SIGKILL", "supervisor"):
        supervisor = f"died of signal {result.killed_by}"
    seconds = result.seconds_to_nothing if dead else result.seconds
    names = sorted(name.partition(" -- ")[0] for _, name in result.left)  # a runner adds its try's id
    return Outcome(tuple(names), seconds, supervisor)
