"""The kinds of processes that tasks leave behind, one entry each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ACTOR = Path(__file__).with_name("actor.py")


@dataclass(frozen=True)
class Shape:
    """What a task starts.

    `command` gets the cookie and the path of the FIFO as its last two arguments, and every process that it starts announces
    itself there. `processes` counts those that stay.
    """

    name: str
    sentence: str
    command: tuple[str, ...]
    processes: int
    in_group: bool = False
    """One SIGTERM to the runner's process group ends it."""
    new_session: bool = False
    """The runner starts it in a session of its own."""
    holds_sockets: bool = False
    """It inherits every file descriptor of the runner, as a forked worker does, not only the standard three."""
    stops: bool = False
    """The first process stops itself, and is ready when it has."""

    def argv(self, cookie: str, ready: Path) -> list[str]:
        return [*self.command, cookie, str(ready)]


def actor(role: str, number: int | None = None) -> tuple[str, ...]:
    """Return the command of an actor; `python` is the environment's, for its `bin` leads PATH."""
    # Isolated and without site-packages an interpreter starts in a hundredth of a second.
    numbers = () if number is None else (str(number),)
    return ("python", "-I", "-S", str(ACTOR), role, *numbers)


def shell(script: str) -> tuple[str, ...]:
    """Return a bash command whose `"$@"` is a process that sleeps."""
    return ("bash", "-c", script, "bash", *actor("sleeper"))


ANNOUNCE = 'echo $$ >>"${@: -1}"'
PIPELINE = f'{ANNOUNCE}; "$@" | "$@"'

SHAPES = (
    Shape(
        "virtualenv",
        "a virtualenv's Python with a child of its own",
        actor("parent"),
        processes=2,
        in_group=True,
    ),
    Shape("pipeline", "a shell pipeline", shell(PIPELINE), processes=3, in_group=True),
    Shape(
        "all-sockets",
        "a forked worker, which inherits every socket",
        actor("sleeper"),
        processes=1,
        in_group=True,
        holds_sockets=True,
    ),
    Shape(
        "nohup",
        "a background command whose parent is gone",
        shell('nohup "$@" >/dev/null 2>&1 &'),
        processes=1,
        in_group=True,
    ),
    Shape("plain", "a child without children", actor("sleeper"), processes=1, in_group=True),
    Shape(
        "pipeline-in-session",
        "a shell pipeline in its own session, as BashOperator starts it",
        shell(PIPELINE),
        processes=3,
        new_session=True,
    ),
    Shape("deaf", "a child that ignores SIGTERM", actor("deaf"), processes=1),
    Shape(
        "deaf-in-session",
        "a child that ignores SIGTERM, in its own session",
        actor("deaf"),
        processes=1,
        new_session=True,
    ),
    Shape(
        "job-control",
        "a shell with job control, which puts its job in a group of its own",
        shell(f'set -m; "$@" & {ANNOUNCE}; wait'),
        processes=2,
    ),
    Shape("daemon", "a daemon, forked twice", actor("daemon"), processes=1),
    Shape(
        "stopped",
        "a stopped child in its own session",
        actor("stopped"),
        processes=1,
        new_session=True,
        stops=True,
    ),
    Shape("phoenix", "a child that starts a detached successor on SIGTERM", actor("phoenix"), processes=1),
    Shape("chain", "a chain of 40 that changes its session every 10", actor("chain", 40), processes=41),
    Shape("crowd", "300 children, every third in its own session", actor("crowd", 300), processes=301),
)

BY_NAME = {shape.name: shape for shape in SHAPES}
