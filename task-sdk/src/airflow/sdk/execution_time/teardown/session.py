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

``setsid()`` makes the child the leader of a new session and of a new process group, both numbered by its PID,
and detaches it from the terminal (setsid(2), credentials(7)). The processes that it starts stay in that group
unless they ask to leave, so one ``killpg`` reaches them: https://github.com/apache/airflow/issues/65505.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from airflow.sdk.execution_time.teardown.exit_status import is_unreaped_child

if TYPE_CHECKING:
    from airflow.sdk.execution_time.teardown.stop_request import StoppableProcess


def lead_session() -> bool:
    """
    Become the leader of a new session and process group; to be called by the child, first thing.

    :returns: False if the kernel refused. The child then shares its parent's group, and
        :func:`signal_led_group` leaves it to the caller to signal the PID alone.
    """
    try:
        os.setsid()
    except OSError:
        # A group leader may not open a session. The parent made us a group leader before we were first
        # scheduled. Raise nothing: this process is a copy of the parent, and an exception would reach the
        # parent's code.
        try:
            leave_own_group()
            os.setsid()
        except OSError:
            return False
    return True


def leave_own_group() -> None:
    """
    Join another process group of the session.

    :raises OSError: if the kernel refuses.
    """
    if group := os.getpgid(os.getppid()):
        os.setpgid(0, group)
    else:
        # The parent's group has no number here: it was opened outside this PID namespace (pid_namespaces(7)).
        join_group_of_child()


def join_group_of_child() -> None:
    """Join the group of a child that ends at once. A group lasts as long as any process is in it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writer)
            os.read(reader, 1)  # until the parent has closed it, or is gone
        finally:
            os._exit(0)
    try:
        os.close(reader)
        os.setpgid(child, child)
        os.setpgid(0, child)
    finally:
        os.close(writer)
        with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored
            os.waitpid(child, 0)


def signal_led_group(leader: int, sig: int) -> bool:
    """
    Send ``sig`` to the process group that ``leader``, a child of ours, leads since :func:`lead_session`.

    :returns: True if the group was signalled. False if it does not exist (yet), is our own or may not be
        signalled, or if the child is gone. Then the caller signals the PID alone. That is enough for a child
        that has not reached ``setsid()``, because it has started nothing.
    """
    # kill(2): 0 is our own group, 1 is init, and -1 is every process.
    if leader <= 1 or not is_unreaped_child(leader):
        return False
    try:
        if os.getpgid(leader) != leader or leader == os.getpgrp():
            return False
        os.killpg(leader, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_task(process: StoppableProcess, sig: int) -> bool:
    """Send a signal of ``kill()`` to the process group of a task, if it leads one; see :func:`signal_led_group`."""
    process._stop.sigkill_sent |= sig == signal.SIGKILL
    return process._new_session and signal_led_group(process.pid, sig)
