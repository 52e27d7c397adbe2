"""The kinds of processes that tasks leave behind, one entry each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ACTOR = Path(__file__).with_name("actor.py")
NOT_ENDED_EVENT = "Processes of the task could not be ended"
"""What a supervisor writes there about those that it has killed, and that were not gone in the time that it may take."""


@dataclass(frozen=True)
class Shape:
    """What a task starts.

    `command` gets the cookie and the path of the FIFO as its last two arguments. `processes` counts those that announce
    themselves there, and stay.
    """

    name: str
    sentence: str
    command: tuple[str, ...]
    processes: int
    runner: str | None = None
    """What the runner itself does, by its name in RUNNERS of scenario.py: it starts its processes, or is deaf."""
    silent: int = 0
    """Processes that stay as well, but announce nothing."""
    unsteady: bool = False
    """Further processes come, or come and go."""
    moves: bool = False
    """The processes announced hand over to successors, and end."""
    outlasts_grace: bool = False
    """SIGTERM does not end it, so that ending it takes the whole grace period."""
    new_session: bool = False
    """The runner starts it in a session of its own."""
    holds_sockets: bool = False
    """It inherits every file descriptor of the runner, as a forked worker does, not only the standard three."""
    stops: bool = False
    """The first process stops itself, and is ready when it has."""
    piped: bool = False
    """The runner reads its output."""

    def argv(self, cookie: str, ready: Path) -> list[str]:
        """Return what the runner starts, nothing if it does so by other means."""
        return [*self.command, cookie, str(ready)] if self.command else []


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
    ),
    Shape("pipeline", "a shell pipeline", shell(PIPELINE), processes=3),
    Shape(
        "all-sockets",
        "a forked worker, which inherits every socket",
        actor("sleeper"),
        processes=1,
        holds_sockets=True,
    ),
    Shape(
        "nohup",
        "a background command whose parent is gone",
        shell('nohup "$@" >/dev/null 2>&1 &'),
        processes=1,
    ),
    Shape("plain", "a child without children", actor("sleeper"), processes=1),
    Shape(
        "pipeline-in-session",
        "a shell pipeline in its own session, as BashOperator starts it",
        shell(PIPELINE),
        processes=3,
        new_session=True,
    ),
    Shape("deaf", "a child that ignores SIGTERM", actor("deaf"), processes=1, outlasts_grace=True),
    Shape(
        "deaf-in-session",
        "a child that ignores SIGTERM, in its own session",
        actor("deaf"),
        processes=1,
        outlasts_grace=True,
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
        "stopped-in-session",
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

RARE_SHAPES = (
    Shape("piped", "a child whose output the task reads", actor("parent"), processes=2, piped=True),
    Shape("stopped", "a stopped child", actor("stopped"), processes=1, stops=True),
    Shape("bare-daemon", "a daemon with an emptied environment", actor("bare-daemon"), processes=1),
    Shape(
        "breeder",
        "a child that starts a detached one every 50 ms, all of them deaf",
        actor("breeder"),
        processes=1,
        unsteady=True,
        outlasts_grace=True,
    ),
    Shape(
        "runaway",
        "a deaf process that hands over to a detached successor every 50 ms",
        actor("runaway"),
        processes=1,
        unsteady=True,
        moves=True,
        outlasts_grace=True,
    ),
    Shape(
        "forking-threads",
        "a deaf child of 8 threads, one of which always forks",
        actor("forking-threads", 8),
        processes=1,
        unsteady=True,
        outlasts_grace=True,
    ),
    Shape(
        "all-sockets-detached",
        "a deaf child in its own session, which inherits every socket",
        actor("deaf"),
        processes=1,
        outlasts_grace=True,
        new_session=True,
        holds_sockets=True,
    ),
    Shape("pool-fork", "a pool of 8, forked", (), processes=8, runner="pool-fork"),
    # Besides the workers, spawn leaves a resource tracker, and forkserver a server, too.
    Shape("pool-spawn", "a pool of 8, spawned", (), processes=8, silent=1, runner="pool-spawn"),
    Shape(
        "pool-forkserver",
        "a pool of 8 with a fork server",
        (),
        processes=8,
        silent=2,
        runner="pool-forkserver",
    ),
    Shape(
        "deaf-runner",
        "a runner that ignores SIGTERM itself",
        actor("daemon"),
        processes=1,
        runner="deaf",
        outlasts_grace=True,
    ),
)

BY_NAME = {shape.name: shape for shape in (*SHAPES, *RARE_SHAPES)}
