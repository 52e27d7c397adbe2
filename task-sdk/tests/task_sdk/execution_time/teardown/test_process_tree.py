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
from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.faults import (
    become_nobody,
    choose_next_pid,
    fork_as,
    lack,
    misbehave,
    mount_proc,
    run_in_fork,
    run_in_namespace,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    SLEEPER,
    Relay,
    Tree,
    ended_by,
    fork,
    in_turn,
    kill_child,
    lift_limit,
    limit_realtime,
    make_zombie,
    pause_for_ever,
    set_name,
    waiting,
)
from task_sdk.execution_time.teardown.trees import (
    find,
    fork_child,
    fork_daemon,
    fork_session,
    fork_stray,
    fork_when_adopted,
    lead,
    make_origin,
    read,
    start_child,
    start_daemon,
    start_daemon_without_environment,
    start_daemon_without_mark,
    start_orphan,
    start_orphan_fork,
    start_session,
    start_waiting,
)

from airflow.sdk.execution_time.teardown import marks, process_tree, processes
from airflow.sdk.execution_time.teardown.marks import (
    MARK_VARIABLE,
    RLIMIT_LOCKS,
    compute_mark,
    give_mark,
    invent_mark,
    is_origin_alive,
    mark_process,
    read_limits,
    read_origin,
)
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.processes import (
    Process,
    is_alive,
    list_pids,
    read_process,
    send_signals,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_mock import MockerFixture

pytestmark = pytest.mark.usefixtures("list_left")


STARTS = [start_child, start_session, start_daemon, start_daemon_without_environment]


class TestFind:
    def test_everything_is_found(self) -> None:
        """A child, a session, a daemon, and one with an emptied environment; the leader itself is not among them."""
        tree, _, started = lead(*STARTS)
        assert find(tree) == sorted(started)

    def test_everything_is_found_when_the_leader_is_gone(self) -> None:
        """The same holds for what has lost its leader."""
        tree, leader, started = lead(*STARTS)
        kill_child(leader)
        assert find(tree) == sorted(started)

    def test_opt_out(self) -> None:
        """A process that has detached with its limit lifted is not found; one that has detached alone is."""
        tree, _, [_, kept] = lead(start_daemon_without_mark, start_daemon)
        assert find(tree) == [kept]

    def test_descendants_are_remembered(self) -> None:
        """A child that has lost the mark, as through PAM, is the task's still when its parent is dead."""

        def start_session_without_mark() -> int:
            return subprocess.Popen(SLEEPER, start_new_session=True, preexec_fn=lift_limit).pid  # noqa: PLW1509

        tree, leader, started = lead(start_session_without_mark)
        tree.remember()
        kill_child(leader)
        assert find(tree) == started

    def test_namesake_of_a_member(self) -> None:
        """Whoever has got the number of a member that has gone is a stranger."""
        tree, _, _ = lead(start_child)
        stranger = start_session()
        known = len(find(tree))
        tree._remembered[stranger] = read(stranger).start - 1
        assert len(find(tree)) == known == 1

    def test_strangers_are_not_found(self) -> None:
        """Another leader's tree, a session of ours, and we ourselves are not in it."""
        tree, _, _ = lead()
        lead(*STARTS)
        start_session()
        assert find(tree) == []

    def test_dead_member(self) -> None:
        """What has ended is not found, though its parent does not collect it."""
        tree, _, [child, other] = lead(start_child, start_child)
        with contextlib.closing(Tree()) as held:
            held.add(child)
            os.kill(child, signal.SIGKILL)
            assert held.gone(child)
        assert find(tree) == [other]

    def test_never_ourselves(self) -> None:
        """Neither this process, nor the first one, nor what descends from them, is found, whatever they carry."""

        def carry_the_mark() -> None:
            tree, _, [child] = lead(start_child)
            start_session()
            tree._oldest = 0
            assert tree._mark
            resource.prlimit(0, resource.RLIMIT_RTTIME, (tree._mark, resource.RLIM_INFINITY))
            marks = {1: (tree._mark,)}
            with mock.patch.object(
                tree, "_read_marks", autospec=True, side_effect=lambda pid: marks.get(pid, read_limits(pid))
            ):
                told.tell(find(tree) == [child])
            pause_for_ever()

        with contextlib.closing(Relay()) as told:
            fork(carry_the_mark)
            assert told.hear() is True

    @pytest.mark.parametrize("proc", [True, False])
    def test_older_process_is_not_found(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, proc: bool
    ) -> None:
        """Whoever ran before the leader was not started by it, whatever its limits are."""
        if not proc:
            monkeypatch.setattr(processes, "PROC", str(tmp_path / "missing"))
        older = start_session()
        tree, leader, _ = lead()
        # Start times are counted in ticks.
        while read(leader).start == read(older).start:
            tree, leader, _ = lead()
        mark = compute_mark(read(leader))
        resource.prlimit(older, resource.RLIMIT_RTTIME, (mark, resource.RLIM_INFINITY))
        assert mark in read_limits(older)
        assert find(tree) == []

    def test_recycled_leader(self) -> None:
        """The session of a process that has got the leader's number since is not the leader's."""
        tree, _, _ = lead(start_child)
        assert tree._leader
        tree._leader = replace(tree._leader, start=tree._leader.start - 1)
        tree._marks = {1}
        assert find(tree) == []

    def test_recycled_session(self) -> None:
        """When leader and session are gone, whoever has their number from then on is a stranger."""
        tree, leader, _ = lead()
        kill_child(leader)

        def open_session() -> list[int]:
            os.setsid()
            return [start_child()]

        stranger, [child] = start_waiting(open_session)
        kill_child(stranger)
        assert tree._leader
        tree._leader = replace(tree._leader, pid=stranger)
        assert os.getsid(child) == stranger
        assert find(tree) == []

    def test_session_recycled_between_two_looks(self) -> None:
        """A stranger that is started as daemon(3) does it gets the number, and was never seen to be a stranger."""

        def main() -> dict[str, Any]:
            tree, leader, [child] = lead(start_child)
            assert find(tree) == [child]
            kill_child(leader)
            kill_child(child)  # the first process of a namespace adopts its orphans
            with contextlib.closing(Relay()) as told:
                stranger = fork_as(leader, lambda: told.tell(fork(pause_for_ever)))
                daemon = told.hear()
            os.waitpid(stranger, 0)
            assert os.getsid(daemon) == leader
            assert find(tree) == []
            return {}

        run_in_namespace(main)

    def test_session_of_a_known_member(self) -> None:
        """As long as somebody is in it who was in it before, a session has kept its number, and counts."""

        def start_child_that_starts_another() -> int:
            def main() -> None:
                order.hear()
                told.tell(start_orphan(lift_limit))
                pause_for_ever()

            return fork(main)

        with contextlib.closing(Relay()) as order, contextlib.closing(Relay()) as told:
            tree, leader, [child] = lead(start_child_that_starts_another)
            assert find(tree) == [child]
            kill_child(leader)
            order.tell("start another")
            another = told.hear()
            assert find(tree) == sorted([child, another])

    def test_sessions_of_members_count_whole(self) -> None:
        """What has lost mark and parent is found by the session of a member, be that not the leader's (su, sudo)."""
        script = "(prlimit --rttime=unlimited sleep 600 & echo $!); echo gone; exec sleep 600"

        def start_script() -> list[int]:
            shell = subprocess.Popen(["bash", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
            assert shell.stdout
            pid = int(shell.stdout.readline())
            assert shell.stdout.readline() == b"gone\n", "the subshell lives"
            return [shell.pid, pid]

        tree, leader, [pids] = lead(start_script)
        kill_child(leader)
        assert find(tree) == sorted(pids)

    def test_session_that_is_not_its_own(self) -> None:
        """A leader that could not open a session is in that of its supervisor, whose others are strangers."""
        pid, [child] = start_waiting(mark_process, lambda: [start_child()])
        start_child()
        tree = ProcessTree()
        tree.set_leader(pid)
        assert find(tree) == [child]

    def test_session_is_known_until_the_leader_is_collected(self) -> None:
        """What has lost its mark is found by the session, if somebody looks when the leader has ended."""
        tree, leader, started = lead(lambda: start_orphan(lift_limit))
        make_zombie(leader)
        tree.note_exit()
        os.waitpid(leader, 0)
        assert find(tree) == started

    def test_running_leader_costs_no_look(self, mocker: MockerFixture) -> None:
        """Whether it has ended is asked for without a look; it is not to be collected then."""
        tree, _, _ = lead()
        look = mocker.spy(process_tree, "list_pids")
        with pytest.raises(psutil.TimeoutExpired):
            tree.note_exit()
        assert not look.called

    def test_leader_that_is_gone_before(self) -> None:
        """A leader that could not be adopted has no tree."""
        pid, _ = start_waiting(os.setsid)
        kill_child(pid)
        tree = ProcessTree()
        tree.set_leader(pid)
        assert find(tree) == []

    def test_leader_that_is_dead_before(self) -> None:
        """What a leader has left that is dead before it could be adopted, but not collected, belongs to it."""
        pid, [daemon] = start_waiting(os.setsid, mark_process, lambda: [start_daemon()])
        make_zombie(pid)
        tree = ProcessTree()
        tree.set_leader(pid)
        assert find(tree) == [daemon]

    def test_stranger_is_not_adopted(self) -> None:
        """A process that is not our child is neither marked nor looked at, whoever got its number wrong."""
        _, _, [stranger] = lead(start_child)
        before = resource.prlimit(stranger, resource.RLIMIT_RTTIME)
        tree = ProcessTree()
        tree.set_leader(stranger)
        assert resource.prlimit(stranger, resource.RLIMIT_RTTIME) == before
        assert find(tree) == []

    def test_proc_of_another_namespace(self) -> None:
        """Where /proc tells of others under the numbers that are used here, nobody is looked for."""

        def main() -> dict[str, Any]:
            number_there = int(os.readlink("/proc/self"))
            choose_next_pid(number_there)
            tree, leader, _ = lead(start_child)
            assert leader == number_there  # so somebody there could be taken for it
            assert find(tree) == []
            assert tree.look_failure
            assert not tree.signal_leader(signal.SIGKILL)
            kill_child(leader)
            return {}

        run_in_namespace(main, own_proc=False)

    def test_leader_that_did_not_mark_itself(self) -> None:
        """A leader that was spawned is marked by its parent."""
        pid, _ = start_waiting(os.setsid)
        tree = ProcessTree()
        tree.set_leader(pid)
        assert read_limits(pid) == (compute_mark(read(pid)),)


def supervise(*starts: Callable[[], Any]) -> list[Any]:
    """Supervise a leader that starts what it is told to; return its PID and theirs."""
    _, leader, started = lead(*starts)
    return [leader, *started]


def lift_outer_limit() -> None:
    """Give up the limit that is the mark of the tree around one's own."""
    resource.prlimit(0, RLIMIT_LOCKS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class TestNested:
    """A task that supervises tasks, as dag.test() does with an executor, or Airflow's own tests."""

    def test_inner_tree_belongs_to_the_outer_one(self) -> None:
        """All of the inner tree is found when the outer leader, which was its supervisor, has died suddenly."""
        tree, leader, [inner] = lead(lambda: supervise(*STARTS))
        assert find(tree) == sorted(inner)
        kill_child(leader)
        assert find(tree) == sorted(inner)

    def test_without_a_look_before(self) -> None:
        """It is so, too, if nobody had looked by then."""
        tree, leader, [inner] = lead(lambda: supervise(*STARTS))
        kill_child(leader)
        assert find(tree) == sorted(inner)

    def test_third_generation(self) -> None:
        """What an inner tree has around it in turn belongs to the outermost."""
        tree, leader, [[middle, [inner, daemon]]] = lead(lambda: supervise(lambda: supervise(start_daemon)))
        kill_child(leader)
        assert find(tree) == sorted([middle, inner, daemon])

    def test_mark_of_a_member(self) -> None:
        """A mark that a member carries is one of the tree's, also if nothing else tells of the outer one."""
        tree, leader, [[inner, daemon]] = lead(lambda: supervise(lambda: start_daemon(lift_outer_limit)))
        assert len(read_limits(daemon)) == 1
        kill_child(leader)
        assert find(tree) == sorted([inner, daemon])

    def test_outer_tree_does_not_belong_to_the_inner_one(self) -> None:
        """A supervisor that is in a tree itself takes neither its own processes nor another task for a task's."""

        def supervise_two() -> list[Any]:
            start_session()
            tree, _, started = lead(*STARTS)
            other, _, others = lead(*STARTS)
            return [find(tree), sorted(started), find(other), sorted(others)]

        _, _, [[found, started, found_too, others]] = lead(supervise_two)
        assert (found, found_too) == (started, others)

    def test_child_that_was_started_too_early(self) -> None:
        """What a leader has started before it was marked carries the supervisor's mark, which ties nobody to it."""

        def supervise_spawned() -> list[Any]:
            leader, [child] = start_waiting(os.setsid, lambda: [start_child()])
            tree = ProcessTree()
            tree.set_leader(leader)
            start_session()
            supervise(start_child)
            return [
                read_limits(child) == read_limits(os.getpid()),
                find(tree) == [child],
                find(tree) == [child],
            ]

        _, _, [outcome] = lead(supervise_spawned)
        assert outcome == [True] * 3

    def test_supervisor_that_has_left(self) -> None:
        """A worker that a task has started with its mark lifted starts tasks that belong to nobody else."""

        def start_worker() -> int:
            def start_task() -> None:
                told.tell(supervise(start_daemon))
                pause_for_ever()

            return start_orphan_fork(in_turn(os.setsid, lift_limit), start_task)

        with contextlib.closing(Relay()) as told:
            tree, leader, _ = lead(start_worker)
            [inner, daemon] = told.hear()
            assert find(tree) == []
            kill_child(leader)
            assert find(tree) == []
            assert read_limits(inner) == read_limits(daemon) == (compute_mark(read(inner)),)

    def test_mark_around_is_that_of_the_supervisor(self) -> None:
        """Whoever has left its tree by lifting the limit has left those around that, too."""

        def become_leader() -> list[int]:
            resource.prlimit(0, RLIMIT_LOCKS, (marks.MARK_FLAG + 1, resource.RLIM_INFINITY))
            os.setsid()
            mark_process()
            return []

        leader, _ = start_waiting(become_leader)
        assert read_limits(leader) == (compute_mark(read(leader)),)

    def test_with_a_variable(self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture) -> None:
        """Where the limit cannot be set the variable has the marks of all trees."""
        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=PermissionError)
        monkeypatch.delenv(MARK_VARIABLE, raising=False)
        tree, leader, [[middle, [inner, daemon]]] = lead(lambda: supervise(lambda: supervise(start_daemon)))
        for runner in (middle, inner, leader):
            with contextlib.closing(Tree()) as held:
                held.add(runner)
                os.kill(runner, signal.SIGKILL)
                assert held.gone(runner)
        os.waitpid(leader, 0)
        assert find(tree) == [daemon]

    @pytest.mark.parametrize("first", ["leader", "supervisor"])
    def test_one_mark(self, first: str) -> None:
        """A leader and its supervisor that come to different marks agree on one, whoever is first."""

        def mark_when_told() -> None:
            if first == "supervisor":
                order.hear()
            mark_process()
            told.tell("marked")
            pause_for_ever()

        with contextlib.closing(Relay()) as order, contextlib.closing(Relay()) as told:
            leader = fork(mark_when_told)
            invented = marks.invent_mark(leader)
            if first == "leader":
                assert told.hear() == "marked"
                own = compute_mark(read(leader))
                assert marks.give_mark(leader, invented) == own
                assert read_limits(leader) == (own,)
            else:
                assert marks.give_mark(leader, invented) == invented
                order.tell("mark yourself")
                assert told.hear() == "marked"
                assert read_limits(leader) == (invented,)

    def test_mark_of_a_namesake(self) -> None:
        """A mark that was inherited is not taken for one's own, though its leader had the same number once."""
        leader, _ = start_waiting(os.setsid)
        inherited, mark = marks.invent_mark(leader), marks.invent_mark(leader)
        marks.give_mark(leader, inherited)
        assert marks.give_mark(leader, mark, inherited=[inherited]) == mark
        assert read_limits(leader) == (mark, inherited)

    def test_marks_of_another_user(self, mocker: MockerFixture) -> None:
        """Both marks are read in /proc where prlimit() is denied."""
        _, _, [inner] = lead(lambda: supervise(start_daemon))
        marks = [read_limits(pid) for pid in inner]
        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=PermissionError)
        assert [read_limits(pid) for pid in inner] == marks
        assert all(len(of_one) == 2 for of_one in marks)


class TestOrphan:
    """A tree whose supervisor is gone, and that somebody else ends."""

    def lead_orphans(self, pid: int, *marks: Any) -> ProcessTree:
        tree = ProcessTree()
        tree.set_orphaned_leader(pid, read(pid).start, *marks)
        return tree

    def test_everything_is_found(self) -> None:
        """All that the leader has started is, by mark, origin, descent and session; and no other task."""
        _, leader, started = lead(*STARTS, lambda: start_orphan(lift_limit))
        lead(*STARTS)
        start_session()
        assert find(self.lead_orphans(leader)) == sorted(started)

    def test_leader_that_is_gone(self) -> None:
        """Its marks are known from before, and the session is no proof any more."""
        _, leader, [daemon, _] = lead(start_daemon, lambda: start_orphan(lift_limit))
        tree = self.lead_orphans(leader)
        kill_child(leader)
        assert find(tree) == [daemon]

    def test_marks_that_were_told(self) -> None:
        """Who ends it may be told what the leader carries, which is dead when it looks."""
        _, leader, daemon = fork_when_adopted(limit_realtime)
        marks = (read_limits(leader), read_origin(leader))
        start = read(leader).start
        kill_child(leader)
        tree = ProcessTree()
        tree.set_orphaned_leader(leader, start, *marks)
        assert find(tree) == [daemon]

    def test_condemned_leader(self) -> None:
        """What was to be killed is found by the origin of one that was."""
        _, leader, daemon = fork_when_adopted(limit_realtime)
        marks.condemn(leader)
        tree = self.lead_orphans(leader)
        kill_child(leader)
        assert find(tree) == [daemon]

    def test_mark_from_before_its_number(self) -> None:
        """What a leader started before its number was known is found, and it has a mark with its number then."""
        mark = invent_mark(0)

        def main() -> list[int]:
            os.setsid()
            give_mark(os.getpid(), mark)
            return [start_daemon()]

        leader, [daemon] = start_waiting(main)
        tree = ProcessTree()
        tree.set_leader(leader, mark)
        assert read_limits(leader) == (compute_mark(read(leader)),)
        assert find(tree) == [daemon]

    def test_session_of_others(self) -> None:
        """A leader that could not open a session is in that of others, who are strangers."""
        leader, [child] = start_waiting(mark_process, lambda: [start_child()])
        start_child()
        assert find(self.lead_orphans(leader)) == [child]

    def test_tree_around(self) -> None:
        """The tree that its supervisor was in is not its own."""
        _, _, [[inner, daemon], _] = lead(lambda: supervise(start_daemon), lambda: [start_daemon()])
        assert find(self.lead_orphans(inner)) == [daemon]


class TestLook:
    """What is looked at again, and what is known for good."""

    def test_only_the_young_are_read_again(self, mocker: MockerFixture) -> None:
        """What ran before the leader, or is dead, is read once; what is the tree's, every time."""
        zombie, _ = start_waiting(lambda: None)
        make_zombie(zombie)
        tree, leader, [child] = lead(start_child)
        assert find(tree) == [child]
        look = mocker.spy(process_tree, "look_at")
        assert find(tree) == [child]
        again = {call.args[0] for call in look.call_args_list}
        assert {leader, child} <= again
        assert not {zombie, os.getpid(), 1} & again

    def test_another_process_of_the_same_number_is_read(self, mocker: MockerFixture) -> None:
        """What is known for good of a process is not taken for true of its namesake."""
        tree, _, _ = lead()
        find(tree)
        own = os.getpid()
        renewed = [(pid, (identity or 0) + (pid == own)) for pid, identity in list_pids()]
        mocker.patch.object(process_tree, "list_pids", autospec=True, return_value=renewed)
        look = mocker.spy(process_tree, "look_at")
        find(tree)
        assert own in {call.args[0] for call in look.call_args_list}

    def test_namesakes_are_told_apart(self) -> None:
        """The number that tells a process from its namesakes changes with the process."""

        def main() -> dict[str, Any]:
            pid = fork(pause_for_ever)
            identity = dict(list_pids())[pid]
            assert identity is not None
            assert dict(list_pids())[pid] == identity
            kill_child(pid)
            fork_as(pid)
            assert dict(list_pids())[pid] not in (None, identity)
            return {}

        run_in_namespace(main)


class TestFailingLook:
    """A look that cannot be taken, which is not one that has found nobody."""

    @pytest.fixture
    def errors(self, mocker: MockerFixture) -> list[int]:
        """Return what looks fail with from now on, the next one with the last."""

        def scan_or_fail(path: str) -> Any:
            if errors:
                raise OSError(error := errors.pop(), os.strerror(error))
            return scan(path)

        errors: list[int] = []
        scan = os.scandir
        self.scan = mocker.patch.object(os, "scandir", autospec=True, side_effect=scan_or_fail)
        return errors

    @pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM], ids=errno.errorcode.get)
    def test_another_try(self, errors: list[int], error: int) -> None:
        """What is wanting for a moment, for somebody else has it, is tried for again."""
        tree, _, started = lead(start_child)
        errors += [error] * 2
        assert find(tree) == started
        assert tree.look_failure is None

    def test_no_end_of_it(self, errors: list[int]) -> None:
        """It is not tried for ever, and tells why it has found nobody, until a look succeeds."""
        tree, _, started = lead(start_child)
        errors += [errno.EMFILE] * process_tree.LOOK_TRIES
        assert find(tree) == []
        assert self.scan.call_count == process_tree.LOOK_TRIES
        assert tree.look_failure == os.strerror(errno.EMFILE)
        assert find(tree) == started
        assert tree.look_failure is None

    def test_no_permission(self, errors: list[int]) -> None:
        """What will not change is not tried again."""
        tree, _, _ = lead(start_child)
        errors.append(errno.EACCES)
        assert find(tree) == []
        assert self.scan.call_count == 1
        assert tree.look_failure == os.strerror(errno.EACCES)

    def test_what_was_stopped_is_returned(self, mocker: MockerFixture, errors: list[int]) -> None:
        """Who has been stopped can be killed also if nobody can be looked for any more."""
        tree, _, started = lead(*STARTS)
        send = processes.send_signals

        def fail_and_send(process: Process, signals: Any) -> bool | None:
            errors[:] = [errno.EMFILE] * process_tree.LOOK_TRIES
            return send(process, signals)

        mocker.patch.object(process_tree, "send_signals", autospec=True, side_effect=fail_and_send)
        assert sorted(process.pid for process in tree.stop(PATIENCE)) == sorted(started)


class TestUnluckyReadings:
    """What /proc says in the moment of a change."""

    @pytest.mark.parametrize("state", [b"X", b"Z"])
    def test_exec_of_another_thread(self, mocker: MockerFixture, state: bytes) -> None:
        """A process one of whose threads calls execve() looks like one that is gone, and is there (fs/exec.c)."""

        def read_unluckily(path: str) -> bytes:
            stat = read_file(path)
            if path == f"/proc/{child}/stat" and not unlucky:
                unlucky.append(path)
                name, _, rest = stat.rpartition(b")")
                fields = rest.split()
                fields[0], fields[17] = state, b"0"
                return b"".join([name, b") ", b" ".join(fields)])
            return stat

        unlucky: list[str] = []
        tree, _, [child] = lead(start_child)
        read_file = processes._read_file
        mocker.patch.object(processes, "_read_file", autospec=True, side_effect=read_unluckily)
        assert find(tree) == [child]
        assert unlucky
        assert find(tree) == [child]

    def test_relay(self, mocker: MockerFixture) -> None:
        """One that ends after the list was read, and whose successor the list has not, is not the last of its line."""
        tree, leader, [child] = lead(start_child)
        gone, _ = start_waiting(lambda: None)
        kill_child(gone)
        lists = [[(leader, None), (gone, None)], [(leader, None), (child, None)]]
        mocker.patch.object(process_tree, "list_pids", autospec=True, side_effect=lists)
        assert find(tree) == [child]

    def test_relay_without_end(self, mocker: MockerFixture) -> None:
        """Where numbers vanish all the time, a look has an end."""
        tree, leader, _ = lead()
        listings = mocker.patch.object(process_tree, "list_pids", autospec=True)
        listings.side_effect = ([(leader, None), (2**22 + number, None)] for number in itertools.count())
        assert find(tree) == []
        assert listings.call_count == process_tree.MAX_LISTINGS


class TestSpared:
    """Programs that tasks share, and that none has started on purpose: gpg-agent, a build server, a pause process."""

    NAME = "a-daemon-of-many"
    """The kernel keeps 15 characters of it."""

    @pytest.fixture
    def start_spared(self, tmp_path: Path) -> Callable[..., int]:
        """Return what starts a program of that name, in a session of its own, and returns the PID of its child."""
        program = tmp_path / self.NAME
        program.symlink_to("/bin/sh")

        def start_spared() -> int:
            command = [str(program), "-c", "sleep 600 & echo $!; wait"]
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
            assert process.stdout
            return int(process.stdout.readline())

        return start_spared

    def test_left_out(self, start_spared: Callable[[], int]) -> None:
        """A program of that name is left out with all that descends from it, and neither stopped; the rest is not."""
        tree, leader, [child, other] = lead(start_spared, start_child)
        spared = read(child).parent
        assert {child, spared, other} <= set(find(tree))
        tree.spared = frozenset({self.NAME})
        assert find(tree) == [other]
        tree.stop(PATIENCE, with_leader=True)
        assert [pid for pid in (leader, child, spared, other) if read(pid).stopped] == [leader, other]

    def test_descendant_that_is_left(self, start_spared: Callable[[], int]) -> None:
        """What it has started is left out also when the program itself has ended since."""
        tree, _, [child] = lead(start_spared)
        tree.spared = frozenset({self.NAME})
        assert find(tree) == []
        with contextlib.closing(Tree()) as held:
            parent = held.add(read(child).parent)
            os.kill(parent, signal.SIGKILL)
            assert held.gone(parent)
        assert find(tree) == []

    def test_beginning_of_a_name(self, start_spared: Callable[[], int]) -> None:
        """A name that another one begins with is not that one's."""
        tree, _, [child] = lead(start_spared)
        tree.spared = frozenset({self.NAME[:8]})
        assert {child, read(child).parent} <= set(find(tree))

    def test_leader(self) -> None:
        """The leader is ended, whatever its name is, and so is what it has started."""

        def rename_and_start() -> int:
            set_name(b"leader")
            return start_child()

        tree, leader, [child] = lead(rename_and_start)
        tree.spared = frozenset({"leader"})
        assert sorted(process.pid for process in tree.find(with_leader=True)) == sorted([leader, child])


class TestNumberOfTheLeader:
    @pytest.mark.parametrize(("older", "found"), [(0, False), (1, True)])
    def test_member_that_has_got_it(self, mocker: MockerFixture, older: int, found: bool) -> None:
        """A look leaves out the leader, but not a member that was started when the leader's number was free."""
        member = read(os.getpid())
        mocker.patch.object(ProcessTree, "_look", autospec=True, return_value={member.pid: member})
        tree = ProcessTree()
        tree._leader = replace(member, start=member.start - older)
        assert tree.find() == ([member] if found else [])


class TestStop:
    def test_all_are_stopped(self) -> None:
        """When it returns, none of them can start another process; the leader runs unless told otherwise."""
        tree, leader, started = lead(*STARTS)
        assert sorted(process.pid for process in tree.stop(PATIENCE)) == sorted(started)
        assert all(read(pid).stopped for pid in started)
        assert not read(leader).stopped
        tree.stop(PATIENCE, with_leader=True)
        assert read(leader).stopped

    def test_children_come_before_their_parents(self) -> None:
        """A stopped group whose last tie to its session dies is continued: it must be as good as dead by then."""
        tree, leader, started = lead(*STARTS)
        stopped = tree.stop(PATIENCE, with_leader=True)
        assert [process.start for process in stopped] == sorted(
            (read(pid).start for pid in [leader, *started]), reverse=True
        )
        assert stopped[-1].pid == leader
        assert stopped.index(read(started[0])) > stopped.index(read(started[1]))

    def test_last_look_begins_when_all_have_stopped(self, mocker: MockerFixture) -> None:
        """A look may have passed the place where what somebody is forking appears: another one follows the stop."""
        process = read(os.getpid())
        looks = [[replace(process, stopped=stopped)] for stopped in (False, False, True, True)]
        look = mocker.patch.object(ProcessTree, "find", autospec=True, side_effect=looks)
        send = mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=True)
        assert ProcessTree().stop(PATIENCE) == looks[-1]
        assert look.call_count == len(looks)
        assert send.mock_calls == [mocker.call(process, (signal.SIGSTOP,))] * 2, "it may have been continued"

    def test_member_that_another_continues(self, mocker: MockerFixture) -> None:
        """Another program of the tree continues it, as a watchdog does before it is stopped itself: it is stopped again."""

        def stop_and_continue(process: Process, signals: list[int]) -> bool | None:
            sent = send_signals(process, signals)
            if process.pid == child and not continued:
                os.kill(child, signal.SIGCONT)
                continued.append(child)
            return sent

        tree, _, [child] = lead(start_child)
        continued: list[int] = []
        mocker.patch.object(process_tree, "send_signals", autospec=True, side_effect=stop_and_continue)
        began = time.monotonic()
        tree.stop(PATIENCE)
        assert time.monotonic() - began < PATIENCE
        assert read(child).stopped

    def test_one_look_that_finds_nobody_is_not_enough(self, mocker: MockerFixture) -> None:
        """Who has started a successor and exited, after the list was read and before its own turn, shows neither."""
        stopped = [replace(read(os.getpid()), stopped=True)]
        looks = [[], stopped, stopped, stopped]
        mocker.patch.object(ProcessTree, "find", autospec=True, side_effect=looks)
        mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=True)
        assert ProcessTree().stop(PATIENCE) == stopped

    def test_what_is_started_meanwhile_is_stopped(self, mocker: MockerFixture) -> None:
        """What a member starts between the look and its SIGSTOP is looked for, and stopped, as well."""

        def start_starter() -> int:
            def main() -> None:
                order.hear()
                told.tell(start_daemon())
                pause_for_ever()

            return fork(main)

        def start_another_and_send(process: Process, signals: Any) -> bool | None:
            if not started_meanwhile:
                order.tell("start another")
                started_meanwhile.append(told.hear())
            return send(process, signals)

        started_meanwhile: list[int] = []
        send = processes.send_signals
        with contextlib.closing(Relay()) as order, contextlib.closing(Relay()) as told:
            tree, _, [child] = lead(start_starter)
            mocker.patch.object(
                process_tree, "send_signals", autospec=True, side_effect=start_another_and_send
            )
            stopped = tree.stop(PATIENCE)
        assert sorted(process.pid for process in stopped) == sorted([child, *started_meanwhile])
        assert all(read(process.pid).stopped for process in stopped)

    @pytest.mark.parametrize("spared", [frozenset(), frozenset({"somebody"})])
    def test_stopped_when_it_is_read(self, mocker: MockerFixture, spared: frozenset[str]) -> None:
        """What is gone after a look, and has started another, is stopped before, unless it may have to be spared."""
        tree, _, [child] = lead(start_child)
        tree.spared = spared
        order: list[Any] = []

        def note_and_send(process: Process, signals: Any) -> bool | None:
            order.append(process.pid)
            return send_signals(process, signals)

        def note_and_find(*args: Any) -> Any:
            order.append("looked")
            return find_members(*args)

        find_members = ProcessTree._find_members
        mocker.patch.object(process_tree, "send_signals", autospec=True, side_effect=note_and_send)
        mocker.patch.object(ProcessTree, "_find_members", autospec=True, side_effect=note_and_find)
        tree.stop(PATIENCE)
        assert order[0] == ("looked" if spared else child)
        assert read(child).stopped

    def test_no_time_at_all(self) -> None:
        """All are sent SIGSTOP once in any case."""
        tree, _, started = lead(*STARTS)
        assert sorted(process.pid for process in tree.stop(0)) == sorted(started)
        deadline = time.monotonic() + PATIENCE
        while not all(read(pid).stopped for pid in started):
            assert time.monotonic() < deadline

    def limit_time(self, mocker: MockerFixture, find: Callable[..., list[Process]]) -> None:
        """Have a tree find what ``find`` does, and fail if it goes on asking."""
        given_up_at = time.monotonic() + PATIENCE

        def find_in_time(tree: ProcessTree, **kwargs: bool) -> list[Process]:
            assert time.monotonic() < given_up_at
            return find(tree, **kwargs)

        mocker.patch.object(ProcessTree, "find", autospec=True, side_effect=find_in_time)

    def test_what_does_not_stop_is_not_waited_for(self, mocker: MockerFixture) -> None:
        """It does not wait for ever, as for a process that does not get to run."""
        tree, _, [pid] = lead(start_child)
        mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=True)
        self.limit_time(mocker, ProcessTree.find)
        assert [process.pid for process in tree.stop(0.1)] == [pid]

    def test_time_is_limited_whatever_appears(self, mocker: MockerFixture) -> None:
        """Processes that cannot be stopped, and start others all the time, do not keep it from an end."""
        tree, _, [pid] = lead(start_child)
        process = read(pid)
        self.limit_time(mocker, lambda *_, **__: [replace(process, start=time.monotonic())])
        assert len(tree.stop(0.1)) == 1


class TestSignalGroup:
    def test_members_of_the_group(self, mocker: MockerFixture) -> None:
        """The leader and what has stayed in its group get the signal; what has left it does not, nor does a stranger."""
        tree, leader, [child, _, _] = lead(start_child, start_session, start_daemon)
        start_session()
        send = mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=True)
        assert tree.signal_group(signal.SIGTERM)
        assert sorted(call.args[0].pid for call in send.mock_calls) == sorted([leader, child])
        assert {tuple(call.args[1]) for call in send.mock_calls} == {(signal.SIGTERM,)}
        assert tree.end_signals == {}, "it is the task's own end"

    def test_nobody(self) -> None:
        """Where nobody is in the group any more, the caller is told."""
        tree, leader, _ = lead(start_session)
        kill_child(leader)
        assert not tree.signal_group(signal.SIGTERM)


class TestKillAll:
    def test_stopped_before_the_first_is_killed(self, mocker: MockerFixture) -> None:
        """None is killed before all have come to stop, and so can start no other that nobody is left to tell of."""
        tree, _, started = lead(*STARTS)
        send = processes.send_signals
        stopped: list[bool] = []

        def look_and_send(process: Process, signals: Any) -> bool | None:
            if signal.SIGKILL in signals and not stopped:
                stopped.extend(read(pid).stopped for pid in started)
            return send(process, signals)

        mocker.patch.object(process_tree, "send_signals", autospec=True, side_effect=look_and_send)
        with contextlib.closing(Tree()) as held:
            for pid in started:
                held.add(pid)
            killed = tree.kill_all(PATIENCE)
            assert all(held.gone(pid) for pid in started)
        assert sorted(process.pid for process in killed) == sorted(started)
        assert stopped == [True] * len(started)
        assert set(tree.end_signals.values()) == {"SIGKILL"}


class TestFallbacks:
    def test_limit_is_capped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hard limit below the mark, as a container or a service may have, leaves the variable."""
        monkeypatch.delenv(MARK_VARIABLE, raising=False)

        def main() -> list[int]:
            resource.setrlimit(resource.RLIMIT_RTTIME, (10**6, 10**6))
            os.setsid()
            mark_process()
            return [start_daemon()]

        leader, started = start_waiting(main)
        tree = ProcessTree()
        tree.set_leader(leader)
        kill_child(leader)
        assert find(tree) == started

    def test_without_the_limit(self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture) -> None:
        """Where the limit cannot be set a variable marks whatever keeps its environment."""
        for call in ("setrlimit", "prlimit"):
            mocker.patch.object(resource, call, autospec=True, side_effect=PermissionError)
        monkeypatch.delenv(MARK_VARIABLE, raising=False)
        tree, leader, [daemon, _] = lead(start_daemon, start_daemon_without_environment)
        kill_child(leader)
        assert find(tree) == [daemon]

    def test_without_prlimit(self, mocker: MockerFixture) -> None:
        """The limits of another user's process, which prlimit() denies, are read from /proc."""
        tree, leader, started = lead(*STARTS)
        kill_child(leader)
        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=PermissionError)
        assert find(tree) == sorted(started)

    def test_without_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Elsewhere than on Linux psutil knows the processes."""
        monkeypatch.setattr(processes, "PROC", str(tmp_path / "missing"))
        own = read(os.getpid())
        assert own is not None
        assert (own.pid, own.parent, own.session) == (os.getpid(), os.getppid(), os.getsid(0))
        tree, leader, started = lead(start_child, start_session, start_daemon)
        assert find(tree) == sorted(started)
        assert read_process(leader) is not None
        kill_child(leader)
        assert read_process(leader) is None

    @pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError])
    def test_entries_that_vanish(self, error: type[OSError]) -> None:
        """A process that ends between the listing and the look is left out."""
        tree, _, [hidden, seen] = lead(start_child, start_child)
        with self.failing_to_open(f"/proc/{hidden}/", error):
            assert find(tree) == [seen]

    def test_entries_that_are_closed(self) -> None:
        """A process of our own user is found by what the kernel tells without its entry (hidepid)."""
        tree, _, [hidden, seen] = lead(start_child, start_child)
        with self.failing_to_open(f"/proc/{hidden}/", PermissionError):
            assert find(tree) == sorted([hidden, seen])

    def test_closed_entry_of_another_user(self, mocker: MockerFixture) -> None:
        """Somebody else's is left out, for it cannot even be told whether it is alive."""
        tree, _, [hidden, seen] = lead(start_child, start_child)
        look = resource.prlimit

        def refuse(pid: int, *args: Any) -> Any:
            if pid == hidden:
                raise PermissionError
            return look(pid, *args)

        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=refuse)
        with self.failing_to_open(f"/proc/{hidden}/", PermissionError):
            assert find(tree) == [seen]

    @contextlib.contextmanager
    def failing_to_open(self, folder: str, error: type[OSError]) -> Iterator[None]:
        def refuse(path: str, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(folder):
                raise error
            return original(path, *args, **kwargs)

        original = os.open
        with mock.patch.object(os, "open", autospec=True, side_effect=refuse):
            yield


class TestHidden:
    """
    An unprivileged supervisor that is not dumpable, as from SDK 1.2 on, with a /proc that is mounted with hidepid=1.

    Its own tasks, which inherit that, are listed, but their entries are closed to it.
    """

    def run(self, main: Callable[[], Any]) -> None:
        def be_unprivileged() -> dict[str, Any]:
            mount_proc(b"hidepid=1")
            become_nobody()
            main()
            return {}

        run_in_fork(be_unprivileged)

    def test_found_and_ended(self) -> None:
        """All that carries the mark, or is in the session of one that does, is found, stopped and ended."""

        def main() -> None:
            forks = [fork_child, fork_session, fork_daemon, fork_stray]
            tree, leader, started = lead(*forks)
            starts = {read(pid).start for pid in [leader, *started]}
            assert max(starts) < 0
            assert len(starts) == 1 + len(started), "each is told from the others"
            assert find(tree) == sorted(started)
            kill_child(leader)
            assert find(tree) == sorted(started)
            stopped = tree.stop(PATIENCE)
            assert sorted(process.pid for process in stopped) == sorted(started)
            with contextlib.closing(Tree()) as held:
                for pid in started:
                    held.add(pid)
                tree.signal(stopped, signal.SIGKILL)
                assert all(held.gone(pid) for pid in started)
            assert find(tree) == []
            assert tree.look_failure is None

        self.run(main)

    def test_entries_that_open(self) -> None:
        """What executes another program becomes visible, and is found all the same; so is the leader signalled."""

        def main() -> None:
            def become_sleeper(order: Relay) -> None:
                order.hear()
                os.execv("/bin/sleep", ["sleep", "600"])  # noqa: S606

            def start() -> int:
                return fork(lambda: become_sleeper(orders[0]))

            orders = [Relay(), Relay()]
            with contextlib.closing(Relay()) as told:
                leader = fork(
                    in_turn(
                        os.setsid, mark_process, lambda: told.tell(start()), lambda: become_sleeper(orders[1])
                    )
                )
                tree = ProcessTree()
                tree.set_leader(leader)
                child = told.hear()
                hidden = tree.find(with_leader=True)
                assert sorted(process.pid for process in hidden) == sorted([leader, child])
                for order in orders:
                    order.tell("execute")
                deadline = time.monotonic() + PATIENCE
                while any(read(pid).start < 0 for pid in (leader, child)):
                    assert time.monotonic() < deadline
                assert sorted(process.pid for process in tree.find(with_leader=True)) == sorted(
                    [leader, child]
                )
                assert tree.signal_leader(signal.SIGTERM)
                assert os.WTERMSIG(os.waitpid(leader, 0)[1]) == signal.SIGTERM
                assert find(tree) == [child]

        self.run(main)

    def test_strangers(self) -> None:
        """Another task is not touched, nor whoever has got the number of a process that has ended."""

        def main() -> None:
            tree, _, [child] = lead(fork_child)
            _, other, others = lead(fork_child, fork_daemon)
            assert find(tree) == [child]
            process = read(child)
            assert is_alive(process)
            assert not is_alive(replace(process, start=process.start - 1))
            assert send_signals(replace(process, start=process.start - 1), [signal.SIGKILL]) is None
            assert all(read_process(pid) for pid in (child, other, *others))
            assert read_process(1) is None, "it is another user's"

        self.run(main)

    def test_zombie(self) -> None:
        """One that has ended is dead, whether or not somebody collects it."""

        def main() -> None:
            pid = fork(lambda: None)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert processes.is_zombie_or_gone(pid)
            assert read_process(pid) is None

        self.run(main)

    def test_supervisor(self) -> None:
        """One that is hidden counts as alive as long as its number is taken, be it by another user."""

        def main() -> None:
            supervisor = fork_child()
            origin = make_origin(Process(supervisor, 1, "", 0, 0, stopped=False, dead=False))
            assert read(supervisor).start < 0
            assert is_origin_alive(origin)
            kill_child(supervisor)
            assert not is_origin_alive(origin)
            assert is_origin_alive(make_origin(Process(1, 1, "", 0, 0, stopped=False, dead=False)))

        self.run(main)

    def test_without_pidfd(self) -> None:
        """Where there is no pidfd it is taken for alive as long as its entry is closed."""

        def main() -> None:
            pid = fork_child()
            lack("os.pidfd_open")
            assert read(pid).start < 0

        self.run(main)

    @pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM], ids=errno.errorcode.get)
    def test_no_descriptor_left(self, error: int) -> None:
        """What cannot be told for want of a file descriptor is not taken for gone."""

        def main() -> None:
            tree, _, [child] = lead(fork_child)
            process = read(child)
            misbehave("os.pidfd_open", error)
            assert is_alive(process)
            assert find(tree) == []
            assert tree.look_failure == os.strerror(error)

        self.run(main)


class TestInterrupted:
    @pytest.mark.parametrize("look", [2, 3])
    def test_nothing_stays_stopped(self, mocker: MockerFixture, look: int) -> None:
        """An exception between SIGSTOP and SIGKILL does not keep those from being killed that were stopped."""

        def lead() -> None:
            os.setsid()
            relay.tell(fork(pause_for_ever))

        def interrupt(**kwargs: Any) -> list[Process]:
            looks.append(kwargs)
            if len(looks) == look:
                raise KeyboardInterrupt
            return find(**kwargs)

        looks: list[Any] = []
        with contextlib.closing(Relay()) as relay, contextlib.closing(Tree()) as held, waiting(lead) as pid:
            child = held.add(relay.hear())
            tree = ProcessTree()
            tree.set_leader(pid)
            find = tree.find
            mocker.patch.object(tree, "find", autospec=True, side_effect=interrupt)
            with pytest.raises(KeyboardInterrupt):
                tree.kill_all(PATIENCE, with_leader=True)
            assert held.gone(child)
            assert ended_by(pid) == signal.SIGKILL
