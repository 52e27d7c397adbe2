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
import functools
import os
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    Relay,
    fork,
    hear_in_popen,
    kill_child,
    pause_for_ever,
)

from airflow.sdk.execution_time.teardown.marks import MARK_VARIABLE, mark_process, read_limits
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.spawn import spawn_leader

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_mock import MockerFixture

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


pytestmark = pytest.mark.usefixtures("list_left")


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

    def test_strangers_are_not_marked(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """What another thread starts meanwhile does not belong to it, and nor does whoever spawns."""
        popen = subprocess.Popen
        strangers: list[int] = []

        def start_stranger() -> None:
            strangers.append(popen(["sleep", "600"]).pid)

        class BesideOthersPopen(subprocess.Popen[bytes]):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                start_stranger()
                super().__init__(*args, **kwargs)
                start_stranger()

        before = resource.getrlimit(resource.RLIMIT_RTTIME)
        monkeypatch.setattr(subprocess, "Popen", BesideOthersPopen)
        tree = ProcessTree()
        leader = spawn(tree, relay)
        daemon = relay.hear()
        assert [read_limits(stranger) for stranger in strangers] == [(), ()]
        assert resource.getrlimit(resource.RLIMIT_RTTIME) == before
        assert find_orphans(tree, leader) == [daemon]

    def test_program_is_told_what_it_would_be(self, relay: Relay) -> None:
        """It gets its arguments, environment, directory and signals as from Popen alone."""
        program = (
            "printf '%s\\n' \"$0 $* $GIVEN $PWD\"; env | cut -d= -f1 | sort | tr '\\n' ' '; kill -PIPE $$"
        )
        command = ["a shell", "-c", program, "its name", "one", "two"]
        env = {"GIVEN": "given", "PATH": os.environ["PATH"]}
        told = [
            start(command, executable="/bin/sh", env=env, cwd="/", stdout=subprocess.PIPE)
            for start in (subprocess.Popen, functools.partial(spawn_leader, tree=ProcessTree()))
        ]
        outputs = [process.communicate()[0] for process in told]
        assert outputs[0] == outputs[1]
        assert b"its name one two given /" in outputs[0]
        assert [process.returncode for process in told] == [-signal.SIGPIPE] * 2

    def test_errors(self, tmp_path: Path) -> None:
        """A program that is not there, or may not be run, is told as by Popen."""
        (tmp_path / "data").touch()
        with pytest.raises(FileNotFoundError):
            spawn_leader([str(tmp_path / "missing")], tree=ProcessTree(), env={})
        with pytest.raises(PermissionError):
            spawn_leader([str(tmp_path / "data")], tree=ProcessTree(), env={})

    def test_inner_tree(self, relay: Relay) -> None:
        """Where the supervisor is in a tree itself, that has the runtime in it, and nothing else changes."""

        def spawn_in_tree() -> None:
            os.setsid()
            mark_process()
            told.tell([spawn(ProcessTree(), relay).pid, relay.hear()])
            pause_for_ever()

        with contextlib.closing(Relay()) as told:
            outer = fork(spawn_in_tree)
            tree = ProcessTree()
            tree.set_leader(outer)
            started = told.hear()
            kill_child(outer)
            assert sorted(process.pid for process in tree.find()) == sorted(started)

    @pytest.mark.parametrize("allowed", [False, True])
    def test_hard_limit(self, relay: Relay, *, allowed: bool) -> None:
        """Where the hard limit is below the mark, a variable marks it; elsewhere the program gets to see none."""

        def spawn_and_look() -> None:
            if not allowed:
                resource.setrlimit(resource.RLIMIT_RTTIME, (10**6, 10**6))
            tree = ProcessTree()
            leader = spawn(tree, relay)
            daemon = relay.hear()
            env = psutil.Process(daemon).environ()
            told.tell(
                [find_orphans(tree, leader) == [daemon], MARK_VARIABLE in env, MARK_VARIABLE in os.environ]
            )

        with contextlib.closing(Relay()) as told:
            fork(spawn_and_look)
            assert told.hear() == [True, not allowed, False]

    @pytest.mark.parametrize("error", [PermissionError, AttributeError])
    def test_without_the_limit(self, relay: Relay, mocker: MockerFixture, error: type[Exception]) -> None:
        """Where a sandbox refuses the limit, or there is none, a variable marks it, and the child runs none of our code."""
        for call in ("setrlimit", "prlimit"):
            mocker.patch.object(resource, call, autospec=True, side_effect=error)
        popen = mocker.patch.object(subprocess, "Popen", wraps=subprocess.Popen)
        tree = ProcessTree()
        leader = spawn(tree, relay)
        assert popen.call_args.kwargs["preexec_fn"] is None
        daemon = relay.hear()
        assert MARK_VARIABLE not in os.environ
        assert find_orphans(tree, leader) == [daemon]
