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
Find the trees of tasks whose supervisor has died, and end them as the supervisor would have.

Two programs do so:

1. A runner that notices the death starts a ``watchdog`` (see ``lifeline``).
2. If the runner cannot notice it, because it is stopped or busy in C code, the next supervisor ends the tree
   (``sweep``).

They end a tree only if its runner is there: without a runner, the processes may be the leftovers of a task
that has succeeded. The only exceptions are processes that a supervisor was about to kill when it died.

Imports nothing of Airflow outside this package, and no third party's module but psutil.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.teardown.ending import KILL_TIME, Ending, wait_until_gone
from airflow.sdk.execution_time.teardown.marks import (
    CONDEMNED,
    PID_MASK,
    compute_mark,
    is_condemned,
    is_origin_alive,
    is_origin_of,
    list_given_marks,
    read_limits,
    read_origin,
)
from airflow.sdk.execution_time.teardown.processes import (
    Process,
    find_session,
    is_alive,
    is_in_own_namespace,
    is_own_proc,
    list_pids,
    look_at,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from airflow.sdk.execution_time.teardown.process_tree import ProcessTree


ORPHAN_GRACE = 5.0
"""
Seconds between SIGTERM and SIGKILL: the default of upstream's ``kill()``.

It is short because nobody sends heartbeats any more: when their timeout is over, the server may start a
retry.
"""


@dataclass(frozen=True)
class Orphan:
    """A process whose supervisor has died."""

    process: Process
    marks: tuple[int, ...]
    """The marks that it carried when it was found: soon another process may have its PID."""
    origin: int

    @property
    def condemned(self) -> bool:
        """Whether its supervisor was about to kill it."""
        return is_condemned(self.origin)

    @property
    def given_marks(self) -> set[int]:
        """The marks of the processes that it has started."""
        return list_given_marks(self.process, self.marks, self.origin)


def find_orphans() -> list[Orphan]:
    """
    Return the runners of this user whose supervisors have died, and processes that these were about to kill.

    Return nothing where /proc belongs to another PID namespace. Entries may vanish meanwhile.

    :raises OSError: if /proc cannot be read.
    """
    if not is_own_proc():
        return []
    found = [pid for pid, _ in list_pids() if any(find_orphan(pid))]
    # Look twice: a runner that was just starting may have shown the origin of another task, which it had
    # inherited.
    return [orphan for pid in found for orphan in find_orphan(pid)]


def find_orphan(pid: int) -> Iterator[Orphan]:
    """Yield the process of that number if it is an orphan."""
    origin = read_origin(pid)
    # A process that has lifted its mark has left the tree, but still has the origin.
    marks = read_limits(pid) if origin else ()
    if not origin or not marks or pid == os.getpid():
        return
    condemned = is_condemned(origin)
    leads = marks[0] & PID_MASK == pid
    # A runner may have set the limit of its mark for itself, and so have lost the mark.
    may_lead = marks == (origin & ~CONDEMNED,) and find_session(pid) == pid
    if not (leads or may_lead or condemned) or is_origin_alive(origin):
        return
    if not (is_ours(pid) and is_in_own_namespace(pid)):
        return
    process = look_at(pid)
    if process is None or process.dead:
        return
    # Where /proc hides the start, the mark contains only the PID.
    if condemned or (leads if process.start < 0 else is_leader(process, marks[0], origin)):
        yield Orphan(process, marks, origin)


def is_leader(process: Process, mark: int, origin: int) -> bool:
    """Whether a process is the runner with this mark or origin; one in half a million may pass for it."""
    given = compute_mark(process)
    return mark == given or (mark == origin and is_origin_of(origin, given))


def is_ours(pid: int) -> bool:
    """Whether a process runs as our own user. We may signal no other without a privilege."""
    try:
        return bool(psutil.Process(pid).uids().real == os.getuid())
    except psutil.AccessDenied:
        # We could read its limits, so we are the same user, or root.
        return os.getuid() != 0
    except (psutil.Error, OSError):
        return False


def end_orphans(trees: Sequence[ProcessTree], grace: float = ORPHAN_GRACE) -> list[Process]:
    """
    End trees as ``kill()`` does: the runners first, then their leftovers, by SIGKILL after the grace period.

    :returns: the processes that are still there.
    """
    deadline = time.monotonic() + grace
    for tree in trees:
        tell_runner(tree)
    wait_until_gone([tree.leader for tree in trees if tree.leader], deadline)
    # As kill() does, which spares what a runner that has ended in time has left.
    late = [tree for tree in trees if not tree.ends_leftovers and tree.leader and is_alive(tree.leader)]
    for tree in late:
        signal_runner(tree, signal.SIGKILL)
    ending = Ending([tree for tree in trees if tree.ends_leftovers], deadline)
    ending.terminate()
    survivors = ending.kill()
    runners = [tree.leader for tree in late if tree.leader]
    wait_until_gone(runners, time.monotonic() + KILL_TIME)
    return survivors + [runner for runner in runners if is_alive(runner)]


def kill_condemned(trees: Sequence[ProcessTree]) -> list[Process]:
    """Kill stopped processes that their supervisor was about to kill; return those that are still there."""
    return Ending(trees, time.monotonic()).kill()


def tell_runner(tree: ProcessTree) -> None:
    """Send SIGTERM to the group of a runner, and SIGCONT to the stopped processes of its tree."""
    # A descendant that has lost its mark can only be found while its parent is alive.
    stopped = [member for member in tree.find(with_leader=True) if member.stopped and member.start >= 0]
    signal_runner(tree, signal.SIGTERM)
    tree.signal(stopped, signal.SIGCONT)


def signal_runner(tree: ProcessTree, sig: int) -> None:
    """Send a signal to the group of a runner, or to itself if it leads none."""
    if not tree.signal_group(sig):
        tree.signal_leader(sig)
