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

Without its supervisor nobody could stop the task: it would run on beside the retry that the server starts
when heartbeats fail. So the runner asks the kernel for a real-time signal when its parent ends (prctl(2),
PR_SET_PDEATHSIG). The signal's handler executes the ``watchdog``, which ends the task as the
supervisor would have: ``on_kill`` runs, and processes that are left when the grace period ends are killed.
While the supervisor lives, there is no additional process and no open descriptor.

There are two cases in which the signal alone is not enough:

1. The sockets of a dying supervisor close before the kernel sends the signal. A task that prints, for
   example, fails for that reason. If it ended at once, ``on_kill`` would not run, and the processes that it
   has started would run on. So the runner waits for the signal before it ends.
2. Python runs the handler between two instructions of the main thread. If the main thread is in C code that
   does not return, or the runner is stopped, the handler does not run. The ``sweep`` ends such tasks.

Nothing here imports Airflow outside this package.
"""

from __future__ import annotations

import _thread
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
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from airflow.sdk.execution_time.teardown import watchdog
from airflow.sdk.execution_time.teardown.marks import mark_process, read_limits, read_origin
from airflow.sdk.execution_time.teardown.orphans import ORPHAN_GRACE
from airflow.sdk.execution_time.teardown.policy import (
    find_leftover_policy,
    find_spared_names,
    without_warnings,
)
from airflow.sdk.execution_time.teardown.processes import is_there, look_at
from airflow.sdk.execution_time.teardown.stop_request import RUNNER_FAILED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from configparser import ConfigParser


PR_SET_PDEATHSIG = 1

PARENT_DEATH_SIGNAL: int | None = signal.SIGRTMAX - 5 if hasattr(signal, "SIGRTMAX") else None
"""A real-time signal that nobody else sends. If one arrives all the same, the supervisor is found alive."""

CREDENTIALS = struct.Struct("3i")
"""``struct ucred`` (unix(7)): PID, uid and gid."""

COMMS = 0
"""The descriptor on which the runner sends requests to its supervisor."""

DEATH_TIME = 2.0
"""Seconds that a supervisor whose sockets close may take to die on a busy machine."""

POLL_INTERVAL = 0.01
"""Seconds between looks at a dying supervisor."""

INTERRUPTING = (
    *watchdog.IGNORED,
    *([signal.SIGALRM] if hasattr(signal, "SIGALRM") else ()),
    *([PARENT_DEATH_SIGNAL] if PARENT_DEATH_SIGNAL else ()),
)
"""
Signals that are blocked while the watchdog starts: a handler that raises would prevent that, and ours would start another.
"""

WATCHDOG_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""The variables that the watchdog needs. It gets no others: they may be secret, and others can read them."""


class Lifeline:
    """The link of a runner to its supervisor."""

    def __init__(self, supervisor: int, conf: ConfigParser) -> None:
        self._supervisor = supervisor
        self._conf = conf
        self._runner = os.getpid()
        self._noticed = False
        self._sockets: list[tuple[int, int]] = []

    @property
    def is_own(self) -> bool:
        """Whether this process is the runner, and no forked copy of it."""
        return os.getpid() == self._runner

    @property
    def supervisor_is_gone(self) -> bool:
        """Whether the supervisor is gone. The signal also comes if only the thread ends that forked the runner."""
        return os.getppid() != self._supervisor

    def note_sockets(self, descriptors: Iterable[int]) -> None:
        """Record the runner's own sockets, by descriptor and inode; it also inherits those of other tasks."""
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                status = os.fstat(descriptor)
                if stat.S_ISSOCK(status.st_mode):
                    self._sockets.append((descriptor, status.st_ino))

    @property
    def has_lost_socket(self) -> bool:
        """Whether the supervisor has closed a socket. If it dies, they all close, one after the other."""
        return any(has_hung_up(descriptor, inode) for descriptor, inode in self._sockets)

    def handle(self, _signum: int, _frame: object) -> None:
        """Handle the signal that the parent has ended."""
        if self.is_own and self.supervisor_is_gone:
            self.start_watchdog_once()

    def start_watchdog_once(self) -> None:
        """Have the watchdog started, once."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING)
        try:
            if self._noticed:
                return
            self._noticed = True
            # Without /proc, or a free descriptor, this fails. The end of the task matters more than its
            # output.
            with contextlib.suppress(Exception):
                leave_sockets(self._supervisor)
            try:
                watching = start_watchdog(describe(self._conf))
            except Exception:  # without a watchdog, tell at least the task itself
                os.kill(self._runner, signal.SIGTERM)
            else:
                # Not threading.Thread: this is a signal handler, and may have interrupted one that holds its locks.
                with contextlib.suppress(RuntimeError):  # no thread can be had
                    _thread.start_new_thread(stop_when_watchdog_ends, (watching,))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


_lifeline: Lifeline | None = None
"""The lifeline of this process, if it is a runner."""


def follow_supervisor(supervisor: int, conf: ConfigParser) -> None:
    """
    Have this process, a runner, end when its supervisor does; to be called before it starts anything.

    :param supervisor: its PID. If the supervisor is gone already, this process exits.
    :param conf: Airflow's configuration.
    """
    global _lifeline
    lifeline = Lifeline(supervisor, conf)
    if request_parent_death_signal(lifeline):
        _lifeline = lifeline
        if lifeline.supervisor_is_gone:
            os._exit(RUNNER_FAILED)


def follow_spawner(comms: socket.socket, conf: ConfigParser) -> None:
    """
    Mark a new interpreter, if this is a runner, and call ``follow_supervisor()`` in it.

    Where no limit can be the mark, its supervisor cannot mark it. A process of the Dag processor or the triggerer is no
    runner; it leads no session.

    :param comms: one of the sockets that the supervisor has made. Nothing else identifies the supervisor
        here.
    """
    is_known = _lifeline is not None and _lifeline.is_own
    if not is_known and os.getsid(0) == os.getpid():
        mark_process()
        with contextlib.suppress(OSError, AttributeError):  # no such option (macOS), or no such process
            supervisor = find_creator(comms)
            # gVisor returns the PID of the process that asks. And another program may have started this
            # interpreter.
            if supervisor == os.getppid() or not is_there(supervisor):
                follow_supervisor(supervisor, conf)


def outlive_dying_supervisor(target: Callable[[], object], log_descriptor: int) -> None:
    """
    Run the target of a process. If it is a runner whose supervisor is dying, end only after the supervisor.

    :param log_descriptor: the socket of the runner's log. Its other sockets are its standard streams.
    """
    if _lifeline is not None and _lifeline.is_own:
        _lifeline.note_sockets({0, 1, 2, log_descriptor})
    try:
        target()
    finally:
        await_supervisor_death()


def await_supervisor_death() -> bool:
    """Wait for the end of a dying supervisor, and start the watchdog; False if it lives, or we are no runner."""
    lifeline = _lifeline
    if lifeline is None or not lifeline.is_own:
        return False
    deadline = time.monotonic() + DEATH_TIME
    while not lifeline.supervisor_is_gone and lifeline.has_lost_socket and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)
    if lifeline.supervisor_is_gone:
        lifeline.start_watchdog_once()
        return True
    return False


def has_hung_up(descriptor: int, inode: int) -> bool:
    """Whether the other end of a socket is closed; False if the descriptor is now another file."""
    try:
        if os.fstat(descriptor).st_ino != inode:
            return False
    except OSError:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def request_parent_death_signal(lifeline: Lifeline) -> bool:
    """Ask the kernel to signal the end of the parent; False where it cannot."""
    if PARENT_DEATH_SIGNAL is None or not sys.platform.startswith("linux"):
        return False
    try:
        # An interpreter may have been built without ctypes.
        ctypes = importlib.import_module("ctypes")
        signal.signal(PARENT_DEATH_SIGNAL, lifeline.handle)
        return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_DEATH_SIGNAL, 0, 0, 0) == 0)
    except Exception:  # the task has to start without the signal, too
        return False


def find_creator(sock: socket.socket) -> int:
    """Return the PID of the process that has made a pair of sockets, given one end (unix(7), SO_PEERCRED)."""
    pid, *_ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(pid)


def leave_sockets(supervisor: int) -> None:
    """
    Connect the sockets to the dead supervisor to /dev/null instead.

    Otherwise a print in ``on_kill`` would raise. Or it would wait for ever, because processes that were
    forked meanwhile may hold the other ends.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for sock in list_sockets_of(supervisor):
        # Wake the threads that wait for it.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        if sock.fileno() != COMMS:
            os.dup2(nowhere, sock.fileno(), inheritable=sock.fileno() in (1, 2))
    os.close(nowhere)


def list_sockets_of(creator: int) -> Iterator[socket.socket]:
    """Yield the sockets that a process has made; they stay open."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, struct.error):  # no socket, or closed meanwhile
            # If a default timeout is set, socket.socket() makes the descriptor non-blocking, even one of
            # other code. Restore that.
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
    Start the watchdog, which ends this runner and all processes that it has started; return its PID.

    :raises OSError: if it cannot be started.
    """
    try:
        return execute_watchdog(order)
    except (OSError, TypeError, ValueError):
        # The interpreter is unknown, gone, or not executable for this user. A copy of this process needs
        # none.
        return fork_watchdog(order)


def stop_when_watchdog_ends(pid: int) -> None:
    """Tell the task to stop if its watchdog ends first: the watchdog did not start, or was killed."""
    with contextlib.suppress(ChildProcessError):  # the task has reaped it
        os.waitpid(pid, 0)
    os.kill(os.getpid(), signal.SIGTERM)


def execute_watchdog(order: dict[str, Any]) -> int:
    """Execute the watchdog, and return its PID."""
    nothing = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in range(3)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", watchdog.__file__, json.dumps(order)],
        {name: os.environ[name] for name in WATCHDOG_VARIABLES if name in os.environ},
        file_actions=nothing,
        # Block these signals until the watchdog ignores them.
        setsigmask=watchdog.IGNORED,
    )


def fork_watchdog(order: dict[str, Any]) -> int:
    """Run the watchdog in a copy of this process; return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            watchdog.leave_task()
            watchdog.end_task(order)
        finally:
            os._exit(0)
    return pid


def describe(conf: ConfigParser) -> dict[str, Any]:
    """Return the watchdog's argument, which describes this process."""
    pid = os.getpid()
    own = None
    with contextlib.suppress(OSError):  # no descriptor is left; its marks identify it then
        own = look_at(pid)
    # The signal may have interrupted a log call, which holds the lock that a warning would wait for.
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
