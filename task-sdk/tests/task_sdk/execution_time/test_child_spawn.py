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
import os
import resource
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from task_sdk.execution_time.teardown.supervised_task import PATIENCE, Relay, ending_all, hear_in_popen

from airflow.sdk.execution_time.child_spawn import spawn_leader
from airflow.sdk.execution_time.child_tree import MARK_VARIABLE, ProcessTree

if TYPE_CHECKING:
    from collections.abc import Iterator

# Starts a daemon, which tells its PID, and stays.
PROGRAM = """
import os, signal, sys

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(int(sys.argv[1]), b"%d\\n" % os.getpid())
        signal.pause()
    os._exit(0)
os.wait()
signal.pause()
"""


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """End every process that a test has started, however it ends."""
    with ending_all():
        yield


@pytest.fixture
def relay() -> Iterator[Relay]:
    with contextlib.closing(Relay()) as relay:
        yield relay


def spawn(tree: ProcessTree, relay: Relay) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(relay.writer)]
    return spawn_leader(command, tree=tree, env=os.environ, pass_fds=[relay.writer])


def find_orphans(tree: ProcessTree, leader: subprocess.Popen[bytes]) -> list[int]:
    """Kill the leader alone, and return the PIDs of what is left of its tree."""
    leader.kill()
    leader.wait()
    return [process.pid for process in tree.find()]


class TestSpawnLeader:
    def test_leads_session(self, relay: Relay) -> None:
        """It leads a session, and does not wait for anybody to begin."""
        leader = spawn(ProcessTree(), relay)
        relay.hear()
        assert os.getsid(leader.pid) == leader.pid

    def test_quick_daemon_is_found(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it starts belongs to it, also before it is known to anybody."""
        daemons = hear_in_popen(relay, monkeypatch)
        tree = ProcessTree()
        leader = spawn(tree, relay)
        assert len(daemons) == 1
        assert find_orphans(tree, leader) == daemons

    def test_threads_spawn_in_turn(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of two at once, the second would inherit the mark of the first, and restore it when the first is through."""
        before = resource.getrlimit(resource.RLIMIT_RTTIME)
        ready = threading.Barrier(2, timeout=PATIENCE)
        entered: list[bool] = []

        class MeetingPopen(subprocess.Popen[bytes]):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                entered.append(True)
                if len(entered) == 1:
                    ready.wait()
                    other.join(0.2)  # It gets no further, of which there is no event.
                    assert len(entered) == 1

        def spawn_other() -> None:
            ready.wait()
            spawn(ProcessTree(), relay)

        monkeypatch.setattr(subprocess, "Popen", MeetingPopen)
        other = threading.Thread(target=spawn_other)
        other.start()
        try:
            spawn(ProcessTree(), relay)
        finally:
            other.join()
        assert len(entered) == 2
        assert resource.getrlimit(resource.RLIMIT_RTTIME) == before

    def test_own_limit_is_restored(self, relay: Relay) -> None:
        """Whoever spawns belongs to the tree no longer than it takes, also when there is no such program."""
        before = resource.getrlimit(resource.RLIMIT_RTTIME)
        spawn(ProcessTree(), relay)
        assert resource.getrlimit(resource.RLIMIT_RTTIME) == before
        with pytest.raises(FileNotFoundError):
            spawn_leader(["/missing"], tree=ProcessTree(), env={})
        assert resource.getrlimit(resource.RLIMIT_RTTIME) == before

    @pytest.mark.parametrize("error", [PermissionError, ValueError])
    def test_without_the_limit(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
    ) -> None:
        """Where a sandbox refuses the limit, or the hard one is below the mark, a variable marks it."""
        look = resource.prlimit

        def refuse(*_: Any) -> None:
            raise error

        def refuse_to_set(*args: Any) -> Any:
            return look(*args) if len(args) < 3 else refuse()

        monkeypatch.setattr(resource, "setrlimit", refuse)
        monkeypatch.setattr(resource, "prlimit", refuse_to_set)
        tree = ProcessTree()
        leader = spawn(tree, relay)
        daemon = relay.hear()
        assert MARK_VARIABLE not in os.environ
        assert find_orphans(tree, leader) == [daemon]
