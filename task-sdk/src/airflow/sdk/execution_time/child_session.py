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
Give a supervised child a session of its own, and signal the process group that comes with it.

``setsid()`` makes the child the leader of a new session and of a new process group, both numbered by its
PID, and detaches it from the terminal (setsid(2), credentials(7)). Whatever it starts stays in that group
unless it asks to leave, so one ``killpg`` reaches all of it: apache/airflow issue 65505.

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from typing import TYPE_CHECKING, Protocol

import structlog

from airflow.sdk.execution_time.child_status import is_unreaped_child
from airflow.sdk.execution_time.child_tree import mark_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.sdk.execution_time.child_exit import ExitWatch
    from airflow.sdk.execution_time.child_tree import ProcessTree

__all__ = ["forward_signal", "forward_signals", "lead_session", "signal_session", "signal_task"]

log = structlog.get_logger(logger_name="supervisor")

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What stops a supervisor politely: dumb-init, Kubernetes and Celery send SIGTERM, a terminal SIGINT."""

STOP_TIME = 0.2
"""Seconds that the processes of a task have to stop before they are killed."""


class _SupervisedProcess(Protocol):
    """The part of ``WatchedSubprocess`` that this module relies on, in every release."""

    pid: int
    _exit_code: int | None
    _new_session: bool
    _exit_watch: ExitWatch
    _tree: ProcessTree


def lead_session() -> bool:
    """
    Become the marked leader of a new session and process group; to be called by the child, first thing.

    :returns: False if the kernel refused. The child then shares its parent's group, and
        :func:`signal_session` leaves it to the caller to signal the PID alone.
    """
    leads = _open_session()
    mark_process()
    return leads


def _open_session() -> bool:
    try:
        os.setsid()
    except PermissionError:
        # A group leader may not open a session, and the parent made us one before we were first scheduled.
        try:
            os.setpgid(0, os.getpgid(os.getppid()))
            os.setsid()
        except OSError:
            return False
    return True


def signal_session(leader: int, sig: int) -> bool:
    """
    Send ``sig`` to the process group that ``leader``, a child of ours, leads since :func:`lead_session`.

    :returns: True if the group was signalled. False if it does not exist (yet), is our own or may not be
        signalled, or if the child is gone: then the caller signals the PID alone, which is enough for a child
        that has not reached ``setsid()``, for it has started nothing.
    """
    # kill(2): 0 is our own group, 1 is init, and -1 everybody.
    if leader <= 1 or not is_unreaped_child(leader):
        return False
    try:
        if os.getpgid(leader) != leader or leader == os.getpgrp():
            return False
        os.killpg(leader, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_task(process: _SupervisedProcess, sig: int) -> bool:
    """
    Send a signal of ``kill()`` to the session of a task, if it has one; see :func:`signal_session`.

    Before SIGKILL all that belongs to the task is stopped and looked for once more: what a process has started
    since the last look, and moved out of reach, could not be told for the task's when that process is dead.
    """
    if not process._new_session:
        return False
    if sig == signal.SIGKILL and is_unreaped_child(process.pid):
        process._tree.stop(STOP_TIME, with_leader=True)
    return signal_session(process.pid, sig)


def forward_signal(process: _SupervisedProcess, signum: int) -> None:
    """
    Pass a signal that the supervisor received on to the child's session, or to the child alone.

    :raises ProcessLookupError: if the child is gone.
    """
    if process._exit_code is not None or not is_unreaped_child(process.pid):
        raise ProcessLookupError(process.pid)
    if not (process._new_session and signal_session(process.pid, signum)):
        os.kill(process.pid, signum)
    # Nobody kills it should it stay, and it may well end with 0; but it does not end of its own accord.
    process._exit_watch.expect_exit(math.inf)


@contextlib.contextmanager
def forward_signals(process: _SupervisedProcess) -> Iterator[None]:
    """
    Pass SIGTERM and SIGINT on to ``process`` for the duration, and restore the former handlers after it.

    A child in a session of its own is reached neither by Ctrl-C nor by the broadcast of an init such as
    dumb-init, so that the supervisor has to tell it.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread alone, and lets nobody else install a handler.
        yield
        return

    received: list[str] = []

    def forward(signum: int, _frame: object) -> None:
        # Not the place to log: the code that this interrupts may hold the logger's lock.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            forward_signal(process, signum)
        received.append(signal.Signals(signum).name)

    former = {signum: signal.signal(signum, forward) for signum in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in former.items():
            # None stands for a handler that C code had installed; Python cannot put it back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        if received:
            log.info("Passed on to the task what the supervisor was sent.", signals=received, pid=process.pid)
