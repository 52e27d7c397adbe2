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

A process belongs to the tree if it carries the leader's mark or origin (see ``marks``), descends from a process
that belongs, or is in a session with one. While the tree runs, this costs one system call whenever the supervisor
looks for the leader's exit.

Where ``/proc`` hides a process of our own user, its parent is unknown. There, a process that has lost its mark
and left the sessions of all others is not found.

If a process belongs to a tree, all processes with the same mark belong to it. So all inner trees belong to the
outer one, even if their supervisors are gone. With three generations, the first finds the third through a process
of the second that is alive, or that an earlier look has seen.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.teardown.exit_status import is_unreaped_child
from airflow.sdk.execution_time.teardown.marks import (
    PID_MASK,
    compute_mark,
    compute_origin,
    condemn,
    give_mark,
    give_origin,
    invent_mark,
    list_given_marks,
    parse_variable,
    read_limits,
    read_origin,
    read_variable,
    replace_mark,
)
from airflow.sdk.execution_time.teardown.processes import (
    HIDDEN_NAME,
    TRANSIENT_ERRORS,
    Process,
    find_group,
    find_session,
    is_own_proc,
    list_pids,
    look_at,
    read_own_start,
    read_self,
    send_signals,
    shorten_name,
)
from airflow.sdk.execution_time.teardown.sudo import SUDO_TIMED_OUT, group_by_owner, send_by_sudo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


Tie = tuple[str, int]
"""A kind and a number that several processes share: ("parent", 4711), ("session", 4711), ("mark", 4711)."""

ENDING_SIGNALS = ("SIGTERM", "SIGKILL")

LEADER_NOT_SEEN = "the task's own process cannot be seen: /proc hides it, or is another PID namespace's"

MAX_LISTINGS = 10
"""At most this many listings of /proc in one look, while listed processes are gone before they are read."""

LOOK_TRIES = 5

LOOK_RETRY_INTERVAL = 0.002
"""Seconds between the tries."""

STOP_POLL_INTERVAL = 0.001
"""Seconds between looks at processes that were sent SIGSTOP and have not stopped yet."""


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
        self._stopped: dict[Process, None] = {}
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
        # A forked child marks itself, too (mark_process); a new interpreter does so only later (follow_spawner).
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
            self._stopped[process] = None
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
            # Race 4: the look has stopped the others.
            untold = [member for member in fresh if member not in self._stopped]
            self._stopped.update(dict.fromkeys(untold))
            self.condemn(untold)
            # Race 3: not only the fresh ones.
            unstoppable.update(
                member for member in untold + running if send_signals(member, (signal.SIGSTOP,)) is False
            )
            if not fresh and not all_stopped:
                # Give the processes time to stop.
                time.sleep(STOP_POLL_INTERVAL)
        # If the last look failed, it has found nobody. Those that earlier looks have stopped are still
        # stopped.
        return sort_to_kill(sent) if self.look_failure else []

    def condemn(self, processes: Iterable[Process]) -> None:
        """Mark each process as about to be killed, so that a sweep kills it if this process dies first."""
        own = read_self()
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


def sort_to_kill(members: Iterable[Process]) -> list[Process]:
    """Return members with children before their parents; see :meth:`ProcessTree.stop`."""
    # Hidden starts count as 0: such processes come last, ordered by PID.
    return sorted(members, key=lambda member: (max(member.start, 0), member.pid), reverse=True)


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
