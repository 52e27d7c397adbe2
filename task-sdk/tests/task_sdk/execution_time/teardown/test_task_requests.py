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

from datetime import datetime, timezone
from typing import Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import MadeUpTask, conflict

from airflow.sdk.api.client import ServerResponseError
from airflow.sdk.api.datamodels._generated import TaskInstanceState
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time import comms, supervisor
from airflow.sdk.execution_time.comms import GetVariable, RetryTask, SucceedTask, TaskState
from airflow.sdk.execution_time.teardown.exit_event import ExitWatch
from airflow.sdk.execution_time.teardown.task_requests import (
    STATE_REPORTS,
    deny_silent_success,
    handle_request,
    tell_state,
)

SOME_DAY = datetime(2026, 1, 1, tzinfo=timezone.utc)
FAILED = TaskState(state=TaskInstanceState.FAILED, end_date=SOME_DAY)


class Supervised(MadeUpTask):
    """A supervised task whose requests are handled, or fail, as ``handle`` does."""

    def __init__(self, handle: Any = lambda: None) -> None:
        super().__init__(_new_session=True)
        self._handle = handle
        self.handled: list[Any] = []
        self.answers: list[Any] = []

    def _handle_request(self, msg: Any, _log: Any, *request_id: int) -> None:
        self.handled.append((msg, request_id))
        if isinstance(msg, TaskState):
            self._terminal_state = msg.state
        self._handle()

    def send_msg(self, msg: Any, *_: Any, **fields: Any) -> None:
        self.answers.append((fields.pop("error", None) or msg, fields))


def fail(error: Exception) -> Any:
    def raise_error() -> None:
        raise error

    return raise_error


@pytest.fixture
def log() -> Any:
    return structlog.testing.CapturingLogger()


class TestHandleRequest:
    def test_request(self, log: Any) -> None:
        """The supervisor handles it, and answers it itself."""
        process = Supervised()
        handle_request(process, FAILED, log, 7)
        assert process.handled == [(FAILED, (7,))]
        assert process.answers == log.calls == []

    def test_caller_that_answers_failures(self, log: Any) -> None:
        """A failure is the caller's to answer."""
        with pytest.raises(OSError, match="away"):
            handle_request(Supervised(fail(OSError("away"))), GetVariable(key="k"), log, 7)

    def test_other_types(self, log: Any) -> None:
        """A type that leads no session of its own is served as ever."""
        process = Supervised()
        process._new_session = False
        process._stop.server_ended = True
        handle_request(process, FAILED, log, 7)
        assert process.handled


class TestEndedByServer:
    @pytest.fixture
    def process(self) -> Supervised:
        process = Supervised()
        process._stop.server_ended = True
        return process

    @pytest.mark.parametrize("report", [name for name in STATE_REPORTS if hasattr(comms, name)])
    def test_state_is_refused(self, log: Any, process: Supervised, report: str) -> None:
        """The task gets what the API server would answer, and its state is not told, or noted."""
        msg = getattr(comms, report).model_construct()
        handle_request(process, msg, log, 7)
        [(answer, request_id)] = process.answers
        assert answer.error == ErrorType.API_SERVER_ERROR
        assert answer.detail["status_code"] == 409
        assert request_id == {"request_id": 7}
        assert process.handled == []

    def test_heartbeat_that_was_refused(self, log: Any) -> None:
        """The server has answered to a heartbeat of a thread, which the loop has not come to yet."""
        process = Supervised()
        process._stop.refusal = conflict()
        handle_request(process, FAILED, log, 7)
        assert process.handled == []
        assert len(process.answers) == 1
        assert process._terminal_state == supervisor.SERVER_TERMINATED

    def test_other_requests(self, log: Any, process: Supervised) -> None:
        """An ``on_kill`` may ask for the connection of what it removes."""
        handle_request(process, GetVariable(key="k"), log, 7)
        assert len(process.handled) == 1


class TestDenySilentSuccess:
    @pytest.fixture
    def stopped(self) -> MadeUpTask:
        task = MadeUpTask()
        task._exit_watch.expect_exit(1)
        return task

    def test_stopped_task(self, stopped: Any) -> None:
        """A runner that was told to stop, and exits with 0 without a word, has not succeeded."""
        assert deny_silent_success(stopped, 0) == 1

    @pytest.mark.parametrize("state", ["success", "skipped", "SERVER_TERMINATED"])
    def test_told_state(self, stopped: Any, state: str) -> None:
        """A state that was told, or that the server has chosen, is not silence."""
        stopped._terminal_state = state
        assert deny_silent_success(stopped, 0) == 0

    @pytest.mark.parametrize(("message", "code"), [(SucceedTask, 0), (RetryTask, 1)])
    def test_untold_state(self, stopped: Any, message: type, code: int) -> None:
        """A success that the server could not be told yet is none either; a failure is no success."""
        stopped._pending_terminal_state_msg = message(end_date=SOME_DAY)  # which not every release has
        assert deny_silent_success(stopped, 0) == code

    @pytest.mark.parametrize("code", [1, -9])
    def test_other_codes(self, stopped: Any, code: int) -> None:
        """What is no success anyhow stays as it is."""
        assert deny_silent_success(stopped, code) == code

    def test_task_that_nobody_stopped(self, stopped: Any) -> None:
        """A runner that exits with 0 by itself has succeeded."""
        stopped._exit_watch = ExitWatch()
        assert deny_silent_success(stopped, 0) == 0


class Ended(MadeUpTask):
    """A task that has ended in a state of our choice, and counts how often that is told in upstream's own way."""

    final_state: Any = None

    def __init__(self, final_state: str, told: str | None = None, **attributes: Any) -> None:
        super().__init__(
            final_state=final_state, _rendered_map_index="a map index", _terminal_state=told, **attributes
        )
        self.updates = 0

    def update_task_state_if_needed(self) -> None:
        self.updates += 1

    @property
    def retries(self) -> list[dict[str, Any]]:
        """What the server was told of retries."""
        return [call.kwargs for call in self.client.task_instances.retry.call_args_list]


class TestTellState:
    def test_inferred_retry(self) -> None:
        """The server learns at once, not by the heartbeat timeout, that a task whose runner was killed can be retried."""
        process = Ended("up_for_retry")
        tell_state(process)
        [retry] = process.retries
        assert retry.pop("end_date").tzinfo is not None
        assert retry == {"id": process.id, "rendered_map_index": "a map index"}
        assert process.updates == 1

    @pytest.mark.parametrize(
        ("state", "told"),
        [
            ("up_for_retry", "up_for_retry"),
            ("failed", None),
            ("success", "success"),
            ("server_terminated", "SERVER_TERMINATED"),
        ],
    )
    def test_told_state(self, state: str, told: str | None) -> None:
        """What the task has told itself, or upstream tells, is not told again."""
        process = Ended(state, told)
        tell_state(process)
        assert (process.retries, process.updates) == ([], 1)

    def test_state_that_upstream_tells_again(self) -> None:
        """A retry that could not be told at first is upstream's to repeat."""
        process: Any = Ended("up_for_retry")
        process._pending_terminal_state_msg = RetryTask(end_date=SOME_DAY)  # which not every release has
        tell_state(process)
        assert process.retries == []

    @pytest.mark.parametrize("status", [404, 409, 410])
    def test_ended_meanwhile(self, log: Any, status: int) -> None:
        """The server refuses the state of a task that a user has ended just before; the task's log tells it."""
        process = Ended("up_for_retry", process_log=log, update_task_state_if_needed=fail(conflict(status)))
        tell_state(process)
        [call] = log.calls
        assert call.method_name == "warning"
        assert call.kwargs == {
            "refused": "up_for_retry",
            "status": status,
            "reason": "not_running",
            "state": "failed",
        }
        assert process.retries == []

    def test_other_answers(self) -> None:
        """Any other answer stays a failure of the supervisor."""
        process = Ended("failed", update_task_state_if_needed=fail(conflict(403)))
        with pytest.raises(ServerResponseError):
            tell_state(process)
