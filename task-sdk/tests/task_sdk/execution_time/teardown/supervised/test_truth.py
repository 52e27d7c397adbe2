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
"""What a supervisor says of a task that was told to stop, or killed, is true."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    Api,
    Log,
    Relay,
    SteppingApi,
    be_deaf,
    be_polite,
    conflict,
    detach,
    forked,
    name_failure,
    pause_for_ever,
    start_task,
    stop_supervisor,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.teardown import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("stop_policy")


class TestTruth:
    @pytest.mark.parametrize("should_retry", [False, True])
    def test_silent_exit_is_a_failure(self, relay: Relay, runner: Relay, *, should_retry: bool) -> None:
        """A runner that was told to stop, and exits with 0 without a word, has not succeeded; the server is told so."""

        def target() -> None:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            runner.tell("ready")
            pause_for_ever()

        def supervise() -> None:
            api = SteppingApi(stop_supervisor, should_retry=should_retry)
            process = start_task(target, api)
            assert runner.hear() == "ready"
            process.wait()
            relay.tell(["told", *api.told])

        with forked(supervise):
            assert relay.hear() == ["told", name_failure(should_retry=should_retry)]

    def test_ended_by_a_user_just_before(self) -> None:
        """A failure that the server refuses, since a user has ended the task, is no failure of the supervisor."""

        class EndedApi(Api):
            def tell(self, state: Any) -> None:
                raise conflict()

        log = Log()
        process = start_task(lambda: os._exit(3), EndedApi(), logger=log.logger)
        assert process.wait() == 3
        assert log.find("refused the state") == [
            "The API server refused the state of the task: it had already ended the task"
        ]

    def test_told_state_stands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A success that was told stays one, also if its process has to be killed for overtime."""
        monkeypatch.setattr(supervisor, "TASK_OVERTIME_THRESHOLD", 0)
        process = start_task(pause_for_ever)
        process._terminal_state, process._task_end_time_monotonic = "success", 1.0
        process.wait()
        assert process.final_state == "success"

    def test_overtime_spares_leftovers(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """Even a process that is deaf, and has to be killed after it has told a success, keeps what it has left."""

        def target() -> None:
            detach(lambda: be_polite(relay))
            be_deaf(relay)
            pause_for_ever()

        monkeypatch.setattr(supervisor, "TASK_OVERTIME_THRESHOLD", 0)
        monkeypatch.setattr(leftovers, "limit_grace", lambda _grace: 0.1)
        process = start_task(target)
        pids = {relay.hear(), relay.hear()}
        process._terminal_state, process._task_end_time_monotonic = "success", 1.0
        assert process.wait() == -signal.SIGKILL
        assert pids == {process.pid, *list_left()}
