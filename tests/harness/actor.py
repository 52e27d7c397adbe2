"""One process of a task's tree: `actor.py ROLE [NUMBER] COOKIE READY`.

The cookie is there to be seen on the command line. Every process writes its PID and a newline to the FIFO READY once it is
what its role says, and then stays until a signal ends it. Runs on any Python from 3.9 on, with the standard library alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Callable, NoReturn

SESSION_EVERY_LINKS = 10
SESSION_EVERY_CHILDREN = 3

COOKIE, READY = sys.argv[-2:]


def announce() -> None:
    with open(READY, "a") as ready:  # noqa: PTH123  # pathlib costs more to import than the whole actor
        ready.write(f"{os.getpid()}\n")


def stay() -> NoReturn:
    announce()
    while True:
        signal.pause()


def start_sleeper(*, new_session: bool = False) -> None:
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, "sleeper", COOKIE, READY], start_new_session=new_session
    )


def be_sleeper() -> NoReturn:
    stay()


def be_parent() -> NoReturn:
    start_sleeper()
    stay()


def be_deaf() -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stay()


def be_stopped() -> NoReturn:
    announce()
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        signal.pause()


def be_daemon() -> NoReturn:
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    stay()


def be_phoenix() -> NoReturn:
    """Start a successor out of reach when told to end."""

    def hand_over(_signum: int, _frame: object) -> NoReturn:
        start_sleeper(new_session=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, hand_over)
    stay()


def be_chain(links: int) -> NoReturn:
    for link in range(1, links + 1):
        if os.fork():
            stay()
        if link % SESSION_EVERY_LINKS == 1:
            os.setsid()
    stay()


def be_crowd(children: int) -> NoReturn:
    for child in range(children):
        if os.fork() == 0:
            if child % SESSION_EVERY_CHILDREN == 0:
                os.setsid()
            stay()
    stay()


ROLES: dict[str, Callable[..., NoReturn]] = {
    "sleeper": be_sleeper,
    "parent": be_parent,
    "deaf": be_deaf,
    "stopped": be_stopped,
    "daemon": be_daemon,
    "phoenix": be_phoenix,
    "chain": be_chain,
    "crowd": be_crowd,
}


if __name__ == "__main__":
    ROLES[sys.argv[1]](*map(int, sys.argv[2:-2]))
