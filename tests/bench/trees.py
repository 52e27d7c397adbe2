"""Large trees of processes, held by pidfd."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from patches.errors import PatchError
from tests.harness.processes import make_cookie
from tests.harness.shapes import ACTOR, Shape, actor
from tests.harness.supervised import ANNOUNCEMENTS_MAX_BYTES, start_supervised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.environments import Environment

START_TIMEOUT = 60.0
OTHER_FILES = 256


class TreeFailedError(PatchError):
    """The tree did not come up."""


@dataclass(frozen=True)
class Tree:
    """A task's process, and children of a child of its, every third of which is in a session of its own."""

    root: int
    pids: list[int]
    """All of them."""
    ends: select.epoll
    """Tells each death once."""

    def wait(self, timeout: float) -> tuple[float, int]:
        """Return when the last one of those that end within `timeout` seconds did, and how many are left."""
        last_death = time.monotonic()
        deadline = last_death + timeout
        left = len(self.pids)
        while left and (ended := self.ends.poll(max(0, deadline - time.monotonic()), left)):
            last_death = time.monotonic()
            left -= len(ended)
        return last_death, left


@contextmanager
def start_task(environment: Environment, size: int) -> Iterator[Tree]:
    """Start a tree as a task, and stop its supervisor, so that somebody else can end it; end what is left of it."""
    with ExitStack() as stack:
        supervisor = stack.enter_context(start_supervised(environment, describe_tree(size), "409"))
        os.kill(supervisor.process.pid, signal.SIGSTOP)
        ends = stack.enter_context(select.epoll())
        for pid in supervisor.announced:
            ends.register(hold(stack, pid), select.EPOLLIN | select.EPOLLONESHOT)
        yield Tree(supervisor.runner, supervisor.announced, ends)


def describe_tree(size: int) -> Shape:
    """Return a shape that makes `size` processes, the runner included."""
    return Shape("tree", "a large tree", actor("crowd", size - 2), processes=size - 1)


@contextmanager
def start_processes(size: int) -> Iterator[None]:
    """Start a tree that is no task's; end it."""
    with ExitStack() as stack:
        cookie = stack.enter_context(make_cookie())
        ready = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / "ready"
        os.mkfifo(ready)
        # Open at both ends: no writer waits for a reader, and the first to close is not the end of the file.
        announcements = stack.enter_context(ready.open("rb+", buffering=0))
        command = [sys.executable, "-I", "-S", str(ACTOR), "crowd", str(size - 1), cookie, str(ready)]
        root = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        stack.callback(root.wait)
        stack.callback(root.kill)
        wait_for_announcements(announcements, size)
        yield


def wait_for_announcements(announcements: IO[bytes], size: int) -> None:
    """Return when so many processes have announced themselves."""
    deadline = time.monotonic() + START_TIMEOUT
    ready = 0
    while ready < size:
        if not select.select([announcements], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TreeFailedError(f"{ready} of {size} processes after {START_TIMEOUT:.0f} s")
        ready += announcements.read(ANNOUNCEMENTS_MAX_BYTES).count(b"\n")


def hold(stack: ExitStack, pid: int) -> int:
    pidfd = os.pidfd_open(pid)
    stack.callback(os.close, pidfd)
    return pidfd


def allow_pidfds(number: int) -> None:
    """Have this process's own limit on open files be high enough for as many pidfds at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + OTHER_FILES
    if resource.RLIM_INFINITY not in (soft, hard) and hard < wanted:
        raise TreeFailedError(f"{wanted} open files are needed, and only {hard} allowed: raise `ulimit -Hn`.")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
