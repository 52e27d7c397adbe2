"""Strangers that take the numbers of processes which have gone, in a PID namespace where nobody else does.

Runs in the driver's interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NoReturn

from tests.random_trees.member import stay

if TYPE_CHECKING:
    from collections.abc import Iterable

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
PR_SET_PDEATHSIG = 1
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
RETRY_INTERVAL = 0.02
"""Seconds; a session or a group may hold a number that no process has any more."""
REASON_MAX_BYTES = 1 << 12


def find_refusal() -> str | None:
    """Return why there can be no namespace with numbers of our choice, None if there can."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            enter_namespace()
            choose_next(os.getpid() + 1)
            code = 0
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    reason = os.read(reader, REASON_MAX_BYTES).decode()
    os.close(reader)
    return (reason or "it cannot be entered") if status else None


def enter_namespace() -> None:
    """Go on as a process, but not the first one, of a PID namespace with a /proc of its own (pid_namespaces(7)).

    Raises OSError if that is refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID))
    end_with(os.fork())
    # All of the namespace ends with its first process.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"proc", b"/proc", b"proc", 0, None))
    end_with(os.fork())


def check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def end_with(child: int) -> None:
    """Return in the child; in its parent collect whoever ends, until the child has."""
    while child:
        pid, status = os.wait()
        if pid == child:
            os._exit(1 if status else 0)


def choose_next(number: int) -> None:
    """Have the next process get this number, if it is free (proc_sys_kernel(5))."""
    LAST_PID.write_text(str(number - 1))


class Strangers:
    """Processes that have nothing to do with a task, each in a session of its own."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._taken: set[int] = set()
        self._retry_at: dict[int, float] = {}

    def take(self, numbers: Iterable[int], *, may_exit: bool = True) -> None:
        """Have a stranger take each of the numbers that is free.

        `may_exit`: those of even numbers leave the session to another process, as daemon(3) does.
        """
        free = {number for number in numbers if number not in self._taken and is_free(number)}
        now = time.monotonic()
        for number in sorted(free):
            if number not in self._taken and now >= self._retry_at.get(number, 0):
                self._retry_at[number] = now + RETRY_INTERVAL
                self._try_to_take(number, free - self._taken, may_exit=may_exit)

    def _try_to_take(self, number: int, free: set[int], *, may_exit: bool) -> None:
        choose_next(number)
        stranger = os.fork()
        if stranger == 0:
            if os.getpid() not in free:
                os._exit(0)
            self._be_stranger(may_exit=may_exit)
        if stranger in free:
            self._taken.add(stranger)
        if stranger not in free or (may_exit and is_even(stranger)):
            # One that was stopped is seen to be harmed.
            os.waitpid(stranger, os.WUNTRACED)

    def _be_stranger(self, *, may_exit: bool) -> NoReturn:
        try:
            number = os.getpid()
            Path("/proc/self/comm").write_text("stranger")
            os.setsid()
            if os.fork() == 0:
                self._announce(f"a stranger in the session {number}")
            elif may_exit and is_even(number):
                os._exit(0)
            else:
                self._announce(f"the stranger {number}")
            stay()
        finally:
            os._exit(1)


def is_even(number: int) -> bool:
    return number % 2 == 0


def is_free(number: int) -> bool:
    """Whether no process has a number. One that has ended, and was left to us, is collected, as init would."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(number, os.WNOHANG)
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False
