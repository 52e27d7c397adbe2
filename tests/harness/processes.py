"""Find and end processes that carry a cookie on their command line."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

KILL_TIMEOUT = 5.0
"""Seconds that a killed process gets to disappear."""


class Process(NamedTuple):
    """A process found by its cookie."""

    pid: int
    name: str


def find_marked(cookie: str) -> list[Process]:
    """Return the processes alive that have `cookie` among their arguments; a zombie has no arguments any more."""
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [Process(pid, read_name(pid)) for pid in pids if is_marked(pid, cookie)]


def is_marked(pid: int, cookie: str) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return cookie.encode() in arguments


def read_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def open_pidfds(processes: list[Process]) -> list[int]:
    pidfds = []
    for process in processes:
        with suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(process.pid))
    return pidfds


def wait_for_exit(processes: list[Process], timeout: float) -> None:
    """Return when all have exited, reaped or not, or after `timeout` seconds."""
    pidfds = open_pidfds(processes)
    deadline = time.monotonic() + timeout
    try:
        for pidfd in pidfds:
            end = select.poll()  # select() takes no descriptor above 1023
            end.register(pidfd, select.POLLIN)
            end.poll(max(0, deadline - time.monotonic()) * 1000)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def kill_marked(cookie: str) -> None:
    """Kill every process that has `cookie` among its arguments, and those that they start meanwhile.

    Raises TimeoutError when some are still there after KILL_TIMEOUT seconds.
    """
    deadline = time.monotonic() + KILL_TIMEOUT
    while found := find_marked(cookie):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still alive after SIGKILL: {found}")
        for process in found:
            kill_if_marked(process.pid, cookie)
        wait_for_exit(found, deadline - time.monotonic())


def kill_if_marked(pid: int, cookie: str) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The number may have been given to somebody else before the pidfd was opened, but not after.
        if is_marked(pid, cookie):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
