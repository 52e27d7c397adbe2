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
"""The end of a task is noticed at once, and without a traceback."""

from __future__ import annotations

import os
import selectors
import signal
from functools import partialmethod
from uuid import uuid4

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    HOLDERS,
    NEVER,
    Api,
    Log,
    Relay,
    keep_open,
    leave_holder,
    make_zombie,
    pause_for_ever,
    set_grace,
    start_task,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess, WatchedSubprocess


class TestExit:
    def test_exit_after_the_sockets_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The exit itself wakes the supervisor; no socket does when all of them had closed before."""
        monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", NEVER)
        monkeypatch.setattr(supervisor, "HEARTBEAT_TIMEOUT", NEVER)
        reader, writer = os.pipe()

        def target() -> None:
            keep_open(reader)
            os.read(reader, 1)
            os._exit(3)

        process = start_task(target)
        while len(process._open_sockets):
            process._service_subprocess(max_wait_time=0.05)
        os.write(writer, b".")
        os.close(reader)
        os.close(writer)
        assert process.wait() == 3

    @pytest.mark.parametrize("held", HOLDERS)
    def test_kill_while_a_socket_is_held(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, held: str
    ) -> None:
        """A killed task ends with its grace period, although somebody out of reach holds one of its sockets."""
        monkeypatch.setattr(supervisor, "SOCKET_CLEANUP_TIMEOUT", NEVER)
        set_grace(monkeypatch, 0.2)
        # In an unfixed supervisor it is a default argument.
        kill = partialmethod(ActivitySubprocess.kill, escalation_delay=0.2)
        monkeypatch.setattr(ActivitySubprocess, "kill", kill)
        api = Api()
        process = start_task(lambda: leave_holder(relay, held), api)
        relay.hear()
        api.terminate = True
        # On a busy machine the grace may be over before the runner gets to die of the first.
        assert process.wait() in (-signal.SIGTERM, -signal.SIGKILL)


class TestSockets:
    @pytest.mark.parametrize("held", HOLDERS)
    def test_overdue_sockets_are_closed(self, relay: Relay, held: str) -> None:
        """A socket that somebody holds longer than [workers] socket_cleanup_timeout is closed without a crash."""
        process = start_task(lambda: leave_holder(relay, held))
        relay.hear()
        os.kill(process.pid, signal.SIGKILL)
        with structlog.testing.capture_logs() as logs:
            assert process.wait() == -signal.SIGKILL
        assert not process._open_sockets
        [closed] = [entry["sockets"] for entry in logs if entry["event"] == "Force-closed stuck sockets"]
        assert {"stdin": "requests"}.get(held, held) in [name.partition("(")[0] for name in closed]

    def test_last_lines_arrive(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the task wrote before it died is in its log, also when its sockets have to be closed."""
        monkeypatch.setattr(supervisor, "SOCKET_CLEANUP_TIMEOUT", 0)
        lines = [f"line {number:4} {'.' * 40}" for number in range(1000)]

        def target() -> None:
            # The last line is unfinished, as that of a task that dies in the middle of a traceback.
            os.write(1, "\n".join(lines).encode())
            leave_holder(relay, "stdout")

        log = Log()
        process = start_task(target, logger=log.logger)
        relay.hear()
        make_zombie(process.pid)
        process.wait()
        assert log.find("line") == lines

    def test_shared_selector_survives(self, relay: Relay) -> None:
        """Closing the sockets of one child leaves the selector to the others that share it, as a Dag processor's do."""

        def target() -> None:
            relay.tell(os.getpid())
            pause_for_ever()

        with selectors.DefaultSelector() as shared:
            first, second = (
                WatchedSubprocess.start(id=uuid4(), target=target, logger=Log().logger, selector=shared)
                for _ in "ab"
            )
            relay.hear(), relay.hear()
            first._cleanup_open_sockets()
            assert {key.fileobj for key in shared.get_map().values()} == set(second._open_sockets)
            assert second._service_subprocess(max_wait_time=0) is None

    def test_closed_selector_is_not_selected_on(self) -> None:
        """A supervisor whose selector was closed under it collects the exit all the same."""
        process = start_task(pause_for_ever)
        process.selector.close()
        assert process._service_subprocess(max_wait_time=0) is None
        process.kill(signal.SIGKILL)
        assert process._exit_code == -signal.SIGKILL
