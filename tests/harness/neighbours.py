"""Run a supervisor among processes that are none of its task's business, and see whether they are harmed."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.forking import fork_supervisor
from tests.harness.processes import find_marked, make_cookie, read_state
from tests.harness.supervised import (
    RETURN_TIMEOUT,
    Plan,
    SupervisorFailedError,
    end_task,
    observe,
    wait_for_tree,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.harness.forking import ForkServer
    from tests.harness.shapes import Shape
    from tests.harness.supervised import Ending, Outcome, Supervisor

BYSTANDERS = 2
DEAD = {"Z", "X", "gone"}
STOPPED = "T"


@dataclass(frozen=True)
class Neighbourhood:
    """What came of a task, and of those beside it."""

    outcome: Outcome
    harmed: list[str]
    """Who has ended or been stopped without having to do with the task."""


def run_among_neighbours(server: ForkServer, shape: Shape, ending: Ending) -> Neighbourhood:
    """Start `shape` under a supervisor, end the task, and return what came of it and of its neighbours.

    These are two processes that the same supervisor has started before, in its group and in a session of their own, and a
    second supervised task with the same tree. None of all these outlives the call. Raises SupervisorFailedError when it does
    not get as far as the task's end.
    """
    with ExitStack() as stack:

        def start(plan: Plan) -> Supervisor:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="supervised-")))
            cookie = stack.enter_context(make_cookie())
            return stack.enter_context(fork_supervisor(server, plan, cookie=cookie, folder=folder))

        bystanders = stack.enter_context(make_cookie())
        other = start(Plan(shape, "409"))
        supervisor = start(Plan(shape, ending, bystanders, patient=True))
        others_runner = wait_for_tree(other, shape.processes)
        runner = wait_for_tree(supervisor, shape.processes)
        standing_by = [process.pid for process in find_marked(bystanders)]
        if len(standing_by) != BYSTANDERS:
            raise SupervisorFailedError(f"{len(standing_by)} of {BYSTANDERS} bystanders are there")
        neighbours = {
            **dict.fromkeys(standing_by, "bystander"),
            **dict.fromkeys([others_runner] if shape.moves else other.announced, "process of another task"),
            other.process.pid: "supervisor of another task",
        }
        stopped = list_stopped(neighbours)
        outcome = observe(supervisor, end_task(supervisor, runner, ending), RETURN_TIMEOUT)
        newly_stopped = list_stopped(neighbours) - stopped
        harmed = [name for pid, name in neighbours.items() if pid in newly_stopped or read_state(pid) in DEAD]
    return Neighbourhood(outcome, harmed)


def list_stopped(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if read_state(pid) == STOPPED}
