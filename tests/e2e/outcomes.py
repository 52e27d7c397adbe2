"""What came of a scenario, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from packaging.specifiers import SpecifierSet

from tests.e2e.runs import DAG, PROCESSES
from tests.harness.processes import Process, wait_for_exit
from tests.harness.shapes import NOT_ENDED_EVENT
from tests.harness.supervised import HEARTBEAT_INTERVAL, KILL_GRACE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.e2e.deployment import Airflow, Executor, Installation
    from tests.e2e.runs import Run

SLOTS_TIMEOUT = 90.0
"""Seconds after which a slot counts as never free; what stock supervisors wait for takes 75 at most."""
SLOTS_DUE = HEARTBEAT_INTERVAL + KILL_GRACE + 2.0
"""Seconds in which a slot has to be free: the next heartbeat, the grace period, and what the contract allows."""
AT_ONCE = ("removes_its_work", "sleeps")
"""Tasks that have nothing to wait for when they are told to end."""
ENDS_DUE = HEARTBEAT_INTERVAL + 2.0
"""Seconds in which those have to end: less than the grace period, in which the deaf ones are waited for."""
SETTLE_TIMEOUT = 5.0
"""Seconds that a process which was already told to end may take to do it on a machine that is busy with an Airflow."""
LEFT_NAMED = 8

ENDED_EVENT = "Ended processes that the task had left running"
# A task that fails says so in its own log; that is no fault of whoever watches it.
OF_THE_TASK_ITSELF = "Task failed with exception"
TRACEBACK = "Traceback (most recent call last)"

EVERY_RELEASE = SpecifierSet(">=1", prereleases=True)


@dataclass(frozen=True)
class Outcome:
    """What a scenario saw. `problems` has a sentence for everything that is not as it should be."""

    started: int
    """Processes that had to end, the tasks' own among them."""
    left: list[Process]
    """Those that had not."""
    seconds: float | None
    """Until every slot was free; None if that was not awaited, or in vain."""
    states: dict[str, str | None]
    problems: list[str]
    ends: dict[str, float] = field(default_factory=dict)
    """Seconds until each task's own process had ended, where that was awaited."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Scenario(NamedTuple):
    """One way to end tasks. `run` has an Airflow of its own, and leaves nothing of it behind."""

    name: str
    title: str
    executors: tuple[Executor, ...]
    run: Callable[[Installation, Executor], Outcome]
    releases: SpecifierSet = EVERY_RELEASE
    """SDK versions that it applies to."""
    shows_fault: bool = False
    """Stock is known to leave something, and the scenario is worth nothing where it does not."""
    check: Callable[[], None] = lambda: None
    """Raises PatchError where the system lacks what the scenario needs."""


def observe_end(
    run: Run,
    *,
    states: tuple[str | None, ...],
    seconds: float | None,
) -> Outcome:
    """Describe a run whose tasks have all been ended, and which should be in one of the `states`."""
    wait_for_exit(run.list_left(), SETTLE_TIMEOUT)
    left = run.find_left()
    run.wait_for_states(*states)
    now = run.states()
    problems = [
        *name_left(left),
        *(f"{task} is {state}" for task, state in now.items() if state not in states),
        *judge_on_kill(run),
        *judge_children(run),
        *find_tracebacks(run.airflow),
    ]
    return Outcome(
        started=sum(PROCESSES.values()) + len(PROCESSES),
        left=[process for processes in left.values() for process in processes],
        seconds=seconds,
        states=now,
        problems=problems,
        ends=run.ends,
    )


def judge_slots(seconds: float | None, due: float = SLOTS_DUE) -> Iterator[str]:
    if seconds is None:
        yield f"a slot was not free after {SLOTS_TIMEOUT:.0f} s"
    elif seconds > due:
        yield f"the last slot was free after {seconds:.1f} s, more than {due:.0f}"


def judge_ends(run: Run) -> Iterator[str]:
    """Say which of the tasks that have nothing to wait for have not ended at once."""
    for task in AT_ONCE:
        seconds = run.ends.get(task)
        if seconds is None:
            yield f"{task} has not ended"
        elif seconds > ENDS_DUE:
            yield f"{task} ended late: after {seconds:.1f} s, more than {ENDS_DUE:.0f}"


def name_left(left: dict[str, list[Process]]) -> Iterator[str]:
    for task, processes in left.items():
        names = ", ".join(f"{process.name} ({process.pid})" for process in processes[:LEFT_NAMED])
        yield f"left of {task}: {names}"


def judge_on_kill(run: Run) -> Iterator[str]:
    """Say if on_kill has not run once, from its beginning to its end, while what it cleans up was there."""
    said = run.read_on_kill()
    if said != ["began", "done"]:
        yield f"on_kill: {', '.join(said) or 'not called'}"


def judge_task_log(run: Run, signals: Sequence[str], task: str = "children") -> Iterator[str]:
    """Say if a task's log does not tell the processes that its supervisor had to end, and by which signals."""
    named = list_ended(run, task)
    if sorted(process["signal"] for process in named) != list(signals):
        yield f"the log of {task} names as ended: {named or 'nothing'}"


def judge_children(run: Run) -> Iterator[str]:
    """Say if the log of `children` does not tell what its supervisor had to end, or tells that more needed force."""
    # Those that took too long to disappear are told of in another event.
    late = [
        {**process, "signal": "SIGKILL"}
        for event in read_events(run, "children", NOT_ENDED_EVENT)
        for process in event["processes"]
    ]
    yield from judge_signals([*list_ended(run, "children"), *late], run.due_signals)


def judge_signals(named: list[dict[str, Any]], due: Mapping[int, str]) -> Iterator[str]:
    """Say if of the processes that a log names as ended those due are missing, or if others needed force.

    Of the task's group, which has had SIGTERM with the runner, a member may take longer than the runner, and get another.
    """
    signals = {process["pid"]: process["signal"] for process in named}
    further = {signal for pid, signal in signals.items() if pid not in due}
    if not signals.items() >= due.items() or not further <= {"SIGTERM"}:
        yield f"the log of children names as ended: {named or 'nothing'}; due are {due}"


def list_ended(run: Run, task: str) -> list[dict[str, Any]]:
    """Return what the log of a task says of each process that was ended."""
    return [process for event in read_events(run, task) for process in event.get("processes", [])]


def read_events(run: Run, task: str, name: str = ENDED_EVENT) -> list[dict[str, Any]]:
    """Return the events of a name in the log of a task; by default what it says about what was ended."""
    lines = run.airflow.read_task_log(DAG, run.id, task).splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [event for event in events if event["event"] == name]


def find_tracebacks(airflow: Airflow) -> Iterator[str]:
    """Say which logs have tracebacks, but for a task's report of its own failure.

    The API server supervises nothing, and has one whenever two requests want to write to SQLite at once.
    """
    for name, text in airflow.read_logs().items():
        if name == "api-server.log":
            continue
        lines = [line for line in text.splitlines() if TRACEBACK in line or '"error_detail":[{' in line]
        found = [line for line in lines if OF_THE_TASK_ITSELF not in line]
        if found:
            yield f"{len(found)} tracebacks in {name}"
