"""One process of a task's tree: `actor.py ROLE [NUMBER] COOKIE READY`.

The cookie is there to be seen on the command line. Every process writes its PID and a newline to the FIFO READY once it is
what its role says, and then stays until a signal ends it. Runs on any Python from 3.9 on, with the standard library alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Callable, NoReturn

SESSION_EVERY_LINKS = 10
SESSION_EVERY_CHILDREN = 3
BREEDING_INTERVAL = 0.05
BREEDING_BEFORE_READY = 3
HANDOVER_TIME = 2.0
"""Seconds that a runaway lives on beside its successor: who reads /proc on a busy machine must not miss all of them."""
FORK_INTERVAL = 0.005
"""Seconds that a forked child of a thread lives: with some threads one of them forks at any moment."""

COOKIE, READY = sys.argv[-2:]


def announce() -> None:
    with open(READY, "a") as ready:  # noqa: PTH123  # pathlib costs more to import than the whole actor
        ready.write(f"{os.getpid()}\n")


def stay() -> NoReturn:
    announce()
    pause_for_ever()


def pause_for_ever() -> NoReturn:
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
    # The kernel's own, for a group with stopped members whose last relative outside exits: setpgid(2).
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    announce()
    os.kill(os.getpid(), signal.SIGSTOP)
    pause_for_ever()


def be_daemon() -> NoReturn:
    detach()
    stay()


def detach() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def be_bare_daemon() -> NoReturn:
    detach()
    command = [sys.executable, "-I", "-S", __file__, "sleeper", COOKIE, READY]
    os.execve(sys.executable, command, {})  # noqa: S606  # no shell is needed


def be_breeder() -> NoReturn:
    """Be deaf, and start a detached child again and again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    children = 0
    while True:
        intermediate = os.fork()
        if intermediate == 0:
            detach()
            pause_for_ever()
        os.waitpid(intermediate, 0)
        children += 1
        if children == BREEDING_BEFORE_READY:
            announce()
        time.sleep(BREEDING_INTERVAL)


def be_runaway() -> NoReturn:
    """Be deaf, and replace oneself by a detached successor again and again, with both alive for a while."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    detach()
    announce()
    # Nobody could be sure to catch it: it ends when the test removes the FIFO.
    while os.path.exists(READY):  # noqa: PTH110  # see announce()
        time.sleep(BREEDING_INTERVAL)
        if os.fork():
            time.sleep(HANDOVER_TIME)
            os._exit(0)
        os.setsid()
    sys.exit()


def be_forking_threads(threads: int) -> NoReturn:
    """Be deaf, and have every thread replace its child, in a session of its own, again and again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    all_forked = threading.Barrier(threads + 1)

    def fork_children() -> None:
        waited = False
        while True:
            child = os.fork()
            if child == 0:
                os.setsid()
                pause_for_ever()
            if not waited:
                all_forked.wait()
                waited = True
            time.sleep(FORK_INTERVAL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    for _ in range(threads):
        threading.Thread(target=fork_children).start()
    all_forked.wait()
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
    "bare-daemon": be_bare_daemon,
    "breeder": be_breeder,
    "runaway": be_runaway,
    "forking-threads": be_forking_threads,
    "phoenix": be_phoenix,
    "chain": be_chain,
    "crowd": be_crowd,
}


if __name__ == "__main__":
    ROLES[sys.argv[1]](*map(int, sys.argv[2:-2]))
