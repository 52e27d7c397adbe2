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
Start another program as the leader of a process tree, marked before its first instruction.

A forked child marks itself, but a program of another language does not. Two other ways fail:

1. If the supervisor marks the program from outside, that may be too late for a daemon that the program starts
   at once.
2. If the supervisor carries the mark itself while it starts the program, its other threads give the mark to
   the processes that they start.

So the child takes the mark between fork and exec (subprocess, ``preexec_fn``), by one or two system calls.
With a ``preexec_fn`` Popen forks as the supervisor does for every other task: it runs the fork hooks of other
code, and the usual care for threads applies.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

from airflow.sdk.execution_time.teardown.marks import (
    MARK_VARIABLE,
    extend_variable,
    give_mark,
    invent_mark,
    read_limits,
)

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk.execution_time.teardown.process_tree import ProcessTree


UNKNOWN_PID = 0


def spawn_leader(
    command: Sequence[str], *, tree: ProcessTree, env: Mapping[str, str], **kwargs: Any
) -> subprocess.Popen[bytes]:
    """
    Start the leader of ``tree``, in a session of its own.

    :param kwargs: what else ``subprocess.Popen`` takes but a ``preexec_fn``; its errors are raised.
    """
    # Other marks are computed from the PID, which is not known yet.
    mark = invent_mark(UNKNOWN_PID)
    inherited = read_limits(os.getpid())

    def take_mark() -> None:
        give_mark(os.getpid(), mark, inherited)

    carries = can_carry(mark)
    if not carries:
        env = {**env, MARK_VARIABLE: extend_variable(env, mark)}
    process = subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        preexec_fn=take_mark if carries else None,  # noqa: PLW1509 - see above
        **kwargs,
    )
    tree.set_leader(process.pid, mark)
    return process


def can_carry(mark: int) -> bool:
    """Whether a child can have the mark as its limit: the hard limit that it inherits must allow it."""
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
    except (AttributeError, OSError):  # no such limit (macOS), or a sandbox that refuses the call
        return False
    return hard == resource.RLIM_INFINITY or hard >= mark
