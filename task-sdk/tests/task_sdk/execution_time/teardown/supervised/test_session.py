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
"""A task runs in a session of its own, and its process group ends with it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    SLEEPER,
    Api,
    Log,
    Relay,
    Tree,
    ending,
    forked,
    pause_for_ever,
    start_task,
)

from airflow.sdk.execution_time.supervisor import WatchedSubprocess

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


class TestGroup:
    def test_task_leads_a_session(self, relay: Relay) -> None:
        """A task runner is the leader of a session and a process group of its own, which no terminal stops."""

        def target() -> None:
            relay.tell([os.getpid(), os.getsid(0), os.getpgid(0)])
            pause_for_ever()

        with ending(start_task(target)) as process:
            assert relay.hear() == [process.pid] * 3

    def test_kill_takes_the_group_along(self, relay: Relay, tree: Tree) -> None:
        """What the task has started, and left in its group, ends with it: apache/airflow issue 65505."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            pause_for_ever()

        with ending(start_task(target)) as process:
            child = tree.add(relay.hear())
            process.kill(signal.SIGTERM, escalation_delay=0.1, force=True)
            assert tree.gone(child)

    @pytest.mark.usefixtures("short_grace")  # in which the end of the runner is noticed, if not at once
    def test_heartbeat_conflict_takes_the_group_along(self, relay: Relay, tree: Tree) -> None:
        """A task that the server does not want any more ends with its children, as "server terminated"."""
        api = Api()

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            pause_for_ever()

        with ending(start_task(target, api)) as process:
            child = tree.add(relay.hear())
            api.terminate = True
            process.wait()
            assert tree.gone(child)
            assert process.final_state.upper() == "SERVER_TERMINATED"

    @pytest.mark.parametrize("setsid", ["refused", "pending"])
    def test_own_group_is_never_signalled(
        self, relay: Relay, tree: Tree, mocker: MockerFixture, setsid: str
    ) -> None:
        """A task without a session, or before it has one, is killed alone: its supervisor's group lives on."""
        asked = Relay()

        def refuse() -> None:
            asked.tell("setsid")
            if setsid == "pending":
                pause_for_ever()
            raise PermissionError

        def supervise() -> None:
            # In a group of its own, so that a mistake ends these processes and not the test runner.
            os.setpgid(0, 0)
            mocker.patch.object(os, "setsid", autospec=True, side_effect=refuse)
            relay.tell(subprocess.Popen(SLEEPER).pid)
            process = start_task(pause_for_ever)
            assert asked.hear() == "setsid"
            runner = os.pidfd_open(process.pid)
            process.kill(signal.SIGKILL, escalation_delay=0.1)
            relay.tell(["killed", bool(select.select([runner], [], [], PATIENCE)[0])])
            pause_for_ever()

        with forked(supervise):
            neighbour = tree.add(relay.hear())
            assert relay.hear() == ["killed", True]
            assert tree.runs(neighbour)
        asked.close()


class TestUnchanged:
    def test_other_types_stay_in_the_group(self, relay: Relay) -> None:
        """A subprocess type that does not opt in shares the session and the group of its supervisor."""

        def target() -> None:
            relay.tell([os.getsid(0), os.getpgid(0)])
            pause_for_ever()

        with ending(WatchedSubprocess.start(id=uuid4(), target=target, logger=Log().logger)):
            assert relay.hear() == [os.getsid(0), os.getpgid(0)]

    def test_other_types_are_killed_alone(self, relay: Relay, tree: Tree) -> None:
        """kill() signals the PID alone for a subprocess type that does not opt in."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            pause_for_ever()

        with ending(WatchedSubprocess.start(id=uuid4(), target=target, logger=Log().logger)) as process:
            child = tree.add(relay.hear())
            runner = tree.add(process.pid)
            process.kill(signal.SIGKILL, escalation_delay=0.1)
            assert tree.gone(runner)
            assert tree.runs(child)
