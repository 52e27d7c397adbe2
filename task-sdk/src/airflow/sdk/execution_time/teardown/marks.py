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
What shows to which tree a process belongs: its *mark*, and its *origin*.

The mark is a soft ``RLIMIT_RTTIME`` that no other leader has. This limit concerns real-time scheduling alone,
and its value is too high to be reached. It survives fork, exec, setsid, ``env -i`` and double forks
(getrlimit(2)); an environment variable does not. Parent and child both compute the mark from the leader's PID
and start time, so they agree on it without talking. Where they cannot, the one that sets it first decides.

Trees nest, because a task may supervise tasks itself. The leader of an inner tree gets a mark of its own, and
keeps the mark of the tree around it in ``RLIMIT_LOCKS``, a limit that has no effect and that children inherit
as well.

Besides the mark a leader gets its origin, in ``RLIMIT_RSS``, which has no effect either. The origin identifies
the leader's supervisor, and contains a part of the mark. It serves two purposes: ``orphans`` recognises a tree
whose supervisor has died, and a look finds a process that has set the limit of the mark for itself.

A process leaves its tree, and all trees around it, if it detaches (setsid, and a parent that exits) with the
limit lifted: ``prlimit --rttime=unlimited``. A worker that a task starts, or restarts, must be started in this
way. Otherwise the worker, and every task that it runs from then on, ends with that task.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.teardown.processes import (
    is_there,
    look_at,
    read_entry,
    read_process,
    read_self,
)

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from airflow.sdk.execution_time.teardown.processes import Process


MARK_FLAG = 1 << 62
"""Set in every mark. As a limit in microseconds that is more than 100,000 years, so it is never reached."""

PID_MASK = (1 << 22) - 1
"""The part of a mark that is the leader's PID, which has 22 bits at most (proc_sys_kernel(5))."""

ORIGIN_START_MASK = (1 << 20) - 1
"""The low bits of the supervisor's start time in an origin; to their right is the supervisor's PID."""

ORIGIN_TREE_MASK = (1 << 19) - 1
"""The bits of an origin to the left of that, which differ between the trees of one supervisor."""

CONDEMNED = 1 << 61
"""Set in the origin of a process that its supervisor was about to kill."""

RLIMIT_LOCKS = 10
"""Has had no effect since Linux 2.4 (getrlimit(2)), and no name in Python."""

SOFT_LIMIT = re.compile(r"^Max (realtime timeout|file locks|resident set) +(\d+)", re.MULTILINE)
"""A line of /proc/PID/limits that may be a mark; a limit that is not set says "unlimited"."""

MARK_VARIABLE = "_AIRFLOW_PROCESS_TREE"
"""Carries the mark where the limit cannot be set."""

MARK_TEXT = re.compile("[0-9]{1,20}")
"""A mark in that variable, which whoever starts a process may have set to anything."""


def mark_process() -> None:
    """Mark the calling process, a leader, and thereby every process that it starts from now on."""
    own = None
    with contextlib.suppress(OSError):
        own = read_process(os.getpid())
    if own is None:
        return
    mark = compute_mark(own)
    inherited = read_limits(os.getppid())
    if any(is_mark_of(former, own.pid) and former not in inherited for former in read_limits(own.pid)[:1]):
        return  # its supervisor has marked it already
    # The supervisor sets the origin, too (set_leader), and may be hidden from us. But this process may start
    # others before the supervisor does so, and those need it as well. The origin goes before the mark: a
    # leader that has a mark, and an inherited origin, would pass for a task of the supervisor in that origin.
    give_origin(own.pid, mark, supervisor=os.getppid())
    # If its supervisor is in a tree itself, this process has inherited the mark of that tree.
    if give_mark(own.pid, mark, inherited=inherited) is None and mark not in parse_variable(os.environ):
        os.environ[MARK_VARIABLE] = extend_variable(os.environ, mark)


def give_mark(pid: int, mark: int, inherited: Collection[int] = ()) -> int | None:
    """
    Set a mark as a leader's limit, and keep the mark of the tree around it, if any, in another limit.

    A leader and its supervisor both do this, and may compute different marks (ProcessTree.set_leader). prlimit()
    exchanges a limit in one step. So the second of them finds the mark that the first has set, and puts it
    back.

    :param inherited: the marks that its supervisor carries.
    :returns: the mark that the leader carries from now on; None where the limit cannot be set.
    """
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        former, _ = resource.prlimit(pid, resource.RLIMIT_RTTIME, (mark, hard))
        if former == mark:
            return mark
        if is_mark_of(former, pid) and former not in inherited:
            resource.prlimit(pid, resource.RLIMIT_RTTIME, (former, hard))
            return former
        _, hard = resource.prlimit(pid, RLIMIT_LOCKS)
        # The inherited value of this limit is from the tree in which its supervisor was started, and may have
        # left.
        resource.prlimit(pid, RLIMIT_LOCKS, (former if is_mark(former) else hard, hard))
    except (AttributeError, OSError, ValueError):
        # No such limit (macOS), or a hard one below the mark, or a sandbox that refuses the call.
        return None
    return mark


def replace_mark(pid: int, mark: int, other: int) -> int:
    """Replace the mark that a leader has taken; return the one that it carries from now on."""
    try:
        former, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        if former != mark:
            return mark
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (other, hard))
    except (AttributeError, OSError, ValueError):  # its mark is the variable, or the process is gone
        return mark
    return other


def give_origin(pid: int, mark: int, *, supervisor: int) -> int | None:
    """Set a leader's origin, or clear an inherited one; return it, None if it is unknown or refused."""
    parent = None
    with contextlib.suppress(OSError):
        parent = read_self() if supervisor == os.getpid() else read_process(supervisor)
    is_known = parent is not None and parent.start >= 0
    origin = compute_origin(parent, mark) if parent is not None and is_known else None
    try:
        former, hard = resource.prlimit(pid, resource.RLIMIT_RSS)
        if origin is None and is_mark(former) and is_origin_of(former, mark):
            return former & ~CONDEMNED
        resource.prlimit(pid, resource.RLIMIT_RSS, (hard if origin is None else origin, hard))
    except (AttributeError, OSError, ValueError):  # see give_mark()
        return None
    return origin


def condemn(pid: int, origin: int | None = None) -> None:
    """
    Mark a process as about to be killed. If whoever is about to kill it dies first, a sweep does.

    :param origin: identifies who is about to kill it; None for its own supervisor. That may have died long
        ago: a task within a task has succeeded, and left the process behind.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        former, hard = resource.prlimit(pid, resource.RLIMIT_RSS)
        if is_mark(former):
            resource.prlimit(pid, resource.RLIMIT_RSS, ((origin or former) | CONDEMNED, hard))


def lift_marks() -> None:
    """Remove the marks of all trees that this process is in."""
    for limit in (resource.RLIMIT_RTTIME, RLIMIT_LOCKS, resource.RLIMIT_RSS):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))


def compute_mark(leader: Process) -> int:
    """Return a number of microseconds that no other leader has had since boot."""
    # The ticks of a year take 32 bits.
    return MARK_FLAG | (int(leader.start) << PID_MASK.bit_length() | leader.pid) & MARK_FLAG - 1


def invent_mark(pid: int) -> int:
    """Return a random mark for a leader whose start is not known."""
    return MARK_FLAG | secrets.randbits(MARK_FLAG.bit_length() - 1) & ~PID_MASK | pid


def is_mark(limit: int) -> bool:
    """Whether a limit is a mark. One that is not set is negative."""
    return limit >= MARK_FLAG


def is_mark_of(limit: int, leader: int) -> bool:
    """Whether a limit is the mark of a leader of that number."""
    return is_mark(limit) and limit & PID_MASK == leader


def list_given_marks(leader: Process, limits: Sequence[int], origin: int | None) -> set[int]:
    """
    Return the marks that tell what a leader has started, who may have lifted that limit since, or set it for itself.

    :param limits: the marks that it carries now.
    """
    computed = {compute_mark(leader)} if leader.start >= 0 else set()
    inherited = {origin & ~CONDEMNED} if origin else set()
    return {*limits[:1], *computed, *inherited}


def compute_origin(supervisor: Process, mark: int) -> int:
    """Return a number that identifies the supervisor of a tree, and the tree among this supervisor's."""
    bits = [
        (supervisor.pid, PID_MASK),
        (int(supervisor.start), ORIGIN_START_MASK),
        (fold_mark(mark), ORIGIN_TREE_MASK),
    ]
    origin, shift = MARK_FLAG, 0
    for number, mask in bits:
        origin |= (number & mask) << shift
        shift += mask.bit_length()
    return origin


def fold_mark(mark: int) -> int:
    """Return the part of an origin that identifies the tree of a mark."""
    # Fibonacci hashing: processes that start one after the other differ by little in both PID and start.
    return (mark * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 64 - ORIGIN_TREE_MASK.bit_length()


def is_origin_of(origin: int, mark: int) -> bool:
    """Whether an origin and a mark may be those of the same leader."""
    return origin >> (PID_MASK.bit_length() + ORIGIN_START_MASK.bit_length()) & ORIGIN_TREE_MASK == fold_mark(
        mark
    )


def is_condemned(origin: int) -> bool:
    """Whether the supervisor of a process was about to kill it."""
    return bool(origin & CONDEMNED)


def is_origin_alive(origin: int) -> bool:
    """Whether the supervisor that an origin identifies is there, or may be."""
    pid, start = origin & PID_MASK, origin >> PID_MASK.bit_length() & ORIGIN_START_MASK
    supervisor = look_at(pid)
    if supervisor is not None and supervisor.start >= 0:
        return not supervisor.dead and int(supervisor.start) & ORIGIN_START_MASK == start
    # It may be there, but hidden.
    return is_there(pid)


def read_limits(pid: int) -> tuple[int, ...]:
    """
    Return the marks that a process carries as limits: its own tree's, then that of the tree around it.

    Return its origin alone if it has set the first limit for itself. Return nothing if the process is gone or
    hidden from us, or if the first limit is lifted: then it has left all trees.
    """
    try:
        own, _ = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        around, _ = resource.prlimit(pid, RLIMIT_LOCKS) if is_mark(own) else (0, 0)
        origin, _ = resource.prlimit(pid, resource.RLIMIT_RSS) if 0 <= own < MARK_FLAG else (0, 0)
    except (AttributeError, OSError):
        own, around, origin = read_limits_of_others(pid)
    if is_mark(own):
        return (own, around) if is_mark(around) else (own,)
    return (origin & ~CONDEMNED,) if own >= 0 and is_mark(origin) else ()


def read_origin(pid: int) -> int | None:
    """Return the origin of a process; None if it has none, or is another user's, or gone."""
    try:
        origin, _ = resource.prlimit(pid, resource.RLIMIT_RSS)
    except (AttributeError, OSError):
        return None
    return origin if is_mark(origin) else None


def read_limits_of_others(pid: int) -> tuple[int, int, int]:
    """
    Return the three limits of another user's process, which every user may read in /proc.

    -1 for the first if it is not set, 0 for the others.
    """
    try:
        limits = dict(SOFT_LIMIT.findall(read_entry(pid, "limits")))
    except OSError:
        limits = {}
    return (
        int(limits.get("realtime timeout", -1)),
        int(limits.get("file locks", 0)),
        int(limits.get("resident set", 0)),
    )


def read_variable(pid: int) -> tuple[int, ...]:
    """Return the marks in the environment of a process, its own first; none if that cannot be read."""
    try:
        return parse_variable(psutil.Process(pid).environ())
    except (psutil.Error, OSError):
        return ()


def parse_variable(env: Mapping[str, str]) -> tuple[int, ...]:
    """Return the marks that an environment has, the innermost tree's first."""
    return tuple(
        int(mark) for mark in reversed(env.get(MARK_VARIABLE, "").split(",")) if MARK_TEXT.fullmatch(mark)
    )


def extend_variable(env: Mapping[str, str], mark: int) -> str:
    """Return the variable for a tree of that mark, inside the trees that an environment names."""
    return ",".join(filter(None, [env.get(MARK_VARIABLE), str(mark)]))
