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

import errno
import os
import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from task_sdk.execution_time.teardown.supervised.faults import lack, misbehave, run_in_fork, run_in_namespace
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    kill_child,
    lift_limit,
    limit_realtime,
    make_zombie,
    set_name,
)
from task_sdk.execution_time.teardown.trees import (
    find,
    fork_child,
    fork_waiting,
    fork_when_adopted,
    make_origin,
    read,
    read_set_origin,
    start_child,
    start_waiting,
)

from airflow.sdk.execution_time.teardown import marks, processes
from airflow.sdk.execution_time.teardown.marks import (
    MARK_VARIABLE,
    compute_mark,
    compute_origin,
    is_condemned,
    is_origin_alive,
    mark_process,
    read_limits,
    read_origin,
)
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_mock import MockerFixture


pytestmark = pytest.mark.usefixtures("list_left")


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
        processes._read_once.cache_clear()
        read_file = mocker.spy(processes, "_read_file")
        for _ in range(2):
            fork_when_adopted(os.getpid)
        own = mocker.call(f"{processes.PROC}/{os.getpid()}/stat")
        assert read_file.call_args_list.count(own) == 1

    def test_supervisor_in_a_namespace_within(self) -> None:
        """A supervisor is not taken for the process whose number it has in a PID namespace of its own."""

        def main() -> dict[str, Any]:
            pid = fork_waiting(os.setsid)
            ProcessTree().set_leader(pid)
            return {"own": os.getpid(), "alive": is_origin_alive(read_set_origin(pid))}

        processes._read_once(1)
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
        marks.condemn(pid)
        assert resource.prlimit(pid, resource.RLIMIT_RSS)[0] == 1 << 30
        assert read_origin(pid) is None

    def test_lifted(self) -> None:
        """Who lifts all marks, as a watchdog does, carries none, and is no part of the tree."""
        tree, leader, daemon = fork_when_adopted(marks.lift_marks)
        kill_child(leader)
        assert (read_limits(daemon), read_origin(daemon), find(tree)) == ((), None, [])


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
