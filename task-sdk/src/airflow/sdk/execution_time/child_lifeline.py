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
Have a runner notice that its supervisor has died.

Nobody is left then who could stop the task: it runs on beside the retry that the server starts when heartbeats fail.
So the kernel sends the runner a real-time signal when its parent ends (prctl(2), PR_SET_PDEATHSIG). The handler has
the watchdog executed (child_watchdog), which ends the task as the supervisor would have: ``on_kill`` runs, and what
is left of the tree when the grace is over is killed. While the supervisor lives nothing runs and nothing is open.

The sockets of a dying supervisor close before the kernel signals its end. A task that fails for that, as one that prints
does, waits for the signal: ``on_kill`` would not run, and what a runner has started that is gone by then would stay.

Python runs the handler between two instructions of the main thread. While that is in C code that does not return, and
while the runner is stopped, nothing happens; child_sweep finds these.

Nothing here imports Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from airflow.sdk.execution_time import child_watchdog
from airflow.sdk.execution_time.child_orphan import ORPHAN_GRACE
from airflow.sdk.execution_time.child_policy import (
    find_leftover_policy,
    find_spared_names,
    without_warnings,
)
from airflow.sdk.execution_time.child_tree import is_there, look_at, read_limits, read_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from configparser import ConfigParser

__all__ = ["await_death", "follow_spawner", "follow_supervisor", "run_to_death"]

PR_SET_PDEATHSIG = 1

DEATH_SIGNAL: int | None = signal.SIGRTMAX - 5 if hasattr(signal, "SIGRTMAX") else None
"""A real-time signal, which nobody else sends; one that comes all the same finds the supervisor alive."""

CREDENTIALS = struct.Struct("3i")
"""``struct ucred`` (unix(7)): PID, uid and gid."""

COMMS = 0
"""The descriptor over which the runner asks its supervisor."""

DEATH_TIME = 2.0
"""Seconds that a supervisor whose sockets close may take to die, on a machine that is busy."""

POLL_INTERVAL = 0.01
"""Seconds between looks at a dying supervisor."""

INTERRUPTING = (*child_watchdog.IGNORED, signal.SIGALRM)
"""Signals whose handlers may raise, which would keep the watchdog from being started."""

WATCHDOG_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""All that the watchdog needs of an environment, which may hold secrets, and can be read as long as it runs."""

RUNNER_FAILED = 124
"""Exit status of a runner that could not begin, as upstream has it."""


class Lifeline:
    """What a runner knows of its supervisor."""

    def __init__(self, supervisor: int, conf: ConfigParser) -> None:
        self._supervisor = supervisor
        self._conf = conf
        self._runner = os.getpid()
        self._noticed = False
        self._sockets: list[tuple[int, int]] = []

    @property
    def is_own(self) -> bool:
        """Whether this process is the runner, and no copy of it."""
        return os.getpid() == self._runner

    @property
    def is_cut(self) -> bool:
        """Whether the supervisor is gone. The signal comes also when only the thread ends that has forked the runner."""
        return os.getppid() != self._supervisor

    def note_sockets(self, descriptors: Iterable[int]) -> None:
        """Note the runner's own sockets, by descriptor and inode; it inherits those of other tasks of its supervisor."""
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                status = os.fstat(descriptor)
                if stat.S_ISSOCK(status.st_mode):
                    self._sockets.append((descriptor, status.st_ino))

    @property
    def is_weakening(self) -> bool:
        """Whether the supervisor has closed a socket; one that dies closes all of them, one after the other."""
        return any(has_hung_up(descriptor, inode) for descriptor, inode in self._sockets)

    def handle(self, _signum: int, _frame: object) -> None:
        """Handle the signal that the parent has ended."""
        if self.is_own and self.is_cut:
            self.notice()

    def notice(self) -> None:
        """Have the watchdog started, once."""
        if self._noticed:
            return
        former = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING)
        try:
            self._noticed = True
            # No /proc, or no descriptor: what the task says matters less than its end.
            with contextlib.suppress(Exception):
                leave_sockets(self._supervisor)
            try:
                watchdog = start_watchdog(describe(self._conf))
                threading.Thread(target=replace_watchdog, args=(watchdog,), daemon=True).start()
            except Exception:  # whatever it is, the task has to be told
                os.kill(self._runner, signal.SIGTERM)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


_lifeline: Lifeline | None = None
"""Of this process, if it is a runner."""


def follow_supervisor(supervisor: int, conf: ConfigParser) -> None:
    """
    Have this process, a runner, end when its supervisor does; to be called before it starts anything.

    :param supervisor: its PID. If it is gone already, so is this process.
    :param conf: Airflow's configuration.
    """
    global _lifeline
    lifeline = Lifeline(supervisor, conf)
    if ask_for_signal(lifeline):
        _lifeline = lifeline
        if lifeline.is_cut:
            os._exit(RUNNER_FAILED)


def follow_spawner(comms: socket.socket, conf: ConfigParser) -> None:
    """
    Do so in a new interpreter, if this is a runner; the dag processor's and the triggerer's lead no session.

    :param comms: one of the sockets that the supervisor has made, by which alone it is known here.
    """
    is_known = _lifeline is not None and _lifeline.is_own
    if not is_known and os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError, AttributeError):  # no such option (macOS), or no such process
            supervisor = find_creator(comms)
            # gVisor answers with who asks, and an interpreter may be started by a program of its own.
            if supervisor == os.getppid() or not is_there(supervisor):
                follow_supervisor(supervisor, conf)


def run_to_death(target: Callable[[], Any], log_descriptor: int) -> None:
    """
    Run what a process is for, and have it not end before its supervisor does, if that is a runner's and is dying.

    :param log_descriptor: the socket of its log; the others are its standard streams.
    """
    if _lifeline is not None and _lifeline.is_own:
        _lifeline.note_sockets({0, 1, 2, log_descriptor})
    try:
        target()
    finally:
        await_death()


def await_death() -> bool:
    """Wait until a supervisor that is dying is dead, and notice; False if it lives, or this is no runner."""
    lifeline = _lifeline
    if lifeline is None or not lifeline.is_own:
        return False
    deadline = time.monotonic() + DEATH_TIME
    while not lifeline.is_cut and lifeline.is_weakening and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)
    if lifeline.is_cut:
        lifeline.notice()
        return True
    return False


def has_hung_up(descriptor: int, inode: int) -> bool:
    """Whether the other end of a socket is closed; False if the descriptor is another file's by now."""
    try:
        if os.fstat(descriptor).st_ino != inode:
            return False
    except OSError:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def ask_for_signal(lifeline: Lifeline) -> bool:
    """Have the kernel signal the end of the parent; False where it cannot."""
    if DEATH_SIGNAL is None or not sys.platform.startswith("linux"):
        return False
    try:
        # An interpreter may have been built without it.
        ctypes = importlib.import_module("ctypes")
        signal.signal(DEATH_SIGNAL, lifeline.handle)
        return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, DEATH_SIGNAL, 0, 0, 0) == 0)
    except Exception:  # a task has to start without it, too
        return False


def find_creator(sock: socket.socket) -> int:
    """Return the PID of the process that has made a pair of sockets, as one end tells it (unix(7), SO_PEERCRED)."""
    pid, *_ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(pid)


def leave_sockets(supervisor: int) -> None:
    """
    Have what this process says to its dead supervisor go nowhere: a print in ``on_kill`` would raise, or wait for ever.

    The other ends may be open in processes that were forked meanwhile.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for sock in list_sockets_of(supervisor):
        # Whoever waits at one wakes up.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        if sock.fileno() != COMMS:
            os.dup2(nowhere, sock.fileno(), inheritable=sock.fileno() in (1, 2))
    os.close(nowhere)


def list_sockets_of(creator: int) -> Iterator[socket.socket]:
    """Yield the sockets that a process has made, which stay open."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, struct.error):  # no socket, or closed meanwhile
            # With a default timeout set, the socket would be made non-blocking, whoever's it is.
            blocking = os.get_blocking(int(name))
            sock = socket.socket(fileno=int(name))
            try:
                os.set_blocking(int(name), blocking)
                if sock.family == socket.AF_UNIX and find_creator(sock) == creator:
                    yield sock
            finally:
                sock.detach()


def start_watchdog(order: dict[str, Any]) -> int:
    """
    Start what ends this process, a runner, and all that it has started; return its PID.

    :raises OSError: if that cannot be had.
    """
    try:
        return execute_watchdog(order)
    except (OSError, TypeError, ValueError):
        # The interpreter is not known, or gone, or not for this user to execute. A copy of this process needs none.
        return fork_watchdog(order)


def replace_watchdog(pid: int) -> None:
    """Tell the task to stop if its watchdog ends before it does, which is to end it: it did not come up, or was killed."""
    with contextlib.suppress(ChildProcessError):  # the task has collected it
        os.waitpid(pid, 0)
    os.kill(os.getpid(), signal.SIGTERM)


def execute_watchdog(order: dict[str, Any]) -> int:
    """Execute the watchdog, and return its PID."""
    nothing = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in range(3)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", child_watchdog.__file__, json.dumps(order)],
        {name: os.environ[name] for name in WATCHDOG_VARIABLES if name in os.environ},
        file_actions=nothing,
        # Until it ignores them.
        setsigmask=child_watchdog.IGNORED,
    )


def fork_watchdog(order: dict[str, Any]) -> int:
    """Be the watchdog in a copy of this process; return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            child_watchdog.leave_task()
            child_watchdog.end_task(order)
        finally:
            os._exit(0)
    return pid


def describe(conf: ConfigParser) -> dict[str, Any]:
    """Return what the watchdog has to know of this process."""
    pid = os.getpid()
    own = None
    with contextlib.suppress(OSError):  # no descriptor is left; it is known by its marks then
        own = look_at(pid)
    # The signal may have come in the middle of a log call, which holds the lock that a warning would wait for.
    with without_warnings():
        ends = find_leftover_policy(conf).ends_what_is_killed
        spared = sorted(find_spared_names(conf))
    return {
        "leader": (pid, own.start if own else 0),
        "limits": read_limits(pid),
        "origin": read_origin(pid),
        "grace": ORPHAN_GRACE,
        "ends": ends,
        "spared": spared,
        "path": str(Path(psutil.__file__).parents[1]),
    }
