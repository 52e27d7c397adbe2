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
import ctypes
import errno
import itertools
import os
import resource
import signal
import subprocess
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
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
    write_sudo,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    SLEEPER,
    Relay,
    Tree,
    ended_by,
    fork,
    hear_in_popen,
    in_turn,
    kill_child,
    lift_limit,
    limit_realtime,
    list_pending,
    make_zombie,
    pause_for_ever,
    set_name,
    waiting,
)

from airflow.sdk.execution_time.teardown import process_tree
from airflow.sdk.execution_time.teardown.process_tree import (
    MARK_VARIABLE,
    RLIMIT_LOCKS,
    Process,
    ProcessTree,
    compute_mark,
    compute_origin,
    give_mark,
    group_by_owner,
    invent_mark,
    is_alive,
    is_condemned,
    is_origin_alive,
    list_pids,
    look_at,
    mark_process,
    read_limits,
    read_origin,
    read_process,
    send_signals,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_mock import MockerFixture

Started = TypeVar("Started")

pytestmark = pytest.mark.usefixtures("list_left")


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
            monkeypatch.setattr(process_tree, "PROC", str(tmp_path / "missing"))
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
        script = "(prlimit --rttime=unlimited sleep 600 & echo $!); exec sleep 600"

        def start_script() -> list[int]:
            shell = subprocess.Popen(["bash", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
            assert shell.stdout
            return [shell.pid, int(shell.stdout.readline())]

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
            resource.prlimit(0, RLIMIT_LOCKS, (process_tree.MARK_FLAG + 1, resource.RLIM_INFINITY))
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
            invented = process_tree.invent_mark(leader)
            if first == "leader":
                assert told.hear() == "marked"
                own = compute_mark(read(leader))
                assert process_tree.give_mark(leader, invented) == own
                assert read_limits(leader) == (own,)
            else:
                assert process_tree.give_mark(leader, invented) == invented
                order.tell("mark yourself")
                assert told.hear() == "marked"
                assert read_limits(leader) == (invented,)

    def test_mark_of_a_namesake(self) -> None:
        """A mark that was inherited is not taken for one's own, though its leader had the same number once."""
        leader, _ = start_waiting(os.setsid)
        inherited, mark = process_tree.invent_mark(leader), process_tree.invent_mark(leader)
        process_tree.give_mark(leader, inherited)
        assert process_tree.give_mark(leader, mark, inherited=[inherited]) == mark
        assert read_limits(leader) == (mark, inherited)

    def test_marks_of_another_user(self, mocker: MockerFixture) -> None:
        """Both marks are read in /proc where prlimit() is denied."""
        _, _, [inner] = lead(lambda: supervise(start_daemon))
        marks = [read_limits(pid) for pid in inner]
        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=PermissionError)
        assert [read_limits(pid) for pid in inner] == marks
        assert all(len(of_one) == 2 for of_one in marks)


def make_origin(supervisor: Process) -> int:
    return compute_origin(supervisor, process_tree.MARK_FLAG)


class TestOrigin:
    """Who the supervisor of a tree is, and which of its trees that is."""

    def test_own_limit(self) -> None:
        """What has set the limit of the mark for itself, detached and lost its parents belongs to its tree alone."""
        trees = [fork_when_adopted(limit_realtime) for _ in range(2)]
        for _, leader, daemon in trees:
            assert read_limits(daemon) == (read_origin(daemon),)
            kill_child(leader)
        assert [find(tree) for tree, _, _ in trees] == [[daemon] for _, _, daemon in trees]

    @pytest.mark.parametrize("limits", [[lift_limit], [limit_realtime, lift_limit]])
    def test_opt_out(self, limits: list[Callable[[], None]]) -> None:
        """Who has lifted that limit has left all the same."""
        tree, leader, _ = fork_when_adopted(lambda: [limit() for limit in limits])
        kill_child(leader)
        assert find(tree) == []

    def test_of_another_user(self, mocker: MockerFixture) -> None:
        """It is read in /proc where prlimit() is denied, and so is that the limit was lifted."""
        _, _, daemon = fork_when_adopted(limit_realtime)
        _, _, gone_out = fork_when_adopted(lift_limit)
        origin = read_origin(daemon)
        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=PermissionError)
        assert (read_limits(daemon), read_limits(gone_out)) == ((origin,), ())
        assert read_origin(daemon) is None, "nobody but its user and root asks for it"

    @pytest.mark.parametrize("refusing", ["resource.prlimit", "resource.RLIMIT_RSS"])
    def test_refused(self, monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
        """Where the limit cannot be set, or is unknown, there is none, and the mark serves."""
        monkeypatch.delenv(MARK_VARIABLE, raising=False)

        def main() -> dict[str, Any]:
            if refusing == "resource.prlimit":
                rss = resource.RLIMIT_RSS
                misbehave(refusing, errno.EPERM, concerns=lambda _, what, *__: what == rss)
            else:
                lack(refusing)
            tree, leader, daemon = fork_when_adopted(lambda: None)
            kill_child(leader)
            return {"found": find(tree) == [daemon], "origin": read_origin(daemon)}

        assert run_in_fork(main) == {"found": True, "origin": None}

    def test_alive(self) -> None:
        """A supervisor is, until it has ended, whether or not somebody collects it then."""
        pid = fork_child()
        origin = make_origin(read(pid))
        assert is_origin_alive(origin)
        make_zombie(pid)
        assert not is_origin_alive(origin)
        os.waitpid(pid, 0)
        assert not is_origin_alive(origin)

    def test_both_give_the_same(self) -> None:
        """A leader gives itself what its supervisor gives it, and before: what it starts at once has it, too."""
        leader, [child] = start_waiting(os.setsid, mark_process, lambda: [start_child()])
        given = read_set_origin(leader)
        assert given == read_origin(child)
        ProcessTree().set_leader(leader)
        assert read_origin(leader) == given
        assert is_origin_alive(given)

    def test_supervisor_reads_itself_once(self, mocker: MockerFixture) -> None:
        """Of many starts only the first one reads the supervisor, which is slow just after a fork."""
        process_tree._read_self.cache_clear()
        read_file = mocker.spy(process_tree, "_read_file")
        for _ in range(2):
            fork_when_adopted(os.getpid)
        own = mocker.call(f"{process_tree.PROC}/{os.getpid()}/stat")
        assert read_file.call_args_list.count(own) == 1

    def test_supervisor_in_a_namespace_within(self) -> None:
        """A supervisor is not taken for the process whose number it has in a PID namespace of its own."""

        def main() -> dict[str, Any]:
            pid = fork_waiting(os.setsid)
            ProcessTree().set_leader(pid)
            return {"own": os.getpid(), "alive": is_origin_alive(read_set_origin(pid))}

        process_tree._read_self(1)
        assert run_in_namespace(main) == {"own": 1, "alive": True}

    def test_recycled_supervisor(self) -> None:
        """Whoever has got its number since is not the supervisor."""
        supervisor = read(os.getpid())
        assert is_origin_alive(make_origin(supervisor))
        assert not is_origin_alive(make_origin(replace(supervisor, start=supervisor.start - 1)))

    def test_largest_numbers(self) -> None:
        """Whatever the numbers are, it is a limit that is never reached, and is not condemned."""
        supervisor = replace(read(os.getpid()), pid=(1 << 22) - 1, start=(1 << 40) - 1)
        origin = compute_origin(supervisor, (1 << 63) - 1)
        assert 1 << 62 <= origin < 1 << 63
        assert not is_condemned(origin)

    def test_condemned(self) -> None:
        """Who is stopped to be killed is condemned before, and told by its origin still; who is spared is not."""
        tree, leader, daemon = fork_when_adopted(limit_realtime)
        _, _, shared = fork_when_adopted(lambda: set_name(b"shared"))
        assert tree._mark
        resource.prlimit(shared, resource.RLIMIT_RTTIME, (tree._mark, resource.RLIM_INFINITY))
        assert {daemon, shared} <= set(find(tree))
        tree.spared = frozenset({"shared"})
        origins = {pid: read_origin(pid) for pid in (leader, daemon, shared)}
        tree.stop(PATIENCE, with_leader=True)
        condemned = {pid: is_condemned(read_set_origin(pid)) for pid in origins}
        assert condemned == {leader: True, daemon: True, shared: False}
        assert read_limits(daemon) == (origins[daemon],)
        assert find(tree) == [daemon]

    def test_limit_of_its_own(self) -> None:
        """A limit that is not an origin is left as it is."""
        pid = fork_waiting(lambda: resource.setrlimit(resource.RLIMIT_RSS, (1 << 30, resource.RLIM_INFINITY)))
        process_tree.condemn(pid)
        assert resource.prlimit(pid, resource.RLIMIT_RSS)[0] == 1 << 30
        assert read_origin(pid) is None

    def test_lifted(self) -> None:
        """Who lifts all marks, as a watchdog does, carries none, and is no part of the tree."""
        tree, leader, daemon = fork_when_adopted(process_tree.lift_marks)
        kill_child(leader)
        assert (read_limits(daemon), read_origin(daemon), find(tree)) == ((), None, [])


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
        process_tree.condemn(leader)
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
        send = process_tree.send_signals

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
        read_file = process_tree._read_file
        mocker.patch.object(process_tree, "_read_file", autospec=True, side_effect=read_unluckily)
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
        send = process_tree.send_signals
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
        send = process_tree.send_signals
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
        monkeypatch.setattr(process_tree, "PROC", str(tmp_path / "missing"))
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
            assert process_tree.is_zombie_or_gone(pid)
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


class TestReadProcess:
    def test_any_name(self) -> None:
        """A name may hold parentheses, blanks and newlines."""
        name = b"a) Z 1\n(b"
        pid, _ = start_waiting(lambda: set_name(name))
        process = read_process(pid)
        assert process is not None
        assert (process.name, process.parent, process.session) == (name.decode(), os.getpid(), os.getsid(0))

    def test_zombie(self) -> None:
        """A zombie is dead, whether or not somebody collects it."""
        pid, _ = start_waiting(lambda: None)
        assert read_process(pid) is not None
        make_zombie(pid)
        assert read_process(pid) is None
        zombie = look_at(pid)
        assert zombie
        assert zombie.dead

    def test_process_without_its_first_thread(self) -> None:
        """A process lives on in its other threads, although its state says zombie."""

        def main() -> None:
            threading.Thread(target=pause_for_ever).start()
            told.tell("started")
            ctypes.CDLL(None).pthread_exit(None)

        with contextlib.closing(Relay()) as told:
            pid = fork(main)
            assert told.hear() == "started"
        deadline = time.monotonic() + PATIENCE
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
        assert read_process(pid) is not None


class TestSendSignal:
    @pytest.mark.parametrize("pidfd", ["works", errno.ENOSYS, errno.EMFILE, None])
    def test_process_gets_it(
        self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, pidfd: Any
    ) -> None:
        """It does so with and without a pidfd."""
        pid, _ = start_waiting(lambda: None)
        process = read(pid)
        with contextlib.closing(Tree()) as held:
            held.add(pid)
            if pidfd is None:
                monkeypatch.delattr(os, "pidfd_open")
            elif pidfd != "works":
                mocker.patch.object(os, "pidfd_open", autospec=True, side_effect=OSError(pidfd, "refused"))
            assert send_signals(process, [signal.SIGTERM])
            assert held.gone(pid)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
        assert send_signals(process, [signal.SIGTERM]) is None
        assert not is_alive(process)

    @pytest.mark.parametrize("pidfd", [True, False])
    def test_recycled_number(self, monkeypatch: pytest.MonkeyPatch, *, pidfd: bool) -> None:
        """Whoever has got the number since is not signalled."""
        pid, _ = start_waiting(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) and [])
        present = read(pid)
        if not pidfd:
            monkeypatch.delattr(os, "pidfd_open")
        assert send_signals(replace(present, start=present.start - 1), [signal.SIGTERM]) is None
        assert list_pending(pid) == 0
        assert send_signals(present, [signal.SIGTERM])
        assert list_pending(pid) == 1 << signal.SIGTERM - 1

    @pytest.mark.parametrize("pidfd", [True, False])
    def test_denied(self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, *, pidfd: bool) -> None:
        """A signal that is not allowed is told to the caller, who may have somebody else send it."""
        if not pidfd:
            monkeypatch.delattr(os, "pidfd_open")
        mocker.patch.object(
            *((signal, "pidfd_send_signal") if pidfd else (os, "kill")),
            autospec=True,
            side_effect=PermissionError,
        )
        assert send_signals(read(os.getpid()), [signal.SIGCONT]) is False

    def test_record(self) -> None:
        """Who has ended before its signal is not among those that were ended by it."""
        tree, _, [child, other] = lead(start_child, start_child)
        members = tree.find()
        with contextlib.closing(Tree()) as held:
            held.add(child)
            os.kill(child, signal.SIGKILL)
            assert held.gone(child)
        tree.signal(members, signal.SIGTERM)
        assert [process.pid for process in tree.end_signals] == [other]

    def test_every_signal(self) -> None:
        """A stopped process is told to end, and continued so that it can."""
        tree, _, [pid] = lead(start_child)
        tree.stop(PATIENCE)
        with contextlib.closing(Tree()) as held:
            held.add(pid)
            tree.signal(tree.find(), signal.SIGTERM, signal.SIGCONT)
            assert held.gone(pid)

    def test_descriptors_are_closed(self) -> None:
        """It leaves none behind."""
        pid, _ = start_waiting(lambda: None)
        before = sorted(os.scandir("/proc/self/fd"), key=lambda entry: entry.name)
        send_signals(read(pid), [signal.SIGCONT])
        after = sorted(os.scandir("/proc/self/fd"), key=lambda entry: entry.name)
        assert len(before) == len(after)


class TestSudo:
    """Processes of another user, for which the kernel answers EPERM."""

    @pytest.fixture(autouse=True)
    def deny(self, mocker: MockerFixture) -> None:
        mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=False)

    @pytest.fixture(autouse=True)
    def patient(self, mocker: MockerFixture) -> None:
        """Let a sudo that answers take as long as it does on a busy machine."""
        mocker.patch.object(process_tree, "SUDO_TIMEOUT", PATIENCE)

    @pytest.fixture
    def owned_by(self, mocker: MockerFixture) -> Callable[..., list[Process]]:
        """Return what gives the processes of a tree to users, one each, and returns them."""

        def own(tree: ProcessTree, *uids: int) -> list[Process]:
            processes = tree.find()
            by_owner = {uid: [processes[i]] for i, uid in enumerate(uids)}
            mocker.patch.object(process_tree, "group_by_owner", autospec=True, return_value=by_owner)
            return processes

        return own

    def install_sudo(self, monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        write_sudo(folder, script)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def install_sudo_that_fails_late(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, pid: int, says: str
    ) -> None:
        """Have sudo say something and fail when one of the processes has ended."""
        wait = f"until grep -q '^State:.Z' /proc/{pid}/status; do :; done"
        self.install_sudo(monkeypatch, folder, f"kill -9 {pid}; {wait}; echo {says} >&2; exit 1")

    @contextlib.contextmanager
    def hanging_sudo(self, folder: Path, says: str) -> Iterator[list[Any]]:
        """Have sudo say something and hang, from when on it is timed; yields the list of what its calls have said."""
        with contextlib.closing(Relay()) as told, pytest.MonkeyPatch.context() as patching:
            self.install_sudo(
                patching, folder, f"echo {says} >/proc/{os.getpid()}/fd/{told.writer}; exec sleep 600"
            )
            patching.setattr(process_tree, "SUDO_TIMEOUT", 0.1)
            yield hear_in_popen(told, patching)

    def test_numbers_only(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """One call for all of a user, as that user, which asks for no password and gets numbers only."""
        self.install_sudo(
            monkeypatch, tmp_path, f'printf "%s\\n" "$*" >>{tmp_path}/calls; shift 3; exec "$@"'
        )
        tree, _, started = lead(start_child, start_child)
        processes = sorted(tree.find(), key=lambda process: process.pid)
        tree.signal(processes, signal.SIGKILL)
        pids = " ".join(map(str, sorted(started)))
        assert (tmp_path / "calls").read_text() == f"-n -u #{os.geteuid()} kill -9 {pids}\n"
        assert tree.sudo_failures == {}
        deadline = time.monotonic() + PATIENCE
        while any(map(is_alive, processes)):
            assert time.monotonic() < deadline

    def test_as_root_where_not_as_the_user(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """A sudo that permits to kill as root alone is no failure."""
        self.install_sudo(monkeypatch, tmp_path, '[ "$2" = kill ] || exit 1')
        tree, _, _ = lead(start_child)
        tree.signal(owned_by(tree, 4711), signal.SIGTERM)
        assert tree.sudo_failures == {}

    def test_process_that_ends_meanwhile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Kill fails when one of many is gone; that is no refusal, and sudo is asked again for the rest."""
        tree, _, [polite, _] = lead(start_child, start_child)
        self.install_sudo_that_fails_late(monkeypatch, tmp_path, polite, "kill: No such process")
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {}

    def test_refusal_while_one_ends(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that does not permit it has refused, also if one of the processes has ended meanwhile."""
        tree, _, [polite, _] = lead(start_child, start_child)
        self.install_sudo_that_fails_late(monkeypatch, tmp_path, polite, "a password is required")
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "a password is required"}
        assert tree.end_signals == {}, "nobody was signalled"

    def test_nobody_is_stopped(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that takes its time to stop them could leave too little of it to kill them."""
        self.install_sudo(monkeypatch, tmp_path, f'printf "%s\\n" "$*" >>{tmp_path}/calls')
        tree, _, [child] = lead(start_child)
        began = time.monotonic()
        assert [process.pid for process in tree.kill_all(PATIENCE)] == [child]
        assert time.monotonic() - began < PATIENCE, "nobody is waited for to stop"
        assert (tmp_path / "calls").read_text() == f"-n -u #{os.geteuid()} kill -9 {child}\n"

    def test_failure_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What sudo says when it does not permit it is there to be logged."""
        self.install_sudo(monkeypatch, tmp_path, "echo a password is required >&2; exit 1")
        tree, _, _ = lead(start_child)
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "a password is required"}

    def test_one_failure_is_enough(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """A sudo that may not is not asked again, which every time would be logged and take its time."""
        self.install_sudo(monkeypatch, tmp_path, f"echo call >>{tmp_path}/calls; exit 1")
        tree, _, _ = lead(start_child)
        processes = owned_by(tree, 4711)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            tree.signal(processes, sig)
        assert (tmp_path / "calls").read_text() == "call\n" * 2, "as the user, and as root"
        assert tree.sudo_failures == {4711: "sudo ended with 1"}

    def test_failure_of_one_user_is_not_all_users(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """The sudoers may permit one user and not another."""
        self.install_sudo(
            monkeypatch, tmp_path, f'echo "$3 $4 $5" >>{tmp_path}/calls; [ "$3" = "#4712" ] || exit 1'
        )
        tree, _, _ = lead(start_child, start_child)
        processes = owned_by(tree, 4711, 4712)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            tree.signal(processes, sig)
        calls = (tmp_path / "calls").read_text().splitlines()
        assert [call for call in calls if call.startswith("#4712")] == ["#4712 kill -15", "#4712 kill -9"]
        assert list(tree.sudo_failures) == [4711]

    def test_all_users_at_once(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """What sudo takes for one user it takes for any number of them."""
        calls = tmp_path / "calls"
        wait = f"until [ $(wc -l <{calls}) = 3 ]; do :; done"
        self.install_sudo(monkeypatch, tmp_path, f"echo $3 >>{calls}; {wait}")
        tree, _, _ = lead(start_child, start_child, start_child)
        tree.signal(owned_by(tree, 4711, 4712, 4713), signal.SIGTERM)
        assert sorted(calls.read_text().split()) == ["#4711", "#4712", "#4713"]
        assert tree.sudo_failures == {}

    def test_root_is_not_asked_twice(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """A process of root is signalled as root in the first place."""
        self.install_sudo(monkeypatch, tmp_path, f"echo call >>{tmp_path}/calls; exit 1")
        tree, _, _ = lead(start_child)
        tree.signal(owned_by(tree, 0), signal.SIGTERM)
        assert (tmp_path / "calls").read_text() == "call\n"
        assert list(tree.sudo_failures) == [0]

    def test_deadline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not waited for any longer than the caller has time."""
        tree, _, _ = lead(start_child)
        with self.hanging_sudo(tmp_path, '"$5"'):
            monkeypatch.setattr(process_tree, "SUDO_TIMEOUT", PATIENCE)
            began = time.monotonic()
            tree.signal(tree.find(), signal.SIGTERM, signal.SIGCONT, deadline=began + 0.1)
            assert time.monotonic() - began < PATIENCE
        assert tree.sudo_failures == {os.geteuid(): process_tree.SUDO_TIMED_OUT}

    def test_sudo_that_hangs(self, tmp_path: Path) -> None:
        """It is not waited for, nor asked again but for the SIGKILL, for it may have been slow just once."""
        tree, _, _ = lead(start_child)
        with self.hanging_sudo(tmp_path, '"$5"') as calls:
            for sig in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
                tree.signal(tree.find(), sig)
        assert calls == [-signal.SIGTERM, -signal.SIGKILL]
        assert tree.sudo_failures == {os.geteuid(): process_tree.SUDO_TIMED_OUT}

    def test_sudo_that_hangs_and_may_not_be_killed(self, tmp_path: Path, mocker: MockerFixture) -> None:
        """Sudo becomes root before it runs a command; nobody waits for it then."""
        tree, _, _ = lead(start_child)
        refuse = mocker.patch.object(subprocess.Popen, "kill", autospec=True, side_effect=PermissionError)
        with self.hanging_sudo(tmp_path, "$$") as pids:
            tree.signal(tree.find(), signal.SIGTERM)
        assert refuse.called
        [pid] = pids
        os.kill(pid, signal.SIGKILL)

    def test_no_sudo(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that is not there is a failure like any other."""
        monkeypatch.setenv("PATH", str(tmp_path))
        tree, _, _ = lead(start_child)
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "there is no sudo"}


class TestSudoTime:
    def test_limit(self, mocker: MockerFixture) -> None:
        """A sudo that hangs costs a second, where nobody has less time."""
        popen = mocker.patch.object(subprocess, "Popen", autospec=True)
        popen.return_value.configure_mock(returncode=0, **{"communicate.return_value": ("", "")})
        assert process_tree.run_all({0: ["sudo"]}) == {0: None}
        [call] = popen.return_value.communicate.mock_calls
        assert 0 < call.kwargs["timeout"] <= 1


class TestGroupByOwner:
    def test_effective_user(self, mocker: MockerFixture) -> None:
        """It is the effective user whom sudo is asked to signal as, for a set-user-ID program has another real one."""
        process = read(start_child())
        ids = psutil.Process().uids()._replace(real=1, effective=2, saved=3)
        mocker.patch.object(psutil.Process, "uids", autospec=True, return_value=ids)
        assert group_by_owner([process]) == {2: [process]}

    def test_dead_process(self) -> None:
        """Whoever has ended belongs to nobody."""
        pid, _ = start_waiting(lambda: None)
        process = read(pid)
        kill_child(pid)
        assert group_by_owner([process]) == {}

    def test_no_descriptor_left(self) -> None:
        """Where the owner cannot be told for want of a file descriptor, nobody is asked, and nothing raised."""
        process = read(start_child())
        with contextlib.closing(Relay()) as told:

            def use_up_descriptors() -> None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
                told.tell([*group_by_owner([process])])

            fork(use_up_descriptors)
            assert told.hear() == []


class TestMark:
    def test_no_two_are_alike(self) -> None:
        """It is a limit that is never reached, and differs with the PID and with the start."""
        process = read(os.getpid())
        marks = {
            compute_mark(replace(process, pid=pid, start=start))
            for pid in (2, 3, 1 << 21)
            for start in (0, 1, 1 << 36)
        }
        assert len(marks) == 9
        assert all(1 << 62 <= mark < 1 << 63 for mark in marks)


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
