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
Find and signal every process that a session leader has started, even if it has left the session.

A process belongs to the tree if it carries the leader's *mark*, descends from a process that belongs, or is
in a session with one. The mark is a soft ``RLIMIT_RTTIME`` that no other leader has. This limit concerns
real-time scheduling alone, and its value is too high to be reached. It survives fork, exec, setsid,
``env -i`` and double forks (getrlimit(2)); an environment variable does not. Parent and child both compute
the mark from the leader's PID and start time, so they agree on it without talking. Where they cannot, the one
that sets it first decides. While the tree runs, this costs one system call whenever the supervisor looks for
the leader's exit.

Where ``/proc`` hides a process of our own user (hidepid=1), the kernel still reports its session, its marks
and whether it is alive, but not its parent. There, a process that has lost its mark and left the sessions of
all others is not found.

Trees nest, because a task may supervise tasks itself. The leader of an inner tree gets a mark of its own, and
keeps the mark of the tree around it in ``RLIMIT_LOCKS``, a limit that has no effect and that children inherit
as well. If a process belongs to a tree, all processes with the same mark belong to it. So all inner trees
belong to the outer one, even if their supervisors are gone. With three generations, the first finds the third
through a process of the second that is alive, or that an earlier look has seen.

Besides the mark a leader gets its *origin*, in ``RLIMIT_RSS``, which has no effect either. The origin
identifies the leader's supervisor, and contains a part of the mark. It serves two purposes: ``orphans``
recognises a tree whose supervisor has died, and a look finds a process that has set the limit of the mark for
itself.

A process leaves its tree, and all trees around it, if it detaches (setsid, and a parent that exits) with the
limit lifted: ``prlimit --rttime=unlimited``. A worker that a task starts, or restarts, must be started in
this way. Otherwise the worker, and every task that it runs from then on, ends with that task.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.teardown.exit_status import is_unreaped_child

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence


Tie = tuple[str, int]
"""A kind and a number that several processes share: ("parent", 4711), ("session", 4711), ("mark", 4711)."""

PROC = "/proc"

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

ENDING_SIGNALS = ("SIGTERM", "SIGKILL")

DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

STAT_MAX_BYTES = 4096

STAT_TRIES = 10
"""How often a process is read again that has no thread."""

NAME_MAX_BYTES = 15
"""The kernel keeps this much of the name of a program (prctl(2), PR_SET_NAME)."""

HIDDEN_NAME = "?"

LEADER_NOT_SEEN = "the task's own process cannot be seen: /proc hides it, or is another PID namespace's"

TRANSIENT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""A look that fails with one of these may succeed soon: other threads or processes may free the resource."""

MAX_LISTINGS = 10
"""At most this many listings of /proc in one look, while listed processes are gone before they are read."""

LOOK_TRIES = 5
LOOK_RETRY_INTERVAL = 0.002
"""Seconds between the tries."""

KILL_TIME = 0.8
"""Seconds after the grace period within which all processes have to be dead."""

KILL_WAIT = 0.2
"""Seconds that killed processes have to disappear before the next look."""

LOOK_INTERVAL = 0.5
"""Seconds between looks for processes that others start while they end."""

POLL_INTERVAL = 0.02
"""Seconds between looks at a process that cannot be watched."""

STOP_POLL_INTERVAL = 0.001
"""Seconds between looks at processes that were sent SIGSTOP and have not stopped yet."""

SUDO_TIMEOUT = 1.0
"""Seconds. ``sudo -n`` asks for no password, but may look up its rules over the network."""

SUDO_TIMED_OUT = "sudo did not answer in time"


@dataclass(frozen=True)
class Process:
    """A process, identified by its PID and its start time."""

    pid: int
    start: float
    """
    Clock ticks since boot (proc_pid_stat(5)); without /proc, psutil's creation time.

    Where /proc hides it, less than 0: its inode number there, negated. The next process with the same PID
    gets another number. The kernel may drop the inode if memory is short, and the start becomes readable
    after an exec. The process then counts as another one, and the next look finds it again.
    """
    name: str = field(compare=False)
    parent: int = field(compare=False)
    session: int = field(compare=False)
    stopped: bool = field(compare=False)
    dead: bool = field(compare=False)
    """It is a zombie, whether or not its parent is going to reap it."""


OLDER = Process(0, start=0, name="", parent=0, session=0, stopped=False, dead=True)
"""Stands for any process that is too old to belong to the tree."""


class ProcessTree:
    """The processes that one process, the leader, has started: a child of ours, or an orphan."""

    def __init__(self) -> None:
        self._leader: Process | None = None
        self._oldest = 0.0
        self._mark: int | None = None
        self._read_marks = read_limits
        self._marks: set[int] = set()
        self._foreign_marks: set[int] = set()
        self._is_orphan = False
        self._remembered: dict[int, float] = {}
        self._settled: dict[int, int] = {}
        self._foreign_sessions: set[int] = set()
        self._known_as_spared: dict[int, float] = {}
        self.spared: frozenset[str] = frozenset()
        """Names of programs that are left out, with all their descendants. The leader is never left out."""
        self.sudo_failures: dict[int, str] = {}
        """Why processes of other users could not be signalled, by their uids."""
        self.ends_leftovers = True
        """Whether the deployment wants the processes ended that a task leaves behind."""
        self.end_signals: dict[Process, str] = {}
        """Processes that got an ending signal since the last report, with the last such signal; no leader."""
        self._stopped: list[Process] = []
        self._stops_at_once = False
        self.look_failure: str | None = None
        """Why the last look failed; None if it did not."""

    @property
    def leader(self) -> Process | None:
        """The process that leads the tree, dead or alive."""
        return self._leader

    def set_leader(self, pid: int, mark: int | None = None) -> None:
        """
        Make ``pid`` the leader, and mark it. May be repeated.

        :param pid: a child of ours that leads a session, or is about to.
        :param mark: the mark that it carries already, unless it is the computed one.
        """
        if not is_unreaped_child(pid):
            return
        try:
            # In the /proc of another PID namespace this number is another process.
            leader = look_at(pid) if is_own_proc() else None
            oldest = leader.start if leader and leader.start >= 0 else read_own_start()
        except (OSError, ValueError, IndexError) as error:  # the latter two: a /proc of another make
            self.look_failure = describe(error)
            return
        if leader is None:
            self.look_failure = LEADER_NOT_SEEN
            return
        # It may be dead, and have left processes behind. Its PID cannot be reused before we reap it.
        self._leader = leader
        self._oldest = oldest
        # The leader may still be in our session: it has not opened its own yet, or was not allowed to.
        self._foreign_sessions = {0, os.getsid(0)}
        # It may also still carry our marks only.
        self._foreign_marks = {*read_limits(os.getpid()), *parse_variable(os.environ)}
        mark = mark or self._mark or (invent_mark(pid) if leader.start < 0 else compute_mark(leader))
        origin = give_origin(pid, mark, supervisor=os.getpid())
        # A forked child marks itself, too (mark_process); one that posix_spawn() has started cannot.
        self._mark = give_mark(pid, mark, inherited=self._foreign_marks) or mark
        # The leader may have carried one mark, then the other, and forked a child with each.
        self._marks |= {mark, self._mark}
        if not self._mark & PID_MASK:
            # It took this mark before its PID was known. Put the PID in: it distinguishes a leader from the
            # processes that inherit its mark.
            self._mark = replace_mark(pid, self._mark, compute_mark(leader))
            self._marks.add(self._mark)
        self._read_marks = read_limits if self._mark in read_limits(pid) else read_variable
        if self._mark != mark:
            origin = give_origin(pid, self._mark, supervisor=os.getpid())
        if origin:
            self._marks.add(origin)

    def set_orphaned_leader(
        self, pid: int, start: float, limits: Sequence[int] | None = None, origin: int | None = None
    ) -> None:
        """
        Make ``pid``, whose supervisor is gone, the leader.

        :param start: when it started; see :class:`Process`.
        :param limits: the marks that it carries. Give them if the process may be gone; otherwise they are
            read.
        :param origin: its origin, likewise.
        """
        limits = read_limits(pid) if limits is None else limits
        origin = read_origin(pid) if origin is None else origin
        session = find_session(pid)
        self._is_orphan = True
        self._leader = Process(pid, start, HIDDEN_NAME, 0, session, stopped=False, dead=False)
        self._oldest = max(start, 0)
        # If it could not open a session, it is in that of its supervisor, which other processes share.
        self._foreign_sessions = {0, os.getsid(0), *([] if session == pid else [session])}
        self._foreign_marks = {*limits[1:], *read_limits(os.getpid())}
        self._mark = limits[0] if limits else None
        self._marks = list_given_marks(self._leader, limits, origin)
        self._read_marks = read_limits

    def remember(self) -> None:
        """Record the current members: an unmarked descendant can only be found while its parent is alive."""
        self.find()

    def note_exit(self, tracker: object = None) -> None:
        """
        Record the current members if the leader has ended; to be called just before the leader is reaped.

        Until then its session proves that a process belongs; afterwards the number may be reused. While the
        leader runs, this costs one system call.

        :param tracker: what reaps the leader, from SDK 1.3 on with a ``TimeoutExpired`` of its own.
        :raises psutil.TimeoutExpired: or the tracker's, if the leader runs: reaped now, it might have ended meanwhile,
            unrecorded.
        """
        if self._leader is None:
            return
        exited = is_unreaped_zombie(self._leader.pid)
        if exited:
            self.find()
        elif exited is not None:
            if getattr(tracker, "TimeoutExpired", None) is subprocess.TimeoutExpired:
                raise subprocess.TimeoutExpired(str(self._leader.pid), timeout=0)
            raise psutil.TimeoutExpired(0, pid=self._leader.pid)

    def find(self, *, with_leader: bool = False) -> list[Process]:
        """
        Return the processes of the tree. If the look fails, return none, and say why in ``look_failure``.

        This is one pass over /proc. Entries may vanish meanwhile.
        """
        if self._leader is None:
            return []
        self.look_failure = None
        try:
            members = self._look(self._leader)
        except (OSError, ValueError, IndexError) as error:  # as in set_leader()
            self.look_failure = describe(error)
            return []
        self._remembered.update((pid, process.start) for pid, process in members.items())
        left_out = set(self._find_spared(members, self._leader)) if self.spared else set()
        namesake = members.get(self._leader.pid)
        # Once the leader is reaped, a process that a member starts may get its PID. It is a member, and is
        # not left out. Where the start is hidden, an exec changes it, so a difference in start proves
        # nothing.
        if not with_leader and namesake and (namesake == self._leader or namesake.start < 0):
            left_out.add(namesake.pid)
        return [process for pid, process in members.items() if pid not in left_out]

    def _look(self, leader: Process) -> dict[int, Process]:
        """Return the members by PID; raises OSError if all tries fail, or a retry is of no use."""
        for _ in range(LOOK_TRIES - 1):
            try:
                return self._find_members(*self._read_candidates(), leader)
            except OSError as error:
                if error.errno not in TRANSIENT_ERRORS:
                    raise
            time.sleep(LOOK_RETRY_INTERVAL)
        return self._find_members(*self._read_candidates(), leader)

    def _read_candidates(self) -> tuple[dict[int, Process], dict[int, tuple[int, ...]]]:
        """
        Return the living processes that are not older than the leader, as far as their age is known, and their marks.

        Dead and older processes are read only once. That makes a look cheap on a machine with many processes.
        """
        candidates: dict[int, Process] = {}
        marks: dict[int, tuple[int, ...]] = {}
        settled: dict[int, int] = {}
        seen: set[int] = set()
        for _ in range(MAX_LISTINGS):
            fresh = [entry for entry in list_pids() if entry[0] not in seen]
            vanished = False
            # The highest numbers first: these are most often the youngest, which may soon be gone.
            for pid, identity in reversed(fresh):
                if identity is not None and self._settled.get(pid) == identity:
                    settled[pid] = identity
                elif process := look_at(pid, since=self._oldest):
                    if not process.dead:
                        candidates[pid], marks[pid] = process, self._read_marks(pid)
                        if self._stops_at_once and not self._marks.isdisjoint(marks[pid]):
                            self._stop_at_once(process)
                    elif identity is not None:
                        settled[pid] = identity
                else:
                    vanished = True
            if not vanished:
                break
            # It may have started a successor before it went.
            seen.update(pid for pid, _ in fresh)
        self._settled = settled
        return candidates, marks

    def _stop_at_once(self, process: Process) -> None:
        """Stop a member: when the look is over, it may be gone, and a successor be here."""
        if not process.stopped and process != self._leader and process.pid != os.getpid():
            self._stopped.append(process)
            self.condemn([process])
            send_signals(process, (signal.SIGSTOP,))

    def _find_members(
        self, processes: dict[int, Process], marks: Mapping[int, Sequence[int]], leader: Process
    ) -> dict[int, Process]:
        """Return the members by PID: processes that are known to belong, and all that are tied to these."""
        for nobodys in (0, 1, os.getpid()):
            processes.pop(nobodys, None)

        def is_known(process: Process) -> bool:
            if process == leader or self._remembered.get(process.pid) == process.start:
                return True
            return not self._marks.isdisjoint(marks[process.pid])

        def list_ties(member: Process) -> list[Tie]:
            ties = list_descent(member)
            if member.session not in self._foreign_sessions:
                ties.append(("session", member.session))
            # Perhaps the mark of an inner tree, of which only this member is known.
            ties += [("mark", mark) for mark in marks[member.pid][:1] if mark not in self._foreign_marks]
            return ties

        seeds = {process.pid: process for process in processes.values() if is_known(process)}
        session = [("session", leader.pid)] if self._has_number(leader) else []
        members = add_tied(processes, seeds, list_ties, session, marks)
        self._marks |= {mark for pid in members for mark in marks[pid][:1]} - self._foreign_marks
        return members

    def _has_number(self, leader: Process) -> bool:
        """Whether the leader still has its PID, and with it the session of that number."""
        return look_at(leader.pid) == leader if self._is_orphan else is_unreaped_leader(leader)

    def _find_spared(self, members: dict[int, Process], leader: Process) -> dict[int, Process]:
        """Return the members to leave alone, by PID. Descendants stay spared when their ancestor is gone."""
        names = set(map(shorten_name, self.spared))
        chosen = {
            process.pid: process
            for process in members.values()
            if process != leader
            and (
                shorten_name(process.name) in names or self._known_as_spared.get(process.pid) == process.start
            )
        }
        spared = add_tied(members, chosen, list_descent)
        self._known_as_spared.update((pid, process.start) for pid, process in spared.items())
        return spared

    def stop(self, time_limit: float, *, with_leader: bool = False) -> list[Process]:
        """
        Stop the processes of the tree, so that none can start another; return them in the order to kill.

        Children come before their parents. If a process group loses its last tie to its session, it is
        orphaned, and the kernel continues its stopped members (setpgid(2)). Those could fork until it is
        their turn to be killed.

        Processes of other users are not stopped: sudo may be slow, and the time may then be too short for a
        second sudo, which kills them.

        There are four races:

        1. A process is listed, starts a successor, and exits before the look reads it. The look then sees
           nobody. So the tree is empty only if two looks in a row find nobody.
        2. A process that is in the middle of a fork stops only after it, and the look may already have passed
           the place where the child appears. So the last look is one that began after all members were seen
           stopped.
        3. Another process continues what was stopped: a watchdog of the same tree does so before it is stopped
           itself. So whatever runs again is stopped again.
        4. A process starts its successor, and exits, faster than a look takes. So a look stops whatever
           carries a mark of the tree when it reads it, unless a program is to be spared: who descends from
           one is known only after the look.

        :param time_limit: seconds to wait for processes that a busy machine does not let run, or that do not
            stop because they are in an uninterruptible sleep.
        """
        self._stopped.clear()
        self._stops_at_once = not self.spared
        try:
            return self._stop(time.monotonic() + time_limit, with_leader=with_leader)
        finally:
            self._stops_at_once = False

    def _stop(self, deadline: float, *, with_leader: bool) -> list[Process]:
        sent: set[Process] = set()
        unstoppable: set[Process] = set()
        all_stopped = False
        # Race 1: look twice.
        while members := self.find(with_leader=with_leader) or self.find(with_leader=with_leader):
            fresh = [member for member in members if member not in sent]
            # Race 2: return only what a look has found that began after all_stopped was set.
            overdue = bool(sent) and time.monotonic() > deadline
            if overdue or (all_stopped and not fresh):
                return sort_to_kill(members)
            running = [
                member
                for member in members
                if member in sent and not member.stopped and member not in unstoppable
            ]
            all_stopped = not fresh and not running
            sent.update(fresh)
            self._stopped.extend(fresh)
            self.condemn(fresh)
            # Race 3: not only the fresh ones.
            unstoppable.update(
                member for member in fresh + running if send_signals(member, (signal.SIGSTOP,)) is False
            )
            if not fresh and not all_stopped:
                # Give the processes time to stop.
                time.sleep(STOP_POLL_INTERVAL)
        # If the last look failed, it has found nobody. Those that earlier looks have stopped are still
        # stopped.
        return sort_to_kill(sent) if self.look_failure else []

    def condemn(self, processes: Iterable[Process]) -> None:
        """Mark each process as about to be killed, so that a sweep kills it if this process dies first."""
        own = _read_self(os.getpid())
        origin = compute_origin(own, self._mark) if own and own.start >= 0 and self._mark else None
        if origin:
            self._marks.add(origin)
        for process in processes:
            condemn(process.pid, origin)

    def kill_all(
        self, time_limit: float, *, with_leader: bool = False, deadline: float = math.inf
    ) -> list[Process]:
        """
        Stop and kill the processes of the tree in one step: even an exception leaves none stopped.

        :param time_limit: seconds to wait for processes that do not stop.
        :param deadline: when to give up waiting for sudo, by time.monotonic().
        :returns: the processes that it has killed, in that order.
        """
        members: list[Process] = []
        try:
            members = self.stop(time_limit, with_leader=with_leader)
        finally:
            # After an exception there are no members: kill all that were stopped.
            self.signal(members or self._stopped, signal.SIGKILL, deadline=deadline)
        return members

    def signal_group(self, sig: int) -> bool:
        """Send ``sig`` to each member of the leader's process group that is not spared; False if there is none."""
        leader = self._leader
        group = [
            member
            for member in self.find(with_leader=True)
            if leader is not None and find_group(member.pid) == leader.pid
        ]
        self._send(group, sig)
        return bool(group)

    def signal_leader(self, sig: int) -> bool:
        """Send ``sig`` to the leader alone; False if there is none."""
        if self._leader is None:
            return False
        self._send([recognise(self._leader)], sig)
        return True

    def signal(self, processes: Iterable[Process], *signals: int, deadline: float = math.inf) -> None:
        """
        Send the signals to each process whose PID was not reused, and record the ending signals in ``end_signals``.

        :param deadline: when to give up waiting for sudo, by time.monotonic().
        """
        delivered = self._send(processes, *signals, deadline=deadline)
        for sig in map(signal.Signals, signals):
            if sig.name in ENDING_SIGNALS:
                self.end_signals.update(
                    (process, sig.name) for process in delivered if process != self._leader
                )

    def _send(self, processes: Iterable[Process], *signals: int, deadline: float = math.inf) -> list[Process]:
        """
        Send the signals to each process whose PID was not reused; through sudo if it is another user's.

        :returns: the processes that have got them.
        """
        sent = {process: send_signals(process, signals) for process in processes}
        delivered = [process for process, outcome in sent.items() if outcome]
        denied = [process for process, outcome in sent.items() if outcome is False]
        if not denied:
            return delivered
        by_owner = group_by_owner(denied)
        for sig in signals:
            asked = {uid: owned for uid, owned in by_owner.items() if self._is_sudo_worth_asking(uid, sig)}
            for uid, failure in send_by_sudo(asked, sig, deadline).items():
                self.sudo_failures.pop(uid, None)
                if failure:
                    self.sudo_failures[uid] = failure
        return delivered + [
            process for uid, owned in by_owner.items() if uid not in self.sudo_failures for process in owned
        ]

    def _is_sudo_worth_asking(self, uid: int, sig: int) -> bool:
        # sudo mails the administrator about every refusal, so do not ask again. A timeout may be transient:
        # retry for SIGKILL, when it matters most.
        failure = self.sudo_failures.get(uid)
        return failure is None or (failure == SUDO_TIMED_OUT and sig == signal.SIGKILL)


def describe(error: Exception) -> str:
    """Return what went wrong, without the path."""
    return getattr(error, "strerror", None) or str(error)


def find_session(pid: int) -> int:
    """Return the session that a process is in, 0 if it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def find_group(pid: int) -> int | None:
    """Return the process group that a process is in, None if it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def sort_to_kill(members: Iterable[Process]) -> list[Process]:
    """Return members with children before their parents; see :meth:`ProcessTree.stop`."""
    # Hidden starts count as 0: such processes come last, ordered by PID.
    return sorted(members, key=lambda member: (max(member.start, 0), member.pid), reverse=True)


def is_own_proc() -> bool:
    """Whether /proc, if there is one, belongs to our PID namespace (pid_namespaces(7))."""
    try:
        return os.readlink(f"{PROC}/self") == str(os.getpid())
    except FileNotFoundError:
        return True


def is_in_own_namespace(pid: int) -> bool:
    """Whether a process is in our PID namespace, and not in one below it, where PIDs mean other processes."""
    try:
        with open(f"{PROC}/{pid}/status") as lines:
            numbers = next((line for line in lines if line.startswith("NSpid:")), "")
    except OSError:  # closed to us (hidepid), or gone
        return True
    return len(numbers.split()) <= len(("NSpid:", pid))


def is_unreaped_leader(leader: Process) -> bool:
    """
    Whether the leader, a child of ours, still has its PID, and with it the session of that number.

    The kernel does not reuse the number before the leader is reaped, nor while a member is in the session.
    After that the number proves nothing, whether or not a look has found the session empty: even another
    child of ours may have it.
    """
    return is_unreaped_child(leader.pid) and look_at(leader.pid) in (leader, None)


def recognise(leader: Process) -> Process:
    """Return our child as /proc shows it now: an exec may make its start readable, or hide it."""
    with contextlib.suppress(OSError):
        now = look_at(leader.pid)
        if now and min(now.start, leader.start) < 0 and is_unreaped_child(leader.pid):
            return now
    return leader


def is_unreaped_zombie(child: int) -> bool | None:
    """Whether a child of ours has ended, and is still to be collected; None if that is unknown."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except (AttributeError, OSError):  # other code has reaped it, or the call is missing or refused
        return None


def add_tied(
    processes: dict[int, Process],
    seeds: dict[int, Process],
    list_ties: Callable[[Process], list[Tie]],
    further: Iterable[Tie] = (),
    marks: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> dict[int, Process]:
    """
    Return the seeds and all processes tied to them, directly or through others, by PID.

    :param list_ties: returns the ties of a process. Every process that shares one is tied to it.
    :param further: more ties of the seeds.
    :param marks: the marks that the processes carry, by PID.
    """
    tied: dict[Tie, list[Process]] = {}
    for process in processes.values():
        if process.pid in seeds:
            continue
        tied.setdefault(("parent", process.parent), []).append(process)
        tied.setdefault(("session", process.session), []).append(process)
        for mark in marks.get(process.pid, ()):
            tied.setdefault(("mark", mark), []).append(process)
    found = dict(seeds)
    # A set, because most seeds share a session and a mark.
    unvisited = {*further, *(tie for seed in seeds.values() for tie in list_ties(seed))}
    while unvisited and tied:
        # Follow each tie once.
        for process in tied.pop(unvisited.pop(), ()):
            if process.pid not in found:
                found[process.pid] = process
                unvisited.update(list_ties(process))
    return found


def list_descent(process: Process) -> list[Tie]:
    """Return the ties of a process to its children."""
    return [("parent", process.pid)]


def shorten_name(name: str) -> str:
    """Return as much of a program's name as the kernel keeps."""
    return os.fsencode(name)[:NAME_MAX_BYTES].decode(errors="replace")


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
    if give_mark(own.pid, mark, inherited=inherited) is None:
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


def give_origin(pid: int, mark: int, *, supervisor: int) -> int | None:
    """Set a leader's origin, or clear an inherited one; return it, None if it is unknown or refused."""
    parent = None
    with contextlib.suppress(OSError):
        parent = _read_self(supervisor) if supervisor == os.getpid() else read_process(supervisor)
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


def is_there(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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


def extend_variable(env: Mapping[str, str], mark: int) -> str:
    """Return the variable for a tree of that mark, inside the trees that an environment names."""
    return ",".join(filter(None, [env.get(MARK_VARIABLE), str(mark)]))


def compute_mark(leader: Process) -> int:
    """Return a number of microseconds that no other leader has had since boot."""
    # The ticks of a year take 32 bits.
    return MARK_FLAG | (int(leader.start) << PID_MASK.bit_length() | leader.pid) & MARK_FLAG - 1


def list_given_marks(leader: Process, limits: Sequence[int], origin: int | None) -> set[int]:
    """
    Return the marks that tell what a leader has started, who may have lifted that limit since, or set it for itself.

    :param limits: the marks that it carries now.
    """
    computed = {compute_mark(leader)} if leader.start >= 0 else set()
    inherited = {origin & ~CONDEMNED} if origin else set()
    return {*limits[:1], *computed, *inherited}


def invent_mark(pid: int) -> int:
    """Return a random mark for a leader whose start is not known."""
    return MARK_FLAG | secrets.randbits(MARK_FLAG.bit_length() - 1) & ~PID_MASK | pid


def is_mark(limit: int) -> bool:
    """Whether a limit is a mark. One that is not set is negative."""
    return limit >= MARK_FLAG


def is_mark_of(limit: int, leader: int) -> bool:
    """Whether a limit is the mark of a leader of that number."""
    return is_mark(limit) and limit & PID_MASK == leader


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
        with open(f"{PROC}/{pid}/limits") as lines:
            limits = dict(SOFT_LIMIT.findall(lines.read()))
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


def list_pids() -> list[tuple[int, int | None]]:
    """
    Return the PIDs that we may see, each with an identity that changes on reuse (None if unknown).

    The identity is the inode number. The kernel makes an inode for a process when it is first looked up, and
    drops it when the process is reaped (proc_flush_pid(), Linux 5.6). So a listing alone recognises processes
    that were read before.

    :raises OSError: if /proc is there, but cannot be listed because a file descriptor or memory is lacking.
    """
    try:
        # Read it to its end, and close it: its descriptor may be the last one, which look_at() needs.
        with os.scandir(PROC) as entries:
            return [(int(entry.name), entry.inode()) for entry in entries if entry.name.isdigit()]
    except FileNotFoundError:
        return [(pid, None) for pid in psutil.pids()]


def read_process(pid: int) -> Process | None:
    """Return the process, None if it is dead, a zombie, or hidden from us; raises as :func:`look_at` does."""
    process = look_at(pid)
    return None if process is None or process.dead else process


@functools.lru_cache(maxsize=1)
def _read_self(pid: int) -> Process | None:
    """Return this process, read once: just after a fork the kernel takes a millisecond to read it."""
    return read_process(pid)


if hasattr(os, "register_at_fork"):
    # A forked child may get the number that was read: in another PID namespace, or when the process is gone.
    os.register_at_fork(after_in_child=_read_self.cache_clear)


def read_own_start() -> float:
    """Return when this process started; all its children are younger. 0 if that is unknown."""
    own = _read_self(os.getpid())
    return own.start if own else 0


def look_at(pid: int, *, since: float = 0) -> Process | None:
    """
    Return the process, even a zombie; None if there is none, or if it is hidden from us.

    :param since: for a process that started earlier than this, return OLDER and skip the rest of the parsing
        (a third of the cost). A busy machine has thousands of them.
    :raises OSError: if a file descriptor or memory is lacking.
    """
    try:
        name, state, parent, session, *others = _read_stat(pid)
        for _ in range(STAT_TRIES):
            if int(others[13]):
                break
            # It is gone, or a thread other than its first is calling execve(): then it looks so for a moment.
            name, state, parent, session, *others = _read_stat(pid)
    except (FileNotFoundError, NotADirectoryError):
        return None if os.path.exists(f"{PROC}/self/stat") else _ask_psutil(pid, since)
    except ProcessLookupError:  # gone between open and read
        return None
    except PermissionError:
        return _ask_kernel(pid)
    start = int(others[15])
    if start < since:
        return OLDER
    return Process(
        pid,
        start=start,
        name=name.decode(errors="replace"),
        parent=int(parent),
        session=int(session),
        stopped=state in b"Tt",
        # A process whose first thread has ended looks like a zombie as long as the others run.
        dead=state in b"ZXx" and int(others[13]) <= 1,
    )


def _read_stat(pid: int) -> list[bytes]:
    """Return the name, state, parent, session and the fields from the seventh on of /proc/PID/stat."""
    stat = _read_file(f"{PROC}/{pid}/stat")
    # The name may contain anything, even parentheses and spaces.
    name, _, rest = stat.partition(b"(")[2].rpartition(b")")
    state, parent, _, session, *others = rest.split(None, 21)
    return [name, state, parent, session, *others]


def _read_file(path: str) -> bytes:
    """Return a small file, at a third of the cost of open(): a look reads one for each process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, STAT_MAX_BYTES)
    finally:
        os.close(descriptor)


def _ask_kernel(pid: int) -> Process | None:
    """
    Return a process of our own user whose entry in /proc is closed to us; None if it is another user's.

    Where /proc is mounted with hidepid=1, the entries of processes that are not dumpable (prctl(2)) are
    closed. A supervisor of SDK 1.2 or later makes itself one, and with it the processes that it forks. For
    the calls below the kernel checks only the user.
    """
    try:
        resource.prlimit(pid, resource.RLIMIT_RTTIME)
        return Process(
            pid,
            start=-os.stat(f"{PROC}/{pid}").st_ino,
            name=HIDDEN_NAME,
            parent=0,
            session=os.getsid(pid),
            # It is unknown, so do not wait for the process to stop.
            stopped=True,
            dead=is_zombie_or_gone(pid),
        )
    except AttributeError:  # no such call, or no such limit
        return None
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return None


def is_zombie_or_gone(pid: int) -> bool:
    """Whether a process is a zombie, or gone; False where only /proc could say so."""
    try:
        pidfd = os.pidfd_open(pid)
    except AttributeError:
        return False
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return (
            error.errno == errno.ESRCH
        )  # otherwise older than Linux 5.3, or a sandbox that does not know the call
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(pidfd)


def _ask_psutil(pid: int, since: float) -> Process | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.create_time() < since:
                return OLDER
            status = process.status()
            return Process(
                pid,
                start=process.create_time(),
                name=process.name(),
                parent=process.ppid(),
                session=os.getsid(pid),
                stopped=status in STOPPED,
                dead=status in DEAD,
            )
    except (psutil.Error, OSError):
        return None


def is_alive(process: Process) -> bool:
    """Whether this process, and no other with its PID, still runs; True if that is unknown."""
    try:
        now = read_process(process.pid)
    except OSError:
        return True
    return now is not None and now.start == process.start


def send_signals(process: Process, signals: Iterable[int]) -> bool | None:
    """Signal a process; None if it has ended, and another may have its PID, False if that is not allowed."""
    pidfd = None
    with contextlib.suppress(AttributeError, OSError):  # no pidfd, none left, or the process is gone
        pidfd = os.pidfd_open(process.pid)
    try:
        # With a pidfd, a process that passes this check is the one that is signalled. Without one, the PID
        # may still be reused between the check and the signal, which is unlikely.
        if not is_alive(process):
            return None
        for sig in signals:
            if pidfd is None:
                os.kill(process.pid, sig)
            else:
                signal.pidfd_send_signal(pidfd, sig)
    except ProcessLookupError:
        return None
    except PermissionError:
        return False
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return True


def send_by_sudo(
    by_owner: Mapping[int, Sequence[Process]], sig: int, deadline: float = math.inf
) -> dict[int, str | None]:
    """
    Signal processes of other users, as that user or as root, whichever the sudoers permit; all users at once.

    :param by_owner: the processes by the uids of their owners.
    :param deadline: when to give up waiting, by time.monotonic().
    :returns: by uid, why sudo failed, None if it did not.
    """
    sudo = shutil.which("sudo")
    if sudo is None:
        return dict.fromkeys(by_owner, "there is no sudo")
    kills = {
        uid: ["kill", f"-{int(sig)}", *(str(process.pid) for process in owned)]
        for uid, owned in by_owner.items()
    }
    failures = run_all({uid: [sudo, "-n", "-u", f"#{uid}", *kill] for uid, kill in kills.items()}, deadline)
    refused = [uid for uid, failure in failures.items() if uid and failure not in (None, SUDO_TIMED_OUT)]
    failures.update(run_all({uid: [sudo, "-n", *kills[uid]] for uid in refused}, deadline))
    return {
        uid: failure if failure and not is_harmless(failure, by_owner[uid]) else None
        for uid, failure in failures.items()
    }


def is_harmless(failure: str, processes: Sequence[Process]) -> bool:
    """Whether sudo has run kill, which fails if one process has ended meanwhile, but signals the others."""
    ended = [not is_alive(process) for process in processes]
    return any(ended) if failure.startswith("kill: ") else all(ended)


def group_by_owner(processes: Iterable[Process]) -> dict[int, list[Process]]:
    """Return the processes that still run, by the uid that they run as."""
    groups: dict[int, list[Process]] = {}
    for process in filter(is_alive, processes):
        # psutil does not wrap the OSError for a lack of file descriptors.
        with contextlib.suppress(psutil.Error, OSError):
            groups.setdefault(psutil.Process(process.pid).uids().effective, []).append(process)
    return groups


def run_all(commands: Mapping[int, list[str]], deadline: float = math.inf) -> dict[int, str | None]:
    """
    Run one sudo for each user, at the same time; return why they failed, None where one did not.

    :param deadline: by time.monotonic(); each has SUDO_TIMEOUT at most.
    """
    deadline = min(deadline, time.monotonic() + SUDO_TIMEOUT)
    running = {uid: start_sudo(command) for uid, command in commands.items()}
    return {
        uid: started if isinstance(started, str) else wait_for_sudo(started, deadline)
        for uid, started in running.items()
    }


def start_sudo(command: list[str]) -> subprocess.Popen[str] | str:
    """Start sudo; return why it could not be started, if so."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return str(error)


def wait_for_sudo(process: subprocess.Popen[str], deadline: float) -> str | None:
    """Wait until sudo has ended; return why it failed, None if it did not."""
    try:
        _, complaint = process.communicate(timeout=max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        # subprocess.run() would wait for ever here: sudo has become root, so that we may not be allowed to
        # kill it.
        with contextlib.suppress(PermissionError):
            process.kill()
            process.wait()
        return SUDO_TIMED_OUT
    return (complaint.strip() or f"sudo ended with {process.returncode}") if process.returncode else None
