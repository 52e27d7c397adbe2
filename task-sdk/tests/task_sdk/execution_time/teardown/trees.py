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
"""Leaders of trees, and processes that these start, for the tests beside this module."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any, TypeVar

from task_sdk.execution_time.teardown.supervised.supervised_task import (
    SLEEPER,
    Relay,
    fork,
    in_turn,
    kill_child,
    lift_limit,
    pause_for_ever,
)

from airflow.sdk.execution_time.teardown.marks import MARK_FLAG, compute_origin, mark_process, read_origin
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.processes import Process, look_at, read_process

if TYPE_CHECKING:
    from collections.abc import Callable


Started = TypeVar("Started")


def start_waiting(*steps: Callable[[], Any]) -> tuple[int, list[Any]]:
    """Fork a child that takes steps and then waits for signals; return its PID, and what the last step returned."""

    def tell_and_wait() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever other tests have installed
        told.tell([step() for step in steps][-1] or [])
        pause_for_ever()

    with contextlib.closing(Relay()) as told:
        return fork(tell_and_wait), told.hear()


def lead(*starts: Callable[[], Started]) -> tuple[ProcessTree, int, list[Started]]:
    """Fork a marked session leader that starts what it is told to; return its tree, its PID and theirs."""

    def main() -> list[Started]:
        os.setsid()
        mark_process()
        return [start() for start in starts]

    pid, started = start_waiting(main)
    tree = ProcessTree()
    tree.set_leader(pid)
    return tree, pid, started


def read(pid: int) -> Process:
    """Return a process that lives."""
    process = read_process(pid)
    assert process, f"{pid} has ended"
    return process


def read_dead_or_alive(pid: int) -> Process:
    """Return a process that is there, dead or alive."""
    process = look_at(pid)
    assert process, f"{pid} is gone"
    return process


def read_set_origin(pid: int) -> int:
    """Return the origin of a process that has one."""
    origin = read_origin(pid)
    assert origin is not None
    return origin


def find(tree: ProcessTree) -> list[int]:
    return sorted(process.pid for process in tree.find())


def start_child() -> int:
    return subprocess.Popen(SLEEPER).pid


def start_session() -> int:
    return subprocess.Popen(SLEEPER, start_new_session=True).pid


def start_orphan(prepare: Callable[[], Any] = lambda: None, **kwargs: Any) -> int:
    """Start a process whose parent is gone."""
    parent, [pid] = start_waiting(prepare, lambda: [subprocess.Popen(SLEEPER, **kwargs).pid])
    kill_child(parent)
    return pid


def start_orphan_fork(prepare: Callable[[], Any], main: Callable[[], Any]) -> int:
    """Fork a process that runs ``main``, and whose parent is gone by then."""

    def wait_and_run() -> None:
        orphaned.hear()
        main()

    with contextlib.closing(Relay()) as orphaned:
        parent, [pid] = start_waiting(prepare, lambda: [fork(wait_and_run)])
        kill_child(parent)
        orphaned.tell("orphaned")
        return pid


def start_daemon(prepare: Callable[[], Any] = lambda: None, **kwargs: Any) -> int:
    """Start a process in a session of its own whose parent is gone."""
    return start_orphan(in_turn(os.setsid, prepare), **kwargs)


def start_daemon_without_environment() -> int:
    return start_daemon(env={})


def start_daemon_without_mark() -> int:
    return start_daemon(lift_limit)


def fork_child() -> int:
    return fork_waiting(lambda: None)


def fork_session() -> int:
    return fork_waiting(os.setsid)


def fork_daemon() -> int:
    return start_orphan_fork(os.setsid, pause_for_ever)


def fork_stray() -> int:
    """Fork a process in the leader's session that has lost its parent and the mark."""
    return start_orphan_fork(lift_limit, pause_for_ever)


def fork_waiting(main: Callable[[], Any]) -> int:
    """Fork a process that runs ``main``, and then waits for signals."""
    return start_waiting(main, list)[0]


def fork_when_adopted(main: Callable[[], Any]) -> tuple[ProcessTree, int, int]:
    """Have a leader that was adopted before fork a daemon, which runs ``main``; return the tree, and both PIDs."""
    with contextlib.closing(Relay()) as adopted, contextlib.closing(Relay()) as told:

        def be_daemon() -> None:
            main()
            told.tell(os.getpid())
            pause_for_ever()

        def be_leader() -> None:
            os.setsid()
            mark_process()
            adopted.hear()
            start_orphan_fork(os.setsid, be_daemon)
            pause_for_ever()

        leader = fork(be_leader)
        tree = ProcessTree()
        tree.set_leader(leader)
        adopted.tell("adopted")
        return tree, leader, told.hear()


def make_origin(supervisor: Process) -> int:
    return compute_origin(supervisor, MARK_FLAG)
