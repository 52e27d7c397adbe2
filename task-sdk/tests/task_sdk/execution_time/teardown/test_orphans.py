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
import os
import resource
import signal
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from task_sdk.execution_time.teardown.supervised.faults import (
    NOBODY,
    become_nobody,
    forbid_pidfd,
    lack,
    misbehave,
    mount_proc,
    run_in_fork,
    run_in_namespace,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    NEVER,
    PATIENCE,
    Relay,
    Tree,
    ended_by,
    ending_all,
    fork,
    forked,
    in_turn,
    kill_child,
    leave_others_alone,
    list_living,
    look_at_own_processes,
    make_zombie,
    pause_for_ever,
)
from task_sdk.execution_time.teardown.trees import read_dead_or_alive

from airflow.sdk.execution_time.teardown import ending, marks, orphans, process_tree, processes
from airflow.sdk.execution_time.teardown.marks import condemn, mark_process, read_origin
from airflow.sdk.execution_time.teardown.orphans import end_orphans, find_orphans, kill_condemned
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.processes import Process, is_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_mock import MockerFixture


@pytest.fixture(autouse=True)
def leave_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End every process that a test has started, however it ends, and none that it has not."""
    leave_others_alone(monkeypatch)
    look_at_own_processes(monkeypatch)
    with ending_all():
        yield


def lead(relay: Relay, main: Callable[[], list[int]]) -> None:
    """Be a supervisor of a leader, which tells its PID, and those that ``main`` returns."""

    def be_leader() -> None:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever other tests have installed
        mark_process()
        adopted.hear()
        relay.tell([os.getpid(), *main()])
        pause_for_ever()

    with contextlib.closing(Relay()) as adopted:
        ProcessTree().set_leader(fork(be_leader))
        adopted.tell("adopted")
        pause_for_ever()


@contextlib.contextmanager
def leading(
    main: Callable[[], list[int]] = list, supervisor: Callable[[], Any] = lambda: None
) -> Iterator[tuple[int, ...]]:
    """Yield the PIDs of a supervisor, which has run a function before, of its leader, and of the leader's processes."""
    with contextlib.closing(Relay()) as relay, forked(in_turn(supervisor, lambda: lead(relay, main))) as pid:
        yield (pid, *relay.hear())


def orphan(
    main: Callable[[], list[int]] = list, supervisor: Callable[[], Any] = lambda: None
) -> tuple[int, ...]:
    """Return the PIDs of a leader, whose supervisor has died, and of its processes."""
    with leading(main, supervisor) as (pid, *left):
        kill_child(pid)
        return tuple(left)


def find() -> list[int]:
    return [orphan.process.pid for orphan in find_orphans()]


def make_tree(leader: int, **choices: Any) -> ProcessTree:
    tree = ProcessTree()
    tree.set_orphaned_leader(leader, read_dead_or_alive(leader).start)
    for name, value in choices.items():
        setattr(tree, name, value)
    return tree


def fork_child() -> list[int]:
    return [fork(pause_for_ever)]


def fork_session() -> list[int]:
    """Fork a child that leads a session by now."""
    with contextlib.closing(Relay()) as ready:
        pid = fork(in_turn(os.setsid, lambda: ready.tell("ready"), pause_for_ever))
        ready.hear()
        return [pid]


def ignore_sigterm() -> list[int]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return []


def be_root_or_skip() -> None:
    if os.geteuid():
        pytest.skip("only root may be another user")


class TestFindOrphans:
    def test_leader(self) -> None:
        """A leader is an orphan when its supervisor has died, and not before; what it has started is not one."""
        with leading(fork_child) as (supervisor, leader, _):
            assert find() == []
            kill_child(supervisor)
            assert find() == [leader]
            assert not find_orphans()[0].condemned

    def test_leader_that_is_dead(self) -> None:
        """What is left of a tree whose leader is gone, or a zombie, may be what a success has left."""
        leader, _ = orphan(fork_child)
        make_zombie(leader)
        assert find() == []
        os.waitpid(leader, 0)
        assert find() == []

    def test_condemned(self) -> None:
        """What its supervisor was about to kill is found without its leader, when that supervisor has died."""
        with leading(fork_session) as (supervisor, leader, child):
            condemn(child)
            assert find() == []
            kill_child(supervisor)
            kill_child(leader)
            assert find() == [child]
            assert find_orphans()[0].condemned

    def test_condemned_by_another(self) -> None:
        """Who is about to be killed by one that lives is no orphan, though its own supervisor has died long ago."""
        leader, child = orphan(fork_session)
        tree = make_tree(leader)
        kill_child(leader)
        tree.condemn(tree.find())
        assert read_origin(child)
        assert find() == []

    def test_namesake_of_a_leader(self) -> None:
        """A process that has inherited a mark, and has got the number of the mark's leader since, leads nothing."""
        leader, child = orphan(fork_child)
        mark = marks.MARK_FLAG | 1 << marks.PID_MASK.bit_length() | child
        resource.prlimit(child, resource.RLIMIT_RTTIME, (mark, resource.RLIM_INFINITY))
        assert find() == [leader]

    def test_opt_out(self) -> None:
        """Who has lifted the limit of the mark leads nothing, though it has the origin of another's tree."""
        leader, child = orphan(fork_child)
        resource.prlimit(child, resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert find() == [leader]

    def test_opt_out_of_the_condemned(self) -> None:
        """So has who was condemned before, as what a task starts while it is ended."""
        leader, child = orphan(fork_session)
        condemn(child)
        assert set(find()) == {leader, child}
        resource.prlimit(child, resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert find() == [leader]

    def test_never_ourselves(self) -> None:
        """Who looks is no orphan, though the supervisor of its own task be dead."""

        def look() -> list[int]:
            signal.signal(signal.SIGUSR1, lambda *_: relay.tell(find()))
            return []

        with contextlib.closing(Relay()) as relay:
            leader, *_ = orphan(look)
            os.kill(leader, signal.SIGUSR1)
            assert relay.hear() == []
            assert find() == [leader]

    def test_other_users(self) -> None:
        """Whoever looks finds the orphans of its own user alone, also if it is root and may read all limits."""

        def read_as_privileged(pid: int) -> int | None:
            # Not every root has CAP_SYS_RESOURCE.
            return marks.read_limits_of_others(pid)[2] or None

        def look_as_nobody() -> dict[str, Any]:
            os.setuid(NOBODY)
            return {"origins": [read_origin(ours)], "found": find()}

        be_root_or_skip()
        others, *_ = orphan(supervisor=become_nobody)
        ours, *_ = orphan()
        condemned, *_ = orphan(supervisor=become_nobody)
        condemn(condemned)
        with mock.patch.object(orphans, "read_origin", autospec=True, side_effect=read_as_privileged):
            assert find() == [ours]
        assert orphans.is_ours(ours)
        assert not orphans.is_ours(others)
        found = run_in_fork(look_as_nobody)
        assert found["origins"] == [None]
        assert ours not in found["found"]

    def test_namespace_within(self) -> None:
        """The processes of a PID namespace within ours are not orphans here; they are there."""

        def main() -> dict[str, Any]:
            orphans.list_pids = processes.list_pids  # all that it has
            first, _ = orphan(fork_child)
            second, child = orphan(fork_session)
            condemn(child)
            kill_child(second)
            return {"found": find(), "expected": [first, child]}

        inner = run_in_namespace(main)
        assert inner["found"] == inner["expected"]
        assert find() == []
        origins = [origin for pid in list_living() if (origin := read_origin(pid))]
        assert [marks.is_origin_alive(origin) for origin in origins].count(False) >= 2

    def test_proc_of_another_namespace(self) -> None:
        """Where /proc tells others by the numbers that are used here, nobody is looked for."""

        def main() -> dict[str, Any]:
            orphan()
            numbers = [(pid, None) for pid in range(1, 9)]
            orphans.list_pids = look = mock.create_autospec(processes.list_pids, return_value=numbers)
            return {"found": find(), "looked": look.called}

        assert run_in_namespace(main, own_proc=False) == {"found": [], "looked": False}


class TestMeansToFind:
    """What finds orphans where something is not there."""

    def test_without_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Elsewhere than on Linux psutil knows the processes."""
        monkeypatch.setattr(processes, "PROC", str(tmp_path / "missing"))
        leader, _ = orphan(fork_child)
        assert find() == [leader]

    def test_hidden(self) -> None:
        """A runner whose entry in /proc is closed is told by the number in its mark."""

        def main() -> dict[str, Any]:
            mount_proc(b"hidepid=1")
            become_nobody()
            orphans.list_pids = processes.list_pids  # psutil would look at each
            leader, _ = orphan(fork_child)
            return {
                "found": [pid for pid in find() if pid == leader],
                "start": read_dead_or_alive(leader).start,
            }

        outcome = run_in_fork(main)
        assert len(outcome["found"]) == 1
        assert outcome["start"] < 0

    @pytest.mark.parametrize("what", ["resource.RLIMIT_RSS", "resource.prlimit"])
    def test_without_the_limit(self, what: str) -> None:
        """Where there is no origin there are no orphans."""

        def main() -> dict[str, Any]:
            lack(what)
            orphan(fork_child)
            return {"found": find()}

        assert run_in_fork(main) == {"found": []}

    def test_failing_looks_while_it_ends(self) -> None:
        """A runner that could not be looked for is not taken for gone, and is told to end all the same."""

        def main() -> dict[str, Any]:
            leader, *_ = orphan(ignore_sigterm)
            tree = make_tree(leader)
            ending.KILL_TIME = 0.1
            misbehave("os.scandir", errno.EMFILE)
            left = end_orphans([tree], 0.1)
            return {"left": [process.pid for process in left], "leader": leader}

        outcome = run_in_fork(main)
        assert outcome["left"] == [outcome["leader"]]

    def test_failing_look(self) -> None:
        """A list that cannot be had is not one without orphans."""

        def main() -> dict[str, Any]:
            orphans.list_pids = processes.list_pids
            misbehave("os.scandir", errno.EMFILE)
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                find_orphans()
            return {}

        run_in_fork(main)

    @pytest.mark.parametrize("how", ["absent", "ENOSYS"])
    @pytest.mark.parametrize("main", [list, ignore_sigterm], ids=["polite", "deaf"])
    def test_without_pidfd(self, how: str, main: Callable[[], list[int]]) -> None:
        """The end of a process is polled for."""

        def end() -> dict[str, Any]:
            forbid_pidfd(how)
            return {"left": end_orphans([make_tree(leader)], 0.2 if main is ignore_sigterm else PATIENCE)}

        leader, *_ = orphan(main)
        assert run_in_fork(end) == {"left": []}
        assert ended_by(leader) == (signal.SIGKILL if main is ignore_sigterm else signal.SIGTERM)


class TestEndOrphans:
    def test_runner_goes_first(self, mocker: MockerFixture) -> None:
        """What has left its group is asked to end when the runner has had its on_kill."""

        def lead_daemon() -> list[int]:
            def on_kill(*_: Any) -> None:
                awaited.hear()
                os._exit(0)

            started = fork_session()
            signal.signal(signal.SIGTERM, on_kill)
            return started

        def tell_and_wait(processes: Sequence[Process], deadline: float) -> None:
            awaited.tell("somebody is waited for")
            wait(processes, deadline)

        def look_and_send(process: Process, signals: Iterable[int]) -> bool | None:
            sent.append((process.pid, is_alive(runner)))
            return send(process, signals)

        wait, send = orphans.wait_until_gone, processes.send_signals
        sent: list[tuple[int, bool]] = []
        with contextlib.closing(Relay()) as awaited:
            leader, daemon = orphan(lead_daemon)
            runner = read_dead_or_alive(leader)
            mocker.patch.object(orphans, "wait_until_gone", autospec=True, side_effect=tell_and_wait)
            mocker.patch.object(process_tree, "send_signals", autospec=True, side_effect=look_and_send)
            assert end_orphans([make_tree(leader)], PATIENCE) == []
        assert sent == [(leader, True), (daemon, False)]

    def test_stopped_runner(self) -> None:
        """One that is stopped is continued, and ends by SIGTERM."""
        leader, *_ = orphan()
        os.kill(leader, signal.SIGSTOP)
        os.waitid(os.P_PID, leader, os.WSTOPPED)
        assert end_orphans([make_tree(leader)], PATIENCE) == []
        assert ended_by(leader) == signal.SIGTERM

    def test_death_in_the_grace(self) -> None:
        """Who is killed while it ends a tree, whose runner has gone, leaves orphans that the next one kills."""

        def lead_deaf_session() -> list[int]:
            def main() -> None:
                os.setsid()
                signal.signal(signal.SIGTERM, lambda *_: told.tell("told to end"))
                told.tell("ready")
                pause_for_ever()

            pid = fork(main)
            assert told.hear() == "ready"
            return [pid]

        with contextlib.closing(Relay()) as told:
            leader, deaf = orphan(lead_deaf_session)
            with forked(lambda: end_orphans([make_tree(leader)], NEVER)):
                assert told.hear() == "told to end"
            assert find() == [deaf]
            assert find_orphans()[0].condemned

    def test_deaf_trees(self) -> None:
        """All trees have one grace together, and nothing outlives it; nor is anybody else's process touched."""
        with leading(fork_session) as bystanders, contextlib.closing(Tree()) as held:
            trees = [orphan(lambda: [*ignore_sigterm(), *fork_session()]) for _ in range(3)]
            pids = [held.add(pid) for tree in trees for pid in tree]
            others = [held.add(pid) for pid in bystanders]
            assert end_orphans([make_tree(leader) for leader, _ in trees], 0.2) == []
            assert [pid for pid in pids if not held.gone(pid)] == []
            assert [ended_by(leader) for leader, _ in trees] == [signal.SIGKILL] * 3
            assert all(held.runs(pid) for pid in others)

    @pytest.mark.parametrize("choice", ["ends", "spared"])
    def test_choice(self, choice: str) -> None:
        """Where leftovers are not ended, or spared by name, the runner and its group are all the same, by force."""
        leader, daemon, child = orphan(lambda: [*ignore_sigterm(), *fork_session(), *fork_child()])
        names = {read_dead_or_alive(daemon).name}
        tree = make_tree(
            leader, **({"ends_leftovers": False} if choice == "ends" else {"spared": frozenset(names)})
        )
        with contextlib.closing(Tree()) as held:
            held.add(child), held.add(daemon)
            assert end_orphans([tree], 0.2) == []
            assert ended_by(leader) == signal.SIGKILL
            # They have one name here.
            assert held.gone(child) if choice == "ends" else held.runs(child)
            assert held.runs(daemon)

    def test_deaf_runner_that_leads_no_group(self, mocker: MockerFixture) -> None:
        """Where leftovers are not ended, it is killed all the same."""
        [leader] = orphan(ignore_sigterm)
        mocker.patch.object(ProcessTree, "signal_group", autospec=True, return_value=False)
        assert end_orphans([make_tree(leader, ends_leftovers=False)], 0.2) == []
        assert ended_by(leader) == signal.SIGKILL

    def test_runner_that_does_not_end(self, mocker: MockerFixture) -> None:
        """Where leftovers are not ended, a runner that SIGKILL cannot end is returned."""
        [leader] = orphan(ignore_sigterm)
        mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=True)
        mocker.patch.object(orphans, "KILL_TIME", 0.1)
        assert [process.pid for process in end_orphans([make_tree(leader, ends_leftovers=False)], 0.1)] == [
            leader
        ]

    def test_group_of_a_runner_that_ends(self, mocker: MockerFixture) -> None:
        """Where leftovers are not ended, they are not killed because their supervisor has died, but asked to end."""

        def fork_deaf() -> list[int]:
            with contextlib.closing(Relay()) as ready:
                deaf = fork(in_turn(ignore_sigterm, lambda: ready.tell("ready"), pause_for_ever))
                ready.hear()
                return [deaf]

        leader, deaf = orphan(fork_deaf)
        send = mocker.patch.object(
            process_tree, "send_signals", autospec=True, side_effect=processes.send_signals
        )
        assert end_orphans([make_tree(leader, ends_leftovers=False)], PATIENCE) == []
        assert ended_by(leader) == signal.SIGTERM
        sent = {(call.args[0].pid, *call.args[1]) for call in send.mock_calls}
        assert sent == {(leader, signal.SIGTERM), (deaf, signal.SIGTERM)}

    def test_survivor(self, mocker: MockerFixture) -> None:
        """What does not end is returned, a second after the grace at the latest."""
        leader, child = orphan(fork_session)
        send = processes.send_signals
        mocker.patch.object(
            process_tree,
            "send_signals",
            autospec=True,
            side_effect=lambda process, signals: process.pid == child or send(process, signals),
        )
        assert [process.pid for process in end_orphans([make_tree(leader)], 0.1)] == [child]

    def test_condemned(self) -> None:
        """What was about to be killed is, without a word, and who was spared is not."""

        def stop() -> list[int]:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            return [*fork_session(), *fork_session()]

        leader, condemned, spared = orphan(stop)
        for pid in (leader, condemned):
            condemn(pid)
            os.kill(pid, signal.SIGSTOP)
        with contextlib.closing(Tree()) as held:
            held.add(condemned), held.add(spared)
            # In the place of its name: it is the same program.
            tree = make_tree(leader)
            tree._known_as_spared[spared] = read_dead_or_alive(spared).start
            tree.spared = frozenset({"somebody"})
            assert kill_condemned([tree]) == []
            assert ended_by(leader) == signal.SIGKILL
            assert held.gone(condemned)
            assert held.runs(spared)
