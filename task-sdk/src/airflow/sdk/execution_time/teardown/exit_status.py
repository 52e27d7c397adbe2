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
Fail closed when other code has collected the exit status of a task process.

The status is lost if other code in the process calls ``waitpid(-1)``, or if SIGCHLD is ignored (waitpid(2),
notes). Then psutil returns None, which the supervisor takes for "still running", so that it lives for ever.
``subprocess.Popen`` returns 0, which means success: https://github.com/apache/airflow/issues/70117.

Nothing here imports Airflow.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

    import typing_extensions

    from airflow.sdk.execution_time.teardown.supervised import TaskProcess, WatchedProcess


SERVER_TERMINATED = "server_terminated"
"""The state that the supervisor itself notes for a task that the server has ended."""

FAILURES = ("failed", "up_for_retry")
"""States that a task reports after an exception. Its process then exits with 0."""

UNKNOWN_BUT_REPORTED = 0
"""The task reported a terminal state; use it."""

FAILURE = 1
"""An unknown status is no success: the task has failed, or is retried if it has retries left."""


def settle_exit_code(process: WatchedProcess, exit_code: int | None) -> int | None:
    """
    Replace the exit code of a task process that is gone, but whose status psutil does not know.

    :param process: a ``WatchedSubprocess``. Only task processes report a terminal state; for any other type
        the code is returned as it is.
    :param exit_code: what ``wait(timeout=0)`` returned, None if the status is lost.
    """
    if exit_code is not None or not reports_state(process):
        return exit_code
    state = find_reported_state(process)
    process.process_log.warning(
        "The exit status of the task process was taken by somebody else in the supervisor's process; "
        "relying on the state that the task had reported, or assuming failure.",
        pid=process.pid,
        reported_state=state,
    )
    return UNKNOWN_BUT_REPORTED if state else FAILURE


def reports_state(process: WatchedProcess) -> typing_extensions.TypeGuard[TaskProcess]:
    """Whether a process is that of a task, which reports how it ends."""
    return hasattr(process, "_terminal_state")


def find_reported_state(process: TaskProcess) -> str | None:
    """Return the terminal state that a task process has reported, None if it has reported none."""
    state = process._terminal_state
    name = None if state is None else str(getattr(state, "value", state)).lower()
    return None if name == SERVER_TERMINATED else name


def find_sent_state(process: TaskProcess) -> str | None:
    """
    Return the terminal state that a task process has sent, even if the API server has not taken it yet.

    From 1.2 on the supervisor keeps a message that the server could not be told, and sends it again at the end.
    """
    message = find_untold_message(process)
    return find_reported_state(process) or (message.state if message else None)


def find_untold_message(process: TaskProcess) -> Any:
    """Return the message with the terminal state of a task that the API server is still to be told, if any."""
    return getattr(process, "_pending_terminal_state_msg", None)


def is_server_terminated(process: TaskProcess) -> bool:
    """Whether the supervisor has noted that the server ended the task."""
    return process._terminal_state is not None and find_reported_state(process) is None


def has_reported(process: TaskProcess) -> bool:
    """Whether a task process has reported its terminal state. That stands, whatever the exit code is."""
    return find_reported_state(process) is not None


def is_unreaped_child(pid: int) -> bool:
    """Whether ``pid`` is still our child, dead or alive. Only then is the PID certainly not reused."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except (AttributeError, OSError):  # macOS before Python 3.13, or a sandbox that refuses the call
        return True
    return True


def wait_for_popen(popen: subprocess.Popen[bytes], timeout: float | None) -> int | None:
    """
    Return ``popen.wait(timeout)``, but None where ``Popen`` would make up a 0 for a lost status.

    :raises subprocess.TimeoutExpired: as ``popen.wait`` does.
    """
    if popen.returncode is None and not is_unreaped_child(popen.pid):
        return None
    return popen.wait(timeout)


def signal_popen(popen: subprocess.Popen[bytes], sig: int) -> None:
    """Call ``popen.send_signal(sig)``, unless other code has reaped the child."""
    if popen.returncode is not None or is_unreaped_child(popen.pid):
        popen.send_signal(sig)
