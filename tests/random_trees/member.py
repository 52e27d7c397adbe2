"""One process of a random tree: a fork that calls `live`, or `member.py COOKIE NAME WRITER SCRIPT`.

A script is {"id": number, "steps": [...], "then": END}. A step is one of STEPS, "empty", or {"fork": SCRIPT}; "then" is one
of ENDS, or "supervise", with {"inner": SCRIPT} for the runner of a task within the task. Each process announces itself as a JSON line in WRITER when it has done its steps, and is called NAME.ID, which what
it forks later is called, too. Python 3.9, and the standard library alone: an emptied environment has nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping

POLL_INTERVAL = 0.001
MARK_BITS = 62
MARK_FLAG = 1 << MARK_BITS
RLIMIT_LOCKS = 10
"""These as process_tree.py has them, which an emptied environment cannot import."""
OWN_LIMIT = 200_000
"""Microseconds, as rtkit sets it."""
BROOD = 40
BROOD_INTERVAL = 0.008
"""Seconds; together longer than the grace that deaf trees are given."""


class Tree(NamedTuple):
    """What the processes of a tree have in common."""

    cookie: str
    name: str
    writer: int
    supervise: Callable[[dict[str, Any], Tree], NoReturn] | None = None
    """Supervises a script as a task; None where the SDK cannot be imported, and it is just forked."""


def live(script: dict[str, Any], tree: Tree) -> NoReturn:
    do_steps(script, tree)
    announce(script, tree)
    if "inner" not in script:
        ENDS[script["then"]]()
    elif tree.supervise:
        tree.supervise(script["inner"], tree)
    elif os.fork() == 0:
        live(script["inner"], tree)
    stay()


def count_members(script: Mapping[str, Any]) -> int:
    """Return the number of members, the runner included."""
    return 1 + sum(map(count_members, list_children(script)))


def list_children(script: Mapping[str, Any]) -> list[Any]:
    """Return the scripts of those that a member starts."""
    forked = [step["fork"] for step in script["steps"] if isinstance(step, dict)]
    return [*forked, script["inner"]] if "inner" in script else forked


def do_steps(script: dict[str, Any], tree: Tree) -> None:
    Path("/proc/self/comm").write_text(f"{tree.name}.{script['id']}")
    for number, step in enumerate(script["steps"]):
        if step == "empty":
            go_on_in_empty_environment({**script, "steps": script["steps"][number + 1 :]}, tree)
        elif isinstance(step, dict):
            if os.fork() == 0:
                live(step["fork"], tree)
        else:
            STEPS[step]()


def announce(script: dict[str, Any], tree: Tree) -> None:
    line = {"tree": tree.name, "id": script["id"], "pid": os.getpid(), "then": script["then"]}
    os.write(tree.writer, json.dumps(line).encode() + b"\n")


def stay() -> NoReturn:
    while True:
        signal.pause()


def go_on_in_empty_environment(rest: dict[str, Any], tree: Tree) -> NoReturn:
    os.set_inheritable(tree.writer, True)
    arguments = [tree.cookie, tree.name, str(tree.writer), json.dumps(rest)]
    os.execve(sys.executable, [sys.executable, "-I", "-S", __file__, *arguments], {})  # noqa: S606


def open_session() -> None:
    if os.getpgrp() != os.getpid():  # setsid(2): the leader of a group may not
        os.setsid()


def open_group() -> None:
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


def lose_parent() -> None:
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(POLL_INTERVAL)


def go_deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def reset_mark() -> None:
    resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def set_own_limit() -> None:
    """Set the limit of the mark for oneself, as programs do that want to be scheduled in real time."""
    _, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
    resource.setrlimit(resource.RLIMIT_RTTIME, (OWN_LIMIT, hard))


def lead_inner_tree() -> None:
    """Take a mark of one's own, as the runner of a supervisor that is in the tree does, and keep that around it."""
    around, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
    resource.setrlimit(resource.RLIMIT_RTTIME, (MARK_FLAG | secrets.randbits(MARK_BITS), hard))
    resource.prlimit(0, RLIMIT_LOCKS, (around, hard))


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> NoReturn:
    os._exit(0)


def await_heir() -> None:
    """Start a successor in a session of its own when told to end."""

    def hand_over(_signum: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.fork():
            os._exit(0)
        os.setsid()

    signal.signal(signal.SIGTERM, hand_over)


def breed() -> None:
    """Go deaf, and start children in sessions of their own for a while."""
    go_deaf()
    for _ in range(BROOD):
        if os.fork() == 0:
            os.setsid()
            stay()
        time.sleep(BROOD_INTERVAL)


STEPS: dict[str, Callable[[], None]] = {
    "setsid": open_session,
    "setpgid": open_group,
    "orphan": lose_parent,
    "deaf": go_deaf,
    "reset": reset_mark,
    "limit": set_own_limit,
    "nest": lead_inner_tree,
}
ENDS: dict[str, Callable[[], None]] = {
    "stay": stay,
    "stop": stop,
    "exit": leave,
    "heir": await_heir,
    "breed": breed,
}


if __name__ == "__main__":
    live(json.loads(sys.argv[4]), Tree(sys.argv[1], sys.argv[2], int(sys.argv[3])))
