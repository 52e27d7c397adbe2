"""Bugs to plant in the SDK of a driver, which must be found.

Runs in the driver's interpreter.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Callable

import psutil

from airflow.sdk.execution_time.teardown import (
    leftovers,
    lifeline,
    marks,
    orphans,
    process_tree,
    processes,
    sweep,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

send = process_tree.ProcessTree.signal
find = process_tree.ProcessTree.find


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute that is there already: one that nobody looks up is no bug."""
    getattr(owner, name)
    setattr(owner, name, value)


def ignore_mark() -> None:
    for name in ("read_limits", "read_variable"):
        replace(process_tree, name, lambda _pid: ())


def ignore_descent() -> None:
    replace(process_tree, "list_descent", lambda _process: [])


def forget() -> None:
    replace(process_tree.ProcessTree, "remember", lambda _tree: None)


def leave_stopped() -> None:
    def signal_but_continue(tree: Any, processes: Iterable[Any], *signals: int, **options: float) -> None:
        send(tree, processes, *(sig for sig in signals if sig != signal.SIGCONT), **options)

    replace(process_tree.ProcessTree, "signal", signal_but_continue)


def look_once() -> None:
    def stop_without_looking_again(tree: Any, _time_limit: float, **options: bool) -> list[Any]:
        members: list[Any] = tree.find(**options)
        tree.signal(members, signal.SIGSTOP)
        return members

    replace(process_tree.ProcessTree, "stop", stop_without_looking_again)


def never_kill() -> None:
    replace(leftovers.Teardown, "kill", lambda _teardown: [])


def take_siblings() -> None:
    """Take other children of the supervisor for members."""

    def find_with_siblings(tree: Any, **options: bool) -> list[Any]:
        children = map(processes.read_process, [child.pid for child in psutil.Process().children()])
        return [*find(tree, **options), *(child for child in children if child not in (None, tree._leader))]

    replace(process_tree.ProcessTree, "find", find_with_siblings)


def count_collected() -> None:
    """Take the session of the leader's number for the task's when the leader was collected."""
    replace(process_tree, "is_unreaped_leader", lambda _leader: True)


def ignore_start_of_supervisor() -> None:
    """Take whoever has got the number of a supervisor for it."""

    def is_number_in_use(origin: int) -> bool:
        process = processes.look_at(origin & marks.PID_MASK)
        return process is not None and not process.dead

    replace(orphans, "is_origin_alive", is_number_in_use)


def never_notice() -> None:
    replace(lifeline, "start_watchdog", lambda _conf: None)


def never_sweep() -> None:
    replace(sweep, "find_orphans", list)


def sweep_successes() -> None:
    """Take what a task has left for a task without a supervisor."""

    def find_any(pid: int) -> Iterator[Any]:
        origin = marks.read_origin(pid)
        process = processes.read_process(pid)
        if origin and process and not marks.is_origin_alive(origin):
            yield orphans.Orphan(process, marks.read_limits(pid), origin)

    replace(orphans, "find_orphan", find_any)


BUGS: dict[str, Callable[[], None]] = {
    "ignore-mark": ignore_mark,
    "ignore-descent": ignore_descent,
    "forget": forget,
    "look-once": look_once,
    "leave-stopped": leave_stopped,
    "never-kill": never_kill,
    "take-siblings": take_siblings,
    "count-collected": count_collected,
    "ignore-start": ignore_start_of_supervisor,
    "never-notice": never_notice,
    "never-sweep": never_sweep,
    "sweep-successes": sweep_successes,
}
