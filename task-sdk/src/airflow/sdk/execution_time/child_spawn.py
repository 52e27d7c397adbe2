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

A forked child marks itself, which a program of another language does not. From outside the mark can come too late
for a daemon that it starts at once. So the process that starts it carries the mark meanwhile, for a limit is inherited
(getrlimit(2)). What another thread starts within that millisecond carries it, too. A ``preexec_fn`` would have Popen
fork, run what others have registered for that, and wait until it is done.

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import threading
from typing import TYPE_CHECKING, Any

from airflow.sdk.execution_time.child_tree import MARK_FLAG, MARK_VARIABLE, carry_mark

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from airflow.sdk.execution_time.child_tree import ProcessTree

__all__ = ["spawn_leader"]

_spawning = threading.Lock()
"""Of two threads one would restore the other's mark, and this process belong to its tree ever after."""


def spawn_leader(
    command: Sequence[str], *, tree: ProcessTree, env: Mapping[str, str], **kwargs: Any
) -> subprocess.Popen[bytes]:
    """
    Start the leader of ``tree``, in a session of its own.

    :param kwargs: what else ``subprocess.Popen`` takes, whose errors are raised.
    """
    # Its PID, of which other marks are computed, is not known yet.
    mark = MARK_FLAG | secrets.randbits(MARK_FLAG.bit_length() - 1)
    with carrying(mark) as carried:
        marked = env if carried else {**env, MARK_VARIABLE: str(mark)}
        process = subprocess.Popen(command, env=marked, start_new_session=True, **kwargs)
    tree.adopt(process.pid, mark)
    return process


@contextlib.contextmanager
def carrying(mark: int) -> Iterator[bool]:
    """Carry a mark for a while, and with it all that is started; yields False where the limit cannot be set."""
    with _spawning:
        former = carry_mark(mark)
        try:
            yield former is not None
        finally:
            if former is not None:
                resource.setrlimit(resource.RLIMIT_RTTIME, former)
