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
Find and signal every process that a session leader has started, whatever became of it since.

A process belongs to the tree if it carries the leader's *mark*, or descends from a process that belongs, or is in
a session with one. The mark is a soft ``RLIMIT_RTTIME`` that no other leader has. The limit concerns real-time
scheduling alone, is far beyond reach, and survives fork, exec, setsid, ``env -i`` and double forks (getrlimit(2)),
which an environment variable does not. It is computed from the leader's PID and start time, so that parent and
child agree on it without talking; where they cannot, whoever sets it first decides. Nothing is done or kept while the
tree runs.

Where ``/proc`` hides a process of our own user (hidepid=1), the kernel still tells its session, its marks and whether
it is alive, but not its parent: what has lost its mark there, and left the sessions of all others, is not found.

Trees nest: a task may supervise tasks itself. The leader of an inner tree gets a mark of its own, and keeps that of
the tree around it in ``RLIMIT_LOCKS``, a limit that nobody heeds, and that is inherited alike. Whoever belongs to a
tree brings into it what carries the same mark, so that all inner trees belong to the outer one, also those whose
supervisor has gone. Of three generations the first finds the third by somebody of the second who is alive, or was
seen in an earlier look.

Beside the mark a leader gets its *origin*, in ``RLIMIT_RSS``, which nobody heeds either: who its supervisor is, and a
part of the mark. By it a tree whose supervisor has died is told from others (child_orphan), and a process is found
that has set the limit of the mark for itself.

A process leaves its tree, and all around it, by detaching (setsid, and a parent that exits) with the limit lifted,
for which ``prlimit --rttime=unlimited`` serves. A worker that a task starts, or starts again, has to be started so:
otherwise it, and every task that it runs from then on, ends with that task.

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import errno
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

from airflow.sdk.execution_time.child_status import is_unreaped_child

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

__all__ = ["Process", "ProcessTree"]

Tie = tuple[str, int]
"""What several processes have in common, by its kind: ("parent", 4711), ("session", 4711), ("mark", 4711)."""

PROC = "/proc"

MARK_FLAG = 1 << 62
"""In every mark, which is thereby some 10^5 years as a number of microseconds."""

PID_BITS = (1 << 22) - 1
"""The part of a mark that is the leader's PID, which has 22 bits at most (proc_sys_kernel(5))."""

ORIGIN_START_BITS = (1 << 20) - 1
"""The part of an origin that is the end of the supervisor's start; the one to its right is the supervisor's PID."""

ORIGIN_TREE_BITS = (1 << 19) - 1
"""The part of an origin, to the left of that, which tells the trees of one supervisor apart."""

CONDEMNED = 1 << 61
"""In the origin of a process that its supervisor was about to kill."""

RLIMIT_LOCKS = 10
"""Has had no effect since Linux 2.4 (getrlimit(2)), and no name in Python."""

SOFT_LIMIT = re.compile(r"^Max (realtime timeout|file locks|resident set) +(\d+)", re.MULTILINE)
"""A line of /proc/PID/limits that may be a mark; another one says "unlimited"."""

MARK_VARIABLE = "_AIRFLOW_PROCESS_TREE"
"""Carries the mark where the limit cannot be set."""

ENDING_SIGNALS = frozenset((signal.SIGTERM, signal.SIGKILL))

DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

STAT_MAX_BYTES = 4096

NAME_MAX_BYTES = 15
"""What the kernel keeps of the name of a program (prctl(2), PR_SET_NAME)."""

HIDDEN_NAME = "?"

LEADER_NOT_SEEN = "the task's own process cannot be seen: /proc hides it, or is another PID namespace's"

TRANSIENT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What a look fails with for want of something that other threads or processes may give back any moment."""

LOOK_TRIES = 5
LOOK_RETRY_INTERVAL = 0.002
"""Seconds between the tries."""

STOP_POLL_INTERVAL = 0.001
"""Seconds between looks at processes that were sent SIGSTOP, and have not come to it."""

SUDO_TIMEOUT = 1.0
"""Seconds; ``sudo -n`` asks nobody, but may look for its rules in the network."""

SUDO_TIMED_OUT = "sudo did not answer in time"


@dataclass(frozen=True)
class Process:
    """A process. Its PID and its start tell it from every other."""

    pid: int
    start: float
    """
    Clock ticks since boot (proc_pid_stat(5)), elsewhere what psutil calls the creation time.

    Where /proc hides it, less than 0: the number of its inode there, negated, which the next process of its PID does
    not get. It may lose it to a want of memory, and does so when its entry opens, as by an exec: it counts as another
    process then, and is found again.
    """
    name: str = field(compare=False)
    parent: int = field(compare=False)
    session: int = field(compare=False)
    stopped: bool = field(compare=False)
    dead: bool = field(compare=False)
    """It is a zombie, whether or not somebody is going to reap it."""


OLDER = Process(0, start=0, name="", parent=0, session=0, stopped=False, dead=True)
"""Stands for any process that started before those that are looked for."""


class ProcessTree:
    """The processes that one child of ours, the leader of a session, has started."""

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
        """Names of programs that are left out, with all that descends from them; the leader never is."""
        self.sudo_failures: dict[int, str] = {}
        """Why processes of other users could not be signalled, by their uids."""
        self.ends = True
        """Whether the deployment has what a task leaves behind ended."""
        self.ended: dict[Process, str] = {}
        """Those that were asked to end or killed, by the last signal, since this was last reported; not the leader."""
        self._stopped: list[Process] = []
        self.look_failure: str | None = None
        """Why the last look, or any, has found nothing, if it could not be taken."""

    @property
    def leader(self) -> Process | None:
        """The process that leads the tree, dead or alive."""
        return self._leader

    def adopt(self, pid: int, mark: int | None = None) -> None:
        """
        Make ``pid``, a child of ours that leads a session or is about to, the leader, and mark it. May be repeated.

        :param mark: what it carries already, unless that is computed from it.
        """
        if not is_unreaped_child(pid):
            return
        try:
            # A /proc of another PID namespace knows somebody else by that number.
            leader = look_at(pid) if is_own_proc() else None
            oldest = leader.start if leader and leader.start >= 0 else read_own_start()
        except (OSError, ValueError, IndexError) as error:  # the latter two: a /proc of another make
            self.look_failure = getattr(error, "strerror", None) or str(error)
            return
        if leader is None:
            self.look_failure = LEADER_NOT_SEEN
            return
        # It may be dead, and have left something behind; nobody has its number before it is collected.
        self._leader = leader
        self._oldest = oldest
        # It may not have opened its own yet, or not be allowed to.
        self._foreign_sessions = {0, os.getsid(0)}
        # Nor have marked itself.
        self._foreign_marks = {*read_limits(os.getpid()), *parse_variable(os.environ)}
        mark = mark or self._mark or (invent_mark(pid) if leader.start < 0 else compute_mark(leader))
        origin = give_origin(pid, mark, supervisor=os.getpid())
        # A forked child does the same (mark_process); one that posix_spawn() has started cannot.
        self._mark = give_mark(pid, mark, inherited=self._foreign_marks) or mark
        # A child may have been forked while the leader had the one of two.
        self._marks |= {mark, self._mark}
        if not self._mark & PID_BITS:
            # It took this mark before its number was known, by which a leader is told from those that inherit its mark.
            self._mark = replace_mark(pid, self._mark, compute_mark(leader))
            self._marks.add(self._mark)
        self._read_marks = read_limits if self._mark in read_limits(pid) else read_variable
        if self._mark != mark:
            origin = give_origin(pid, self._mark, supervisor=os.getpid())
        if origin:
            self._marks.add(origin)

    def adopt_orphan(
        self, pid: int, start: float, limits: Sequence[int] | None = None, origin: int | None = None
    ) -> None:
        """
        Make ``pid``, whose supervisor is gone, the leader.

        :param start: when it started; see :class:`Process`.
        :param limits: the marks that it carries, unless they are to be read; it may be gone.
        :param origin: its origin, likewise.
        """
        limits = read_limits(pid) if limits is None else limits
        origin = read_origin(pid) if origin is None else origin
        session = find_session(pid)
        self._is_orphan = True
        self._leader = Process(pid, start, HIDDEN_NAME, 0, session, stopped=False, dead=False)
        self._oldest = max(start, 0)
        # It is in that of its supervisor, and of others, if it could not open its own.
        self._foreign_sessions = {0, os.getsid(0), *([] if session == pid else [session])}
        self._foreign_marks = {*limits[1:], *read_limits(os.getpid())}
        self._mark = limits[0] if limits else None
        # It may have lifted that limit, or set it for itself, when it had started something already.
        self._marks = {*limits[:1], *([compute_mark(self._leader)] if start >= 0 else [])}
        self._marks |= {origin & ~CONDEMNED} if origin else set()
        self._read_marks = read_limits

    def remember(self) -> None:
        """Note who belongs now: a descendant without a mark is lost once its ancestors are dead."""
        self.find()

    def note_exit(self) -> None:
        """
        Look, if the leader has ended: its session is proof only until it is collected, which is when to call this.

        It costs one system call while the leader runs.
        """
        if self._leader is not None and has_exited(self._leader.pid):
            self.find()

    def find(self, *, with_leader: bool = False) -> list[Process]:
        """
        Return the processes of the tree; none if they cannot be looked for, when ``look_failure`` says why.

        One pass; entries may vanish meanwhile.
        """
        if self._leader is None:
            return []
        self.look_failure = None
        try:
            members = self._look(self._leader)
        except (OSError, ValueError, IndexError) as error:  # the latter two: a /proc of another make
            self.look_failure = getattr(error, "strerror", None) or str(error)
            return []
        self._remembered.update((pid, process.start) for pid, process in members.items())
        left_out = set(self._find_spared(members, self._leader)) if self.spared else set()
        namesake = members.get(self._leader.pid)
        # What a member has started may get the leader's number when that is collected. Where the start is hidden, an
        # exec changes it.
        if not with_leader and namesake and (namesake == self._leader or namesake.start < 0):
            left_out.add(namesake.pid)
        return [process for pid, process in members.items() if pid not in left_out]

    def _look(self, leader: Process) -> dict[int, Process]:
        """Return the members by PID; raises OSError if that fails repeatedly, or has no prospect."""
        for _ in range(LOOK_TRIES - 1):
            try:
                return self._find_members(self._read_candidates(), leader)
            except OSError as error:
                if error.errno not in TRANSIENT_ERRORS:
                    raise
            time.sleep(LOOK_RETRY_INTERVAL)
        return self._find_members(self._read_candidates(), leader)

    def _read_candidates(self) -> dict[int, Process]:
        """
        Return the processes alive that are not older than the leader, as far as that can be told.

        The others are read once, which is what makes a look cheap on a machine with many processes.
        """
        candidates, settled = {}, {}
        for pid, identity in list_pids():
            if identity is not None and self._settled.get(pid) == identity:
                settled[pid] = identity
            elif process := look_at(pid, since=self._oldest):
                if not process.dead:
                    candidates[pid] = process
                elif identity is not None:
                    settled[pid] = identity
        self._settled = settled
        return candidates

    def _find_members(self, processes: dict[int, Process], leader: Process) -> dict[int, Process]:
        """Return those that belong, by PID: the ones that can be told by themselves, and what is tied to these."""
        for nobodys in (0, 1, os.getpid()):
            processes.pop(nobodys, None)

        marks = {pid: self._read_marks(pid) for pid in processes}

        def is_known(process: Process) -> bool:
            if process == leader or self._remembered.get(process.pid) == process.start:
                return True
            return not self._marks.isdisjoint(marks[process.pid])

        def list_ties(member: Process) -> list[Tie]:
            ties = list_descent(member)
            if member.session not in self._foreign_sessions:
                ties.append(("session", member.session))
            # That of a tree within this one, be it known by nothing else than this member.
            ties += [("mark", mark) for mark in marks[member.pid][:1] if mark not in self._foreign_marks]
            return ties

        seeds = {process.pid: process for process in processes.values() if is_known(process)}
        session = [("session", leader.pid)] if self._has_number(leader) else []
        members = add_tied(processes, seeds, list_ties, session, marks)
        self._marks |= {mark for pid in members for mark in marks[pid][:1]} - self._foreign_marks
        return members

    def _has_number(self, leader: Process) -> bool:
        """Whether the leader still has its number, and with it the session of that number."""
        return look_at(leader.pid) == leader if self._is_orphan else is_uncollected(leader)

    def _find_spared(self, members: dict[int, Process], leader: Process) -> dict[int, Process]:
        """Return the members to be left alone, by PID. What was seen below one of them stays so when that is gone."""
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
        Stop the processes of the tree, so that none can start another, and return them in the order to kill them in.

        Children come before their parents: a group that loses its last tie to its session is orphaned, and the kernel
        then continues those of it that are stopped (setpgid(2)), which could fork until their own turn comes.

        :param time_limit: seconds to wait for those that do not get to run, on a machine that is busy, or do not
            stop, in an uninterruptible sleep.
        """
        sent: set[Process] = set()
        self._stopped.clear()
        all_stopped = False
        deadline = time.monotonic() + time_limit
        # Who starts a successor and exits, once the processes are listed and before its own turn to be read, leaves nobody
        # in sight: that nobody is there takes two looks.
        while members := self.find(with_leader=with_leader) or self.find(with_leader=with_leader):
            fresh = [member for member in members if member not in sent]
            # Whoever is in the middle of a fork stops only after it, and a look may have passed the place where the
            # child appears. So the last look is one that began when all had been seen stopped.
            overdue = bool(sent) and time.monotonic() > deadline
            if overdue or (all_stopped and not fresh):
                return sort_to_kill(members)
            all_stopped = not fresh and all(member.stopped for member in members)
            sent.update(fresh)
            self._stopped.extend(fresh)
            self.condemn(fresh)
            self._send(fresh, signal.SIGSTOP, deadline=deadline)
            if not fresh and not all_stopped:
                # Let those run that are to stop.
                time.sleep(STOP_POLL_INTERVAL)
        # A look that failed has found nobody, which does not continue those that the looks before have stopped.
        return sort_to_kill(sent) if self.look_failure else []

    def condemn(self, processes: Iterable[Process]) -> None:
        """Note at each process that it is to end, for whoever finds it without a supervisor."""
        for process in processes:
            condemn(process.pid)

    def kill_all(
        self, time_limit: float, *, with_leader: bool = False, deadline: float = math.inf
    ) -> list[Process]:
        """
        Stop the processes of the tree and kill them, as one step: nothing stays stopped, whatever cuts this short.

        :param time_limit: seconds to wait for those that do not come to stop.
        :param deadline: when sudo is not waited for any longer, by time.monotonic().
        :returns: whom it has killed, in that order.
        """
        members: list[Process] = []
        try:
            members = self.stop(time_limit, with_leader=with_leader)
        finally:
            # If an exception has come in between, all that were stopped.
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
        Send the signals to each process that still is the same, and note whom they end.

        :param deadline: when sudo is not waited for any longer, by time.monotonic().
        """
        processes = list(processes)
        for sig in ENDING_SIGNALS.intersection(signals):
            self.ended.update((process, sig.name) for process in processes if process != self._leader)
        self._send(processes, *signals, deadline=deadline)

    def _send(self, processes: Iterable[Process], *signals: int, deadline: float = math.inf) -> None:
        """Send the signals to each process that still is the same; to those of another user through sudo."""
        denied = [process for process in processes if not send_signals(process, signals)]
        if not denied:
            return
        by_owner = group_by_owner(denied)
        for sig in signals:
            asked = {uid: owned for uid, owned in by_owner.items() if self._is_sudo_worth_asking(uid, sig)}
            for uid, failure in send_by_sudo(asked, sig, deadline).items():
                self._note_sudo(uid, failure)

    def _is_sudo_worth_asking(self, uid: int, sig: int) -> bool:
        # It reports to the administrator who asks in vain. One that was slow may have been so just once, and is asked
        # again when it matters most.
        failure = self.sudo_failures.get(uid)
        return failure is None or (failure == SUDO_TIMED_OUT and sig == signal.SIGKILL)

    def _note_sudo(self, uid: int, failure: str | None) -> None:
        if failure is None:
            self.sudo_failures.pop(uid, None)
        else:
            self.sudo_failures[uid] = failure


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
    # Where the start is hidden, what was forked goes after what it has executed, and by the number.
    return sorted(members, key=lambda member: (max(member.start, 0), member.pid), reverse=True)


def is_own_proc() -> bool:
    """Whether /proc, if there is one, knows processes by the numbers that they have for us (pid_namespaces(7))."""
    try:
        return os.readlink(f"{PROC}/self") == str(os.getpid())
    except FileNotFoundError:
        return True


def is_in_own_namespace(pid: int) -> bool:
    """Whether a process is in none of the PID namespaces below this one, which tell others by the same numbers."""
    try:
        with open(f"{PROC}/{pid}/status") as lines:
            numbers = next((line for line in lines if line.startswith("NSpid:")), "")
    except OSError:  # closed to us (hidepid), or gone
        return True
    return len(numbers.split()) <= len(("NSpid:", pid))


def is_uncollected(leader: Process) -> bool:
    """
    Whether the leader, a child of ours, still has its number, and with it the session of that number.

    Nobody else gets it before the leader is collected, or while a member is in the session. From then on the number
    proves nothing, whether or not a look has found the session empty. Another child of ours may have got it.
    """
    return is_unreaped_child(leader.pid) and look_at(leader.pid) in (leader, None)


def recognise(leader: Process) -> Process:
    """Return our child as it is to be told now, for an exec may open its entry in /proc, or close it."""
    with contextlib.suppress(OSError):
        now = look_at(leader.pid)
        if now and min(now.start, leader.start) < 0 and is_unreaped_child(leader.pid):
            return now
    return leader


def has_exited(child: int) -> bool:
    """Whether a child of ours has ended, and is still to be collected."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except (AttributeError, OSError):  # somebody else has collected it, or this cannot be asked
        return False


def add_tied(
    processes: dict[int, Process],
    seeds: dict[int, Process],
    list_ties: Callable[[Process], list[Tie]],
    further: Iterable[Tie] = (),
    marks: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> dict[int, Process]:
    """
    Return the seeds and all that is tied to them, or to what is tied to them, by PID.

    :param list_ties: returns what ties others to a process.
    :param further: what else ties others to the seeds.
    :param marks: what marks the processes carry, by PID.
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
    # Most seeds share a session and a mark.
    unvisited = {*further, *(tie for seed in seeds.values() for tie in list_ties(seed))}
    while unvisited and tied:
        # Each is followed once.
        for process in tied.pop(unvisited.pop(), ()):
            if process.pid not in found:
                found[process.pid] = process
                unvisited.update(list_ties(process))
    return found


def list_descent(process: Process) -> list[Tie]:
    """Return what ties its children to a process."""
    return [("parent", process.pid)]


def shorten_name(name: str) -> str:
    """Return as much of a program's name as the kernel keeps."""
    return os.fsencode(name)[:NAME_MAX_BYTES].decode(errors="replace")


def mark_process() -> None:
    """Mark the calling process, a leader, and with it all that it starts from now on."""
    own = None
    with contextlib.suppress(OSError):
        own = read_process(os.getpid())
    if own is None:
        return
    mark = compute_mark(own)
    inherited = read_limits(os.getppid())
    if any(is_mark_of(former, own.pid) and former not in inherited for former in read_limits(own.pid)[:1]):
        return  # its supervisor was first
    # What it starts before its supervisor does this, who may be hidden from it, is to have it, too. It goes first: who
    # leads a tree, and has inherited the origin of another, would be taken for a task of that one's supervisor.
    give_origin(own.pid, mark, supervisor=os.getppid())
    # It may carry that of its supervisor, which is in a tree itself.
    if give_mark(own.pid, mark, inherited=inherited) is None:
        os.environ[MARK_VARIABLE] = extend_variable(os.environ, mark)


def give_mark(pid: int, mark: int, inherited: Collection[int] = ()) -> int | None:
    """
    Have a leader carry a mark as its limit, and the mark of the tree around it, if there is one, beside it.

    A leader and its supervisor both do this, and may not come to the same mark (ProcessTree.adopt). To exchange a limit
    is one step, so that the second finds what the first has given, and leaves it.

    :param inherited: the marks that its supervisor carries.
    :returns: the mark that it carries from now on; None where the limit cannot be set.
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
        # What is beside it belongs to the tree that its supervisor was started in, and may have left.
        resource.prlimit(pid, RLIMIT_LOCKS, (former if is_mark(former) else hard, hard))
    except (AttributeError, OSError, ValueError):
        # No such limit (macOS), or a hard one below the mark, or a sandbox that refuses the call.
        return None
    return mark


def give_origin(pid: int, mark: int, *, supervisor: int) -> int | None:
    """Have a leader carry its origin as a limit, and no other's; return it, None where it cannot be told, or set."""
    parent = None
    with contextlib.suppress(OSError):
        parent = read_process(supervisor)
    is_known = parent is not None and parent.start >= 0
    origin = compute_origin(parent, mark) if parent is not None and is_known else None
    try:
        former, hard = resource.prlimit(pid, resource.RLIMIT_RSS)
        if origin is None and is_mark(former) and is_origin_of(former, mark):
            return former & ~CONDEMNED
        resource.prlimit(pid, resource.RLIMIT_RSS, (hard if origin is None else origin, hard))
    except (AttributeError, OSError, ValueError):  # as of a mark
        return None
    return origin


def compute_origin(supervisor: Process, mark: int) -> int:
    """Return what tells the supervisor of a tree, and the tree from its others."""
    bits = [
        (supervisor.pid, PID_BITS),
        (int(supervisor.start), ORIGIN_START_BITS),
        (fold_mark(mark), ORIGIN_TREE_BITS),
    ]
    origin, shift = MARK_FLAG, 0
    for number, mask in bits:
        origin |= (number & mask) << shift
        shift += mask.bit_length()
    return origin


def fold_mark(mark: int) -> int:
    """Return the part of an origin that tells the tree of a mark."""
    return (mark ^ mark >> PID_BITS.bit_length()) & ORIGIN_TREE_BITS


def is_origin_of(origin: int, mark: int) -> bool:
    """Whether an origin and a mark may be those of the same leader."""
    return origin >> (PID_BITS.bit_length() + ORIGIN_START_BITS.bit_length()) & ORIGIN_TREE_BITS == fold_mark(
        mark
    )


def is_condemned(origin: int) -> bool:
    """Whether the supervisor of a process was about to kill it."""
    return bool(origin & CONDEMNED)


def is_origin_alive(origin: int) -> bool:
    """Whether the supervisor that an origin tells is there, or may be."""
    pid, start = origin & PID_BITS, origin >> PID_BITS.bit_length() & ORIGIN_START_BITS
    supervisor = look_at(pid)
    if supervisor is not None and supervisor.start >= 0:
        return not supervisor.dead and int(supervisor.start) & ORIGIN_START_BITS == start
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


def condemn(pid: int) -> None:
    """Note at a process that its supervisor is about to kill it, and does not come to it only if it is killed itself."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        origin, hard = resource.prlimit(pid, resource.RLIMIT_RSS)
        if is_mark(origin) and not is_condemned(origin):
            resource.prlimit(pid, resource.RLIMIT_RSS, (origin | CONDEMNED, hard))


def lift_marks() -> None:
    """Leave whatever tree this process is in, as far as marks go."""
    for limit in (resource.RLIMIT_RTTIME, RLIMIT_LOCKS, resource.RLIMIT_RSS):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))


def replace_mark(pid: int, mark: int, other: int) -> int:
    """Have a leader carry another mark than the one that it took, and return what it carries from now on."""
    try:
        former, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        if former != mark:
            return mark
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (other, hard))
    except (AttributeError, OSError, ValueError):  # the variable is its mark, or it is gone
        return mark
    return other


def extend_variable(env: Mapping[str, str], mark: int) -> str:
    """Return what the variable is in a tree of that mark, within those that an environment has in it."""
    return ",".join(filter(None, [env.get(MARK_VARIABLE), str(mark)]))


def compute_mark(leader: Process) -> int:
    """Return a number of microseconds that no other leader since boot has."""
    # The ticks of a year take 32 bits.
    return MARK_FLAG | (int(leader.start) << PID_BITS.bit_length() | leader.pid) & MARK_FLAG - 1


def invent_mark(pid: int) -> int:
    """Return such a number for a leader whose start is not known."""
    return MARK_FLAG | secrets.randbits(MARK_FLAG.bit_length() - 1) & ~PID_BITS | pid


def is_mark(limit: int) -> bool:
    """Whether a limit is a mark. One that is not set is negative."""
    return limit >= MARK_FLAG


def is_mark_of(limit: int, leader: int) -> bool:
    """Whether a limit is the mark of a leader of that number."""
    return is_mark(limit) and limit & PID_BITS == leader


def read_limits(pid: int) -> tuple[int, ...]:
    """
    Return the marks that a process carries as its limits, its own first, then that of the tree around its own.

    Its origin alone if it has set the first limit for itself. None if it is gone, or hidden from us, or has none of its
    own: whoever lifts that limit has left all.
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
    Return the three limits of another user's process, which everybody may read in /proc.

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
    """Return the marks in the environment of a process, its own first; none if it is gone, or not ours to read."""
    try:
        return parse_variable(psutil.Process(pid).environ())
    except (psutil.Error, OSError):
        return ()


def parse_variable(env: Mapping[str, str]) -> tuple[int, ...]:
    """Return the marks that an environment has, the innermost tree's first."""
    return tuple(int(mark) for mark in reversed(env.get(MARK_VARIABLE, "").split(",")) if mark.isdigit())


def list_pids() -> list[tuple[int, int | None]]:
    """
    Return the PIDs that we may see, each with what tells its process from the next one of the same number, if known.

    That is the number of its inode: the kernel makes one for a process when it is first looked up, and drops it when
    the process is reaped (proc_flush_pid(), Linux 5.6), so that listing alone recognises those that were read before.

    :raises OSError: if /proc is there, but cannot be listed, for want of a file descriptor or of memory.
    """
    try:
        # To its end, for the one descriptor that this takes may be the last one, which the look at each needs.
        with os.scandir(PROC) as entries:
            return [(int(entry.name), entry.inode()) for entry in entries if entry.name.isdigit()]
    except FileNotFoundError:
        return [(pid, None) for pid in psutil.pids()]


def read_process(pid: int) -> Process | None:
    """Return the process, None if it is dead, a zombie, or hidden from us; raises as :func:`look_at` does."""
    process = look_at(pid)
    return None if process is None or process.dead else process


def read_own_start() -> float:
    """Return when this process started, which every child of it is younger than; 0 if that cannot be told."""
    own = read_process(os.getpid())
    return own.start if own else 0


def look_at(pid: int, *, since: float = 0) -> Process | None:
    """
    Return the process, be it a zombie; None if there is none, or if it is hidden from us.

    :param since: OLDER is enough for a process that started before. To make out no more than that costs two thirds of
        a look, which a busy machine has thousands of.
    :raises OSError: if that cannot be told, for want of a file descriptor or of memory.
    """
    try:
        stat = _read_file(f"{PROC}/{pid}/stat")
    except (FileNotFoundError, NotADirectoryError):
        return None if os.path.exists(f"{PROC}/self/stat") else _ask_psutil(pid, since)
    except ProcessLookupError:  # gone between open and read
        return None
    except PermissionError:
        return _ask_kernel(pid)
    # The name may hold anything, parentheses and spaces among it.
    name, _, rest = stat.partition(b"(")[2].rpartition(b")")
    state, parent, _, session, *others = rest.split(None, 21)
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


def _read_file(path: str) -> bytes:
    """Return a small file at a third of what open() costs: a look reads one for each process of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, STAT_MAX_BYTES)
    finally:
        os.close(descriptor)


def _ask_kernel(pid: int) -> Process | None:
    """
    Return a process of our own user whose entry in /proc is closed to us; None if it is another user's.

    So are, where /proc is mounted with hidepid=1, those that are not dumpable (prctl(2)), as a supervisor of SDK 1.2 or
    later makes itself, and what it forks. Its user is all that the kernel asks for in the calls below.
    """
    try:
        resource.prlimit(pid, resource.RLIMIT_RTTIME)
        return Process(
            pid,
            start=-os.stat(f"{PROC}/{pid}").st_ino,
            name=HIDDEN_NAME,
            parent=0,
            session=os.getsid(pid),
            # Nobody can tell, and so nobody need wait for it.
            stopped=True,
            dead=has_ended(pid),
        )
    except AttributeError:  # no such call, or no such limit
        return None
    except OSError as error:
        if error.errno in TRANSIENT_ERRORS:
            raise
        return None


def has_ended(pid: int) -> bool:
    """Whether a process is a zombie, or gone; False where that cannot be told without /proc."""
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
    """Whether this very process still runs, as far as can be told."""
    try:
        now = read_process(process.pid)
    except OSError:
        return True
    return now is not None and now.start == process.start


def send_signals(process: Process, signals: Iterable[int]) -> bool:
    """Signal a process, and never one that has got its number since; False if that is not allowed."""
    pidfd = None
    with contextlib.suppress(AttributeError, OSError):  # no pidfd, none left, or the process is gone
        pidfd = os.pidfd_open(process.pid)
    try:
        # From here on the pidfd stands for one process; without it the number may still change hands, just not likely.
        if not is_alive(process):
            return True
        for sig in signals:
            if pidfd is None:
                os.kill(process.pid, sig)
            else:
                signal.pidfd_send_signal(pidfd, sig)
    except ProcessLookupError:
        return True
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
    :param deadline: when it is not waited for any longer, by time.monotonic().
    :returns: by uid, why that failed, None if it did not.
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
    # kill fails also when one of them has ended meanwhile, and has signalled the others then.
    return {
        uid: failure if failure and all(map(is_alive, by_owner[uid])) else None
        for uid, failure in failures.items()
    }


def group_by_owner(processes: Iterable[Process]) -> dict[int, list[Process]]:
    """Return those that still run, by the user that they run as."""
    groups: dict[int, list[Process]] = {}
    for process in filter(is_alive, processes):
        # psutil raises as it is what the kernel says for want of a file descriptor.
        with contextlib.suppress(psutil.Error, OSError):
            groups.setdefault(psutil.Process(process.pid).uids().effective, []).append(process)
    return groups


def run_sudo(command: list[str]) -> str | None:
    """Run sudo; return why that failed, None if it did not."""
    return run_all({0: command})[0]


def run_all(commands: Mapping[int, list[str]], deadline: float = math.inf) -> dict[int, str | None]:
    """
    Run one sudo for each user, at the same time; return why they failed, None where one did not.

    :param deadline: by time.monotonic(); they have SUDO_TIMEOUT at most.
    """
    deadline = min(deadline, time.monotonic() + SUDO_TIMEOUT)
    running = {uid: start_sudo(command) for uid, command in commands.items()}
    return {
        uid: started if isinstance(started, str) else wait_for_sudo(started, deadline)
        for uid, started in running.items()
    }


def start_sudo(command: list[str]) -> subprocess.Popen[str] | str:
    """Start sudo; return why that failed, if it did."""
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
        # subprocess.run() would wait for it without a limit, if it may not kill it: sudo becomes root altogether.
        with contextlib.suppress(PermissionError):
            process.kill()
            process.wait()
        return SUDO_TIMED_OUT
    return (complaint.strip() or f"sudo ended with {process.returncode}") if process.returncode else None
