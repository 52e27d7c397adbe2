"""Large trees of processes, held by pidfd."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from patches.errors import PatchError
from tests.harness.processes import kill_marked
from tests.harness.shapes import ACTOR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_TIMEOUT = 60.0
ANNOUNCEMENTS_MAX_BYTES = 1 << 16
OTHER_FILES = 256


class TreeFailedError(PatchError):
    """The tree did not come up."""


@dataclass(frozen=True)
class Tree:
    """A root and its children, every third of which is in a session of its own."""

    root: int
    size: int
    ends: select.epoll
    """Tells each death once."""

    def wait(self, timeout: float) -> tuple[float, int]:
        """Return when the last one of those that end within `timeout` seconds did, and how many are left."""
        last_death = time.monotonic()
        deadline = last_death + timeout
        left = self.size
        while left and (ended := self.ends.poll(max(0, deadline - time.monotonic()), left)):
            last_death = time.monotonic()
            left -= len(ended)
        return last_death, left


@contextmanager
def start_tree(size: int, wrapper: Sequence[str] = ()) -> Iterator[Tree]:
    """Start a tree of `size` processes, its root by way of the command `wrapper`; end what is left of it."""
    with start_processes(size, wrapper) as pids, select.epoll() as ends, ExitStack() as stack:
        for pid in pids:
            ends.register(hold(stack, pid), select.EPOLLIN | select.EPOLLONESHOT)
        yield Tree(pids[0], size, ends)


@contextmanager
def start_processes(size: int, wrapper: Sequence[str] = ()) -> Iterator[list[int]]:
    """Do the same, and give the PIDs alone, the root's first."""
    cookie = f"cookie-{uuid.uuid4().hex}"
    with ExitStack() as stack:
        ready = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / "ready"
        os.mkfifo(ready)
        # Open at both ends: no writer waits for a reader, and the first to close is not the end of the file.
        announcements = stack.enter_context(ready.open("rb+", buffering=0))
        actor = [sys.executable, "-I", "-S", str(ACTOR), "crowd", str(size - 1), cookie, str(ready)]
        root = subprocess.Popen([*wrapper, *actor], stdin=subprocess.DEVNULL, start_new_session=True)
        stack.callback(root.wait)
        stack.callback(kill_marked, cookie)
        yield sorted(read_pids(announcements, size), key=lambda pid: pid != root.pid)


def read_pids(announcements: IO[bytes], size: int) -> list[int]:
    """Return the PIDs of a tree when all have announced themselves."""
    deadline = time.monotonic() + START_TIMEOUT
    text = b""
    while (ready := text.count(b"\n")) < size:
        if not select.select([announcements], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TreeFailedError(f"{ready} of {size} processes after {START_TIMEOUT:.0f} s")
        text += announcements.read(ANNOUNCEMENTS_MAX_BYTES)
    return [int(line) for line in text.split()]


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
