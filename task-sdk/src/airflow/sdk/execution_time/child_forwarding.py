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
Pass the signals that stop a supervisor on to its task.

A child in a session of its own is reached neither by Ctrl-C nor by the broadcast of an init such as dumb-init, so
that the supervisor has to tell it.

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from airflow.sdk.execution_time.child_session import signal_session
from airflow.sdk.execution_time.child_status import is_unreaped_child

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.sdk.execution_time.child_exit import ExitWatch

__all__ = ["forward_signals"]

log = structlog.get_logger(logger_name="supervisor")

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What stops a supervisor politely: dumb-init, Kubernetes and Celery send SIGTERM, a terminal SIGINT."""


class _SupervisedProcess(Protocol):
    """The part of ``WatchedSubprocess`` that this module relies on."""

    pid: int
    _exit_code: int | None
    _new_session: bool
    _exit_watch: ExitWatch


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
    """Pass SIGTERM and SIGINT on to ``process`` for the duration, and restore the former handlers after it."""
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread alone, and lets nobody else install a handler.
        yield
        return

    passed_on: Counter[str] = Counter()

    def forward(signum: int, _frame: object) -> None:
        # Not the place to log: the code that this interrupts may hold the logger's lock.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            forward_signal(process, signum)
            passed_on[signal.Signals(signum).name] += 1

    try:
        with contextlib.ExitStack() as former:
            # One that has arrived for a former handler is handled in between, which may raise.
            for signum in FORWARDED_SIGNALS:
                former.callback(restore_handler, signum, signal.getsignal(signum))
                signal.signal(signum, forward)
            yield
    finally:
        if passed_on:
            log.info(
                "Passed on to the task what the supervisor was sent.",
                signals=dict(passed_on),
                pid=process.pid,
            )


def restore_handler(signum: int, handler: Any) -> None:
    """Install what ``signal.getsignal()`` has returned: None stands for a handler of C code, which is lost."""
    signal.signal(signum, signal.SIG_DFL if handler is None else handler)
