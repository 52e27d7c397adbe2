"""Run a supervisor among processes that are none of its task's business, and see whether they are harmed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.harness.processes import DEAD, find_marked, make_cookie, read_state
from tests.harness.supervised import (
    RETURN_TIMEOUT,
    Plan,
    SupervisorFailedError,
    end_task,
    observe,
    start_supervisor,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.harness.forking import ForkServer
    from tests.harness.shapes import Shape
    from tests.harness.supervised import Ending, Outcome

BYSTANDERS = 2
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
    with (
        make_cookie() as bystanders,
        start_supervisor(server.launch, Plan(shape, "409")) as other,
        start_supervisor(server.launch, Plan(shape, ending, bystanders, patient=True)) as supervisor,
    ):
        standing_by = [process.pid for process in find_marked(bystanders)]
        if len(standing_by) != BYSTANDERS:
            raise SupervisorFailedError(f"{len(standing_by)} of {BYSTANDERS} bystanders are there")
        neighbours = {
            **dict.fromkeys(standing_by, "bystander"),
            **dict.fromkeys([other.runner] if shape.moves else other.announced, "process of another task"),
            other.process.pid: "supervisor of another task",
        }
        stopped = list_stopped(neighbours)
        outcome = observe(supervisor, end_task(supervisor), RETURN_TIMEOUT)
        newly_stopped = list_stopped(neighbours) - stopped
        harmed = [name for pid, name in neighbours.items() if pid in newly_stopped or read_state(pid) in DEAD]
    return Neighbourhood(outcome, harmed)


def list_stopped(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if read_state(pid) == STOPPED}
