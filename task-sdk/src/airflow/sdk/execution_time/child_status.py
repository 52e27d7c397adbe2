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
Fail closed when somebody else collected the exit status of a task process.

A ``waitpid(-1)`` elsewhere in the process, or SIGCHLD being ignored (waitpid(2), notes), takes the status away.
psutil then answers None, which reads as "still running", so that the supervisor lives for ever (apache/airflow
issue 70117).

Nothing here imports Airflow.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = [
    "deny_silent_success",
    "find_reported_state",
    "has_reported",
    "is_refused",
    "is_unreaped_child",
    "settle_exit_code",
]

NOT_REPORTED = "server_terminated"
"""What the supervisor itself notes as the state of a task that the server does not want any more."""

UNKNOWN_BUT_REPORTED = 0
"""The task had told its terminal state, which stands; the status would have added nothing."""

UNKNOWN = 1
"""Unknown is not success: a failure, or a retry where the task has any left."""


def settle_exit_code(process: Any, exit_code: int | None) -> int | None:
    """
    Replace the exit code of a task process that psutil says is gone, but knows no status of.

    :param process: a ``WatchedSubprocess``. Only task processes report a terminal state; for any other type
        the code is returned as it is.
    :param exit_code: what ``wait(timeout=0)`` returned, None if the status is lost.
    """
    if exit_code is not None or not hasattr(process, "_terminal_state"):
        return exit_code
    state = find_reported_state(process)
    process.process_log.warning(
        "The exit status of the task process was taken by somebody else in the supervisor's process; "
        "relying on the state that the task had reported, or assuming failure.",
        pid=process.pid,
        reported_state=state,
    )
    return UNKNOWN_BUT_REPORTED if state else UNKNOWN


def find_reported_state(process: Any) -> str | None:
    """Return the terminal state that a task process has told, None if it has told none."""
    state = process._terminal_state
    name = None if state is None else str(getattr(state, "value", state)).lower()
    return None if name == NOT_REPORTED else name


def is_refused(process: Any) -> bool:
    """Whether the server has ended a task process, or refused the state that it has told."""
    return process._terminal_state is not None and find_reported_state(process) is None


def has_reported(process: Any) -> bool:
    """Whether a task process has told its terminal state, which then stands, whatever it exits with."""
    return find_reported_state(process) is not None


def deny_silent_success(process: Any, exit_code: int) -> int:
    """
    Replace the 0 of a task process that was told to stop, and has told no state: it has not succeeded.

    :param process: an ``ActivitySubprocess`` that has ended.
    """
    silent = process._exit_watch.exit_expected and process._terminal_state is None
    return UNKNOWN if exit_code == 0 and silent else exit_code


def is_unreaped_child(pid: int) -> bool:
    """Whether ``pid`` still is our child, dead or alive; only then can its number not have been recycled."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except (AttributeError, OSError):  # macOS before Python 3.13, or a sandbox that refuses the call
        return True
    return True
