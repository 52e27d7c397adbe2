# Licensed to the Apache Software Foundation (ASF) under one
# or more contributor license agreements.  See the NOTICE file
# distributed with this work for additional information
# regarding copyright ownership.  The ASF licenses this file
# to you under the Apache License, Version 2.0 (the
# "License"); you may not use this file except in compliance
# with the License.  You may obtain a copy of the License at
#
#   http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing,
# software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied.  See the License for the
# specific language governing permissions and limitations
# under the License.
"""
One process, as the kernel shows it and lets us signal it.

Where ``/proc`` hides a process of our own user (hidepid=1), the kernel still reports its session, its limits and
whether it is alive, but not its parent.

Imports nothing of Airflow.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable


PROC = "/proc"

DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

STAT_MAX_BYTES = 4096

STAT_TRIES = 10
"""How often a process is read again that has no thread."""

NAME_MAX_BYTES = 15
"""The kernel keeps this much of the name of a program (prctl(2), PR_SET_NAME)."""

HIDDEN_NAME = "?"

TRANSIENT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""A look that fails with one of these may succeed soon: other threads or processes may free the resource."""


@dataclass(frozen=True)
class Process:
    """A process, identified by its PID and its start time."""

    pid: int
    start: float
    """
    Clock ticks since boot (proc_pid_stat(5)); without /proc, psutil's creation time.

    Where /proc hides it, less than 0: its inode number there, negated. The next process with the same PID
    gets another number. The kernel may drop the inode if memory is short, and the start becomes readable
    after an exec. The process then counts as another one, and the next look finds it again.
    """
    name: str = field(compare=False)
    parent: int = field(compare=False)
    session: int = field(compare=False)
    stopped: bool = field(compare=False)
    dead: bool = field(compare=False)
    """It is a zombie, whether or not its parent is going to reap it."""


OLDER = Process(0, start=0, name="", parent=0, session=0, stopped=False, dead=True)
"""Stands for any process that is too old to belong to the tree."""


def is_own_proc() -> bool:
    """Whether /proc, if there is one, belongs to our PID namespace (pid_namespaces(7))."""
    try:
        return os.readlink(f"{PROC}/self") == str(os.getpid())
    except FileNotFoundError:
        return True


def is_in_own_namespace(pid: int) -> bool:
    """Whether a process is in our PID namespace, and not in one below it, where PIDs mean other processes."""
    try:
        lines = read_entry(pid, "status").splitlines()
    except OSError:  # closed to us (hidepid), or gone
        return True
    numbers = next((line for line in lines if line.startswith("NSpid:")), "")
    return len(numbers.split()) <= len(("NSpid:", pid))


def read_entry(pid: int, name: str) -> str:
    """
    Return a file of a process in /proc.

    :raises OSError: if it is closed to us, or the process is gone.
    """
    # A process may give itself any name.
    with open(f"{PROC}/{pid}/{name}", errors="replace") as file:
        return file.read()


def list_pids() -> list[tuple[int, int | None]]:
    """
    Return the PIDs that we may see, each with an identity that changes on reuse (None if unknown).

    The identity is the inode number. The kernel makes an inode for a process when it is first looked up, and
    drops it when the process is reaped (proc_flush_pid(), Linux 5.6). So a listing alone recognises processes
    that were read before.

    :raises OSError: if /proc is there, but cannot be listed because a file descriptor or memory is lacking.
    """
    try:
        # Read it to its end, and close it: its descriptor may be the last one, which look_at() needs.
        with os.scandir(PROC) as entries:
            return [(int(entry.name), entry.inode()) for entry in entries if entry.name.isdigit()]
    except FileNotFoundError:
        return [(pid, None) for pid in psutil.pids()]


def read_process(pid: int) -> Process | None:
    """Return the process, None if it is dead, a zombie, or hidden from us; raises as :func:`look_at` does."""
    process = look_at(pid)
    return None if process is None or process.dead else process


def read_self() -> Process | None:
    """Return this process, read once: just after a fork the kernel takes a millisecond to read it."""
    return _read_once(os.getpid())


_read_once = functools.lru_cache(maxsize=1)(read_process)

if hasattr(os, "register_at_fork"):
    # A forked child may get the number that was read: in another PID namespace, or when the process is gone.
    os.register_at_fork(after_in_child=_read_once.cache_clear)


def read_own_start() -> float:
    """Return when this process started; all its children are younger. 0 if that is unknown."""
    own = read_self()
    return own.start if own else 0


def look_at(pid: int, *, since: float = 0) -> Process | None:
    """
    Return the process, even a zombie; None if there is none, or if it is hidden from us.

    :param since: for a process that started earlier than this, return OLDER and skip the rest of the parsing
        (a third of the cost). A busy machine has thousands of them.
    :raises OSError: if a file descriptor or memory is lacking.
    """
    try:
        name, state, parent, session, *others = _read_stat(pid)
        for _ in range(STAT_TRIES):
            if int(others[13]):
                break
            # It is gone, or a thread other than its first is calling execve(): then it looks so for a moment.
            name, state, parent, session, *others = _read_stat(pid)
    except (FileNotFoundError, NotADirectoryError):
        return None if os.path.exists(f"{PROC}/self/stat") else _ask_psutil(pid, since)
    except ProcessLookupError:  # gone between open and read
        return None
    except PermissionError:
        return _ask_kernel(pid)
    start = int(others[15])
    if start < since:
        return OLDER
    return Process(
        pid,
        start=start,
        name=name.decode(errors="replace"),
        parent=int(parent),
        session=int(session),
        stopped=state in b"Tt",
        # A process whose first thread has ended looks like a zombie as long as the others run.
        dead=state in b"ZXx" and int(others[13]) <= 1,
    )


def _read_stat(pid: int) -> list[bytes]:
    """Return the name, state, parent, session and the fields from the seventh on of /proc/PID/stat."""
    stat = _read_file(f"{PROC}/{pid}/stat")
    # The name may contain anything, even parentheses and spaces.
    name, _, rest = stat.partition(b"(")[2].rpartition(b")")
    state, parent, _, session, *others = rest.split(None, 21)
    return [name, state, parent, session, *others]


def _read_file(path: str) -> bytes:
    """Return a small file, at a third of the cost of open(): a look reads one for each process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, STAT_MAX_BYTES)
    finally:
        os.close(descriptor)


def _ask_kernel(pid: int) -> Process | None:
    """
    Return a process of our own user whose entry in /proc is closed to us; None if it is another user's.

    Where /proc is mounted with hidepid=1, the entries of processes that are not dumpable (prctl(2)) are
    closed. A supervisor of SDK 1.2 or later makes itself one, and with it the processes that it forks. For
    the calls below the kernel checks only the user.
    """
    try:
        resource.prlimit(pid, resource.RLIMIT_RTTIME)
        return Process(
            pid,
            start=-os.stat(f"{PROC}/{pid}").st_ino,
            name=HIDDEN_NAME,
            parent=0,
            session=os.getsid(pid),
            # It is unknown, so do not wait for the process to stop.
            stopped=True,
            dead=is_zombie_or_gone(pid),
        )
    except AttributeError:  # no such call, or no such limit
        return None
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return None


def is_zombie_or_gone(pid: int) -> bool:
    """Whether a process is a zombie, or gone; False where only /proc could say so."""
    try:
        pidfd = os.pidfd_open(pid)
    except AttributeError:
        return False
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return (
            error.errno == errno.ESRCH
        )  # otherwise older than Linux 5.3, or a sandbox that does not know the call
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(pidfd)


def _ask_psutil(pid: int, since: float) -> Process | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.create_time() < since:
                return OLDER
            status = process.status()
            return Process(
                pid,
                start=process.create_time(),
                name=process.name(),
                parent=process.ppid(),
                session=os.getsid(pid),
                stopped=status in STOPPED,
                dead=status in DEAD,
            )
    except (psutil.Error, OSError):
        return None


def is_alive(process: Process) -> bool:
    """Whether this process, and no other with its PID, still runs; True if that is unknown."""
    try:
        now = read_process(process.pid)
    except OSError:
        return True
    return now is not None and now.start == process.start


def is_there(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def find_session(pid: int) -> int:
    """Return the session that a process is in, 0 if it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def find_group(pid: int) -> int | None:
    """Return the process group that a process is in, None if it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def shorten_name(name: str) -> str:
    """Return as much of a program's name as the kernel keeps."""
    return os.fsencode(name)[:NAME_MAX_BYTES].decode(errors="replace")


def send_signals(process: Process, signals: Iterable[int]) -> bool | None:
    """Signal a process; None if it has ended, and another may have its PID, False if that is not allowed."""
    pidfd = None
    with contextlib.suppress(AttributeError, OSError):  # no pidfd, none left, or the process is gone
        pidfd = os.pidfd_open(process.pid)
    try:
        # With a pidfd, a process that passes this check is the one that is signalled. Without one, the PID
        # may still be reused between the check and the signal, which is unlikely.
        if not is_alive(process):
            return None
        for sig in signals:
            if pidfd is None:
                os.kill(process.pid, sig)
            else:
                signal.pidfd_send_signal(pidfd, sig)
    except ProcessLookupError:
        return None
    except PermissionError:
        return False
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return True
