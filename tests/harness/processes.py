"""Find and end processes by a cookie on their command line or in their environment, or by the folder they work in."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COOKIE_VARIABLE = "SUPERVISED_BY_A_TEST"
"""Carries the cookie where the command line is not ours to choose: multiprocessing spawns its processes."""

PR_SET_CHILD_SUBREAPER = 36

KILL_TIMEOUT = 60.0
"""Seconds that a killed process gets to disappear; a crowd on a busy machine needs some."""


PROCESSES_NEEDED = 1500
"""How many processes and threads there are at a time where tests start crowds."""

PIDS_MAX = Path("/sys/fs/cgroup/pids.max")


DEAD = {"Z", "X", "gone"}
"""What `read_state` returns for a process that does nothing any more."""


class Process(NamedTuple):
    """A process found by its cookie."""

    pid: int
    name: str


@contextmanager
def make_cookie() -> Iterator[str]:
    """Yield a new cookie; whoever carries it in the end is killed."""
    cookie = f"cookie-{uuid.uuid4().hex}"
    try:
        yield cookie
    finally:
        kill_marked(cookie)


def find_marked(cookie: str) -> list[Process]:
    """Return the processes alive that carry `cookie`; a zombie has neither arguments nor variables any more."""
    return find_processes(lambda pid: is_marked(pid, cookie))


def find_processes(belongs: Callable[[int], bool]) -> list[Process]:
    """Return the processes of which this is true."""
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [Process(pid, read_name(pid)) for pid in pids if belongs(pid)]


def is_marked(pid: int, cookie: str) -> bool:
    variable = f"{COOKIE_VARIABLE}={cookie}".encode()
    return cookie.encode() in read_strings(pid, "cmdline") or variable in read_strings(pid, "environ")


def read_strings(pid: int, name: str) -> list[bytes]:
    """Return a list of strings in /proc, which is empty for a process that is gone, and for an environment not ours to read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def read_state(pid: int) -> str:
    """Return the letter of proc_pid_stat(5) for what a process does, or "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def read_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def find_lack_of_processes() -> str | None:
    """Return why tests cannot start crowds, None if they can."""
    limits = [] if os.geteuid() == 0 else [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    with suppress(OSError, ValueError):  # not a container, or "max"
        limits.append(int(PIDS_MAX.read_text()))
    lacking = [limit for limit in limits if resource.RLIM_INFINITY != limit < PROCESSES_NEEDED]
    return f"{PROCESSES_NEEDED} processes are needed, and {min(lacking)} are allowed" if lacking else None


def set_subreaper(*, wanted: bool) -> None:
    """Have orphans below this process become its children, or init's again: PR_SET_CHILD_SUBREAPER of prctl(2)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def open_pidfds(processes: list[Process]) -> list[int]:
    pidfds = []
    for process in processes:
        with suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(process.pid))
    return pidfds


def wait_for_exit(processes: list[Process], timeout: float) -> bool:
    """Return when all have exited, reaped or not, or after `timeout` seconds; tell whether they have."""
    pidfds = open_pidfds(processes)
    deadline = time.monotonic() + timeout
    try:
        return all(wait_readable(pidfd, deadline) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def wait_readable(descriptor: int, deadline: float) -> bool:
    readable = select.poll()  # select() takes no descriptor above 1023
    readable.register(descriptor, select.POLLIN)
    return bool(readable.poll(max(0, deadline - time.monotonic()) * 1000))


def has_exited(pidfd: int) -> bool:
    return wait_readable(pidfd, time.monotonic())


def kill_marked(cookie: str) -> None:
    """Kill every process that carries `cookie`, and those that they start meanwhile.

    Raises TimeoutError when some are still there after KILL_TIMEOUT seconds.
    """
    kill_all(lambda pid: is_marked(pid, cookie))


def kill_inside(folder: Path) -> None:
    """Kill every process whose working directory is in `folder`, and those that they start meanwhile.

    Raises TimeoutError when some are still there after KILL_TIMEOUT seconds.
    """
    kill_all(lambda pid: is_inside(pid, folder))


def is_inside(pid: int, folder: Path) -> bool:
    try:
        # readlink, for the directory may have been removed.
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def kill_all(belongs: Callable[[int], bool]) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT
    while found := find_processes(belongs):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still alive after SIGKILL: {found}")
        for process in found:
            kill_if(belongs, process.pid)
        wait_for_exit(found, deadline - time.monotonic())


def kill_if(belongs: Callable[[int], bool], pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The number may have been given to somebody else before the pidfd was opened, but not after.
        if belongs(pid):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
