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

A process belongs to the tree if it is in the leader's session, or descends from one that belongs, or carries
the leader's *mark*: a soft ``RLIMIT_RTTIME`` that no other leader has. The limit concerns real-time scheduling
alone, is far beyond reach, and survives fork, exec, setsid, ``env -i`` and double forks (getrlimit(2)), which an
environment variable does not. It is computed from the leader's PID and start time, so that parent and child
agree on it without talking, unless the leader is another program (child_spawn). Nothing is done or kept while the
tree runs.

A process leaves its tree by detaching (setsid, and a parent that exits) with the limit lifted, for which
``prlimit --rttime=unlimited`` serves.

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.child_status import is_unreaped_child

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Process", "ProcessTree"]

PROC = "/proc"

MARK_FLAG = 1 << 62
"""In every mark, which is thereby some 10^5 years as a number of microseconds."""

MARK_VARIABLE = "_AIRFLOW_PROCESS_TREE"
"""Carries the mark where the limit cannot be set."""

ENDING_SIGNALS = frozenset((signal.SIGTERM, signal.SIGKILL))

DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

STAT_MAX_BYTES = 4096

LEADER_NOT_SEEN = "the task's own process cannot be seen: /proc hides it, or is another PID namespace's"

STOP_POLL_INTERVAL = 0.001
"""Seconds between looks at processes that were sent SIGSTOP, and have not come to it."""

SUDO_TIMEOUT = 1.0
"""Seconds; ``sudo -n`` asks nobody, but may look for its rules in the network."""

SUDO_TIMED_OUT = f"sudo did not answer within {SUDO_TIMEOUT:g} s"


@dataclass(frozen=True)
class Process:
    """A process. Its PID and its start tell it from every other."""

    pid: int
    start: float
    """Clock ticks since boot (proc_pid_stat(5)), elsewhere what psutil calls the creation time."""
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
        self._mark = 0
        self._has_mark = has_limit
        self._remembered: dict[int, float] = {}
        self._settled: dict[int, int] = {}
        self._session_over = False
        self.sudo_failures: dict[int, str] = {}
        """Why processes of other users could not be signalled, by their uids."""
        self.spared: frozenset[str] = frozenset()
        """Names of programs that are never ended, nor what they have started."""
        self.ends = True
        """Whether the deployment has what a task leaves behind ended."""
        self.ended: dict[Process, str] = {}
        """Those that were asked to end or killed, by the last signal, since this was last reported; not the leader."""
        self._stopped: list[Process] = []
        self.look_failure: str | None = None
        """Why the last look, or any, has found nothing, if it could not be taken."""

    def adopt(self, pid: int, mark: int | None = None) -> None:
        """
        Make ``pid``, a child of ours that leads a session or is about to, the leader, and mark it. May be repeated.

        :param mark: what it carries already, unless that is computed from it.
        """
        if not is_unreaped_child(pid):
            return
        try:
            leader = look_at(pid)
        except OSError as error:
            self.look_failure = error.strerror
            return
        # A /proc that belongs to another PID namespace knows somebody else by that number.
        if leader is None or leader.parent != os.getpid():
            self.look_failure = LEADER_NOT_SEEN
            return
        # It may be dead, and have left something behind; nobody has its number before it is collected.
        self._leader = leader
        self._mark = mark or self._mark or compute_mark(leader)
        # A hard limit below the mark raises ValueError.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # A forked child does the same (mark_process); one that posix_spawn() has started cannot.
            _, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
            resource.prlimit(pid, resource.RLIMIT_RTTIME, (self._mark, hard))
        self._has_mark = has_limit if has_limit(pid, self._mark) else has_variable

    def remember(self) -> None:
        """Note who belongs now: a descendant without a mark is lost once its ancestors are dead."""
        self.find()

    def find(self, *, with_leader: bool = False) -> list[Process]:
        """Return the processes of the tree. One pass; entries may vanish meanwhile."""
        if self._leader is None:
            return []
        self.look_failure = None
        try:
            processes = self._read_candidates(self._leader)
        except OSError as error:
            self.look_failure = error.strerror
            return []
        members = add_descendants(processes, self._find_seeds(processes, self._leader))
        for nobodys in (0, 1, os.getpid()):
            members.pop(nobodys, None)
        self._remembered.update((pid, process.start) for pid, process in members.items())
        if not with_leader:
            members.pop(self._leader.pid, None)
        return list(members.values())

    def _read_candidates(self, leader: Process) -> dict[int, Process]:
        """
        Return the processes alive that are not older than the leader.

        The others are read once, which is what makes a look cheap on a machine with many processes.
        """
        candidates, settled = {}, {}
        for pid, identity in list_pids():
            if identity is not None and self._settled.get(pid) == identity:
                settled[pid] = identity
            elif process := look_at(pid, since=leader.start):
                if not process.dead and process.start >= leader.start:
                    candidates[pid] = process
                elif identity is not None:
                    settled[pid] = identity
        self._settled = settled
        return candidates

    def _find_seeds(self, processes: dict[int, Process], leader: Process) -> dict[int, Process]:
        now = processes.get(leader.pid)
        # A session has its leader's number, which is free again when leader and session are gone: whoever has it from
        # then on is a stranger.
        if not any(process.session == leader.pid for process in processes.values()):
            self._session_over |= not is_unreaped_child(leader.pid)
        recycled = self._session_over or (now is not None and now != leader)

        def belongs(process: Process) -> bool:
            if process == leader or self._remembered.get(process.pid) == process.start:
                return True
            return (process.session == leader.pid and not recycled) or self._has_mark(process.pid, self._mark)

        return {process.pid: process for process in processes.values() if belongs(process)}

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
        while members := self.find(with_leader=with_leader):
            fresh = [member for member in members if member not in sent]
            # Whoever is in the middle of a fork stops only after it, and a look may have passed the place where the
            # child appears. So the last look is one that began when all had been seen stopped.
            overdue = bool(sent) and time.monotonic() > deadline
            if overdue or (all_stopped and not fresh):
                return sorted(members, key=lambda member: (member.start, member.pid), reverse=True)
            all_stopped = not fresh and all(member.stopped for member in members)
            sent.update(fresh)
            self._stopped.extend(fresh)
            self.signal(fresh, signal.SIGSTOP)
            if not fresh and not all_stopped:
                # Let those run that are to stop.
                time.sleep(STOP_POLL_INTERVAL)
        return []

    def kill_all(self, time_limit: float, *, with_leader: bool = False) -> list[Process]:
        """
        Stop the processes of the tree and kill them, as one step: nothing stays stopped, whatever cuts this short.

        :param time_limit: seconds to wait for those that do not come to stop.
        :returns: whom it has killed, in that order.
        """
        members: list[Process] = []
        try:
            members = self.stop(time_limit, with_leader=with_leader)
        finally:
            # If an exception has come in between, all that were stopped.
            self.signal(members or self._stopped, signal.SIGKILL)
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
        self._send([self._leader], sig)
        return True

    def signal(self, processes: Iterable[Process], *signals: int) -> None:
        """Send the signals to each process that still is the same, and note whom they end."""
        processes = list(processes)
        for sig in ENDING_SIGNALS.intersection(signals):
            self.ended.update((process, sig.name) for process in processes if process != self._leader)
        self._send(processes, *signals)

    def _send(self, processes: Iterable[Process], *signals: int) -> None:
        """Send the signals to each process that still is the same; to those of another user through sudo."""
        denied = [process for process in processes if not send_signals(process, signals)]
        for uid, owned in group_by_owner(denied).items():
            for sig in signals:
                failure = self.sudo_failures.get(uid)
                # It reports to the administrator who asks in vain. One that was slow may have been so just once, and
                # is asked again when it matters most.
                if failure is None or (failure == SUDO_TIMED_OUT and sig == signal.SIGKILL):
                    self._note_sudo(uid, send_by_sudo(uid, owned, sig))

    def _note_sudo(self, uid: int, failure: str | None) -> None:
        if failure is None:
            self.sudo_failures.pop(uid, None)
        else:
            self.sudo_failures[uid] = failure


def find_group(pid: int) -> int | None:
    """Return the process group that a process is in, None if it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def add_descendants(processes: dict[int, Process], seeds: dict[int, Process]) -> dict[int, Process]:
    """Return the seeds and all that descends from them, by PID."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found = dict(seeds)
    unvisited = list(seeds)
    while unvisited:
        for child in children.get(unvisited.pop(), []):
            if child.pid not in found:
                found[child.pid] = child
                unvisited.append(child.pid)
    return found


def mark_process() -> None:
    """Mark the calling process, a leader, and with it all that it starts from now on."""
    own = None
    with contextlib.suppress(OSError):
        own = read_process(os.getpid())
    if own is None:
        return
    mark = compute_mark(own)
    if carry_mark(mark) is None:
        os.environ[MARK_VARIABLE] = str(mark)


def carry_mark(mark: int) -> tuple[int, int] | None:
    """Have the calling process carry a mark as its limit; return the limits before, None where that cannot be set."""
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
    except (AttributeError, OSError, ValueError):
        # No such limit (macOS), or a hard one below the mark, or a sandbox that refuses the call.
        return None
    return soft, hard


def compute_mark(leader: Process) -> int:
    """Return a number of microseconds that no other leader since boot has."""
    # A PID has 22 bits at most (proc_sys_kernel(5)); the ticks of a year take 32.
    return MARK_FLAG | (int(leader.start) << 22 | leader.pid) & MARK_FLAG - 1


def has_limit(pid: int, mark: int) -> bool:
    """Whether the process carries the mark as its limit; False if it is gone, or hidden from us."""
    with contextlib.suppress(AttributeError, OSError):
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] == mark
    try:
        # Everybody may read a limit here, another user's process among them.
        with open(f"{PROC}/{pid}/limits") as limits:
            return f" {mark} " in limits.read()
    except OSError:
        return False


def has_variable(pid: int, mark: int) -> bool:
    """Whether the process carries the mark in its environment; False if it is gone, or not ours to read."""
    try:
        return bool(psutil.Process(pid).environ().get(MARK_VARIABLE) == str(mark))
    except (psutil.Error, OSError):
        return False


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
        return None if os.path.exists(f"{PROC}/self/stat") else _ask_psutil(pid)
    except (ProcessLookupError, PermissionError):  # gone between open and read, or hidden
        return None
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


def _ask_psutil(pid: int) -> Process | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
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


def send_by_sudo(uid: int, processes: Sequence[Process], sig: int) -> str | None:
    """
    Signal processes of another user, as that user or as root, whichever the sudoers permit.

    :returns: why that failed, None if it did not.
    """
    sudo = shutil.which("sudo")
    if sudo is None:
        return "there is no sudo"
    kill = ["kill", f"-{int(sig)}", *(str(process.pid) for process in processes)]
    failure = run_sudo([sudo, "-n", "-u", f"#{uid}", *kill])
    if failure and failure != SUDO_TIMED_OUT:
        failure = run_sudo([sudo, "-n", *kill])
    # kill fails also when one of them has ended meanwhile, and has signalled the others then.
    return failure if failure and all(map(is_alive, processes)) else None


def group_by_owner(processes: Iterable[Process]) -> dict[int, list[Process]]:
    """Return those that still run, by the user that they run as."""
    groups: dict[int, list[Process]] = {}
    for process in filter(is_alive, processes):
        with contextlib.suppress(psutil.Error):
            groups.setdefault(psutil.Process(process.pid).uids().effective, []).append(process)
    return groups


def run_sudo(command: list[str]) -> str | None:
    """Run sudo; return why that failed, None if it did not."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return str(error)
    try:
        _, complaint = process.communicate(timeout=SUDO_TIMEOUT)
    except subprocess.TimeoutExpired:
        # subprocess.run() would wait for it without a limit, if it may not kill it: sudo becomes root altogether.
        with contextlib.suppress(PermissionError):
            process.kill()
            process.wait()
        return SUDO_TIMED_OUT
    return (complaint.strip() or f"sudo ended with {process.returncode}") if process.returncode else None
