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
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.comms import GetVariable, PutVariable, SetXCom, TaskState
from airflow.sdk.execution_time.teardown.answered_requests import answering_failures, expects_answer

FAILED = TaskState(state=TaskInstanceState.FAILED, end_date=datetime(2026, 1, 1, tzinfo=timezone.utc))

NUMBERS = [(), (7,)]
"""Of a request: none before 1.0.3, and what it is from then on."""


class Supervised(MadeUpTask):
    """A supervised task that takes note of the answers to its requests."""

    def __init__(self) -> None:
        super().__init__(_new_session=True)
        self.answers: list[tuple[Any, dict[str, int]]] = []

    def send_msg(self, msg: Any, *_: Any, **fields: Any) -> None:
        self.answers.append((fields.pop("error", None) or msg, fields))


def fail(process: Any, msg: Any, log: Any, *number: int, error: Exception) -> None:
    """Handle a request that fails after its state was noted."""
    with answering_failures(process, msg, log, *number):
        process._terminal_state = "noted"
        raise error


@pytest.fixture
def log() -> Any:
    return structlog.testing.CapturingLogger()


class TestAnsweringFailures:
    @pytest.mark.parametrize("number", NUMBERS)
    def test_handled_request(self, log: Any, number: tuple[int, ...]) -> None:
        """What the supervisor handles it answers itself."""
        process = Supervised()
        with answering_failures(process, FAILED, log, *number):
            process._terminal_state = "failed"
        assert process._terminal_state == "failed"
        assert process.answers == log.calls == []

    @pytest.mark.parametrize("number", NUMBERS)
    def test_failed_request(self, log: Any, number: tuple[int, ...]) -> None:
        """An API server that is away, say, is answered with an error, and does not end the supervisor."""
        process = Supervised()
        fail(process, GetVariable(key="k"), log, *number, error=OSError("no route to host"))
        [(answer, request_id)] = process.answers
        assert request_id == ({"request_id": 7} if number else {})
        assert answer.error == ErrorType.API_SERVER_ERROR
        assert answer.detail == {
            "status_code": None,
            "message": "no route to host",
            "exception_type": "OSError",
        }
        [call] = log.calls
        assert (call.method_name, call.kwargs) == ("exception", {"request": "GetVariable"})

    @pytest.mark.parametrize("error", [OSError("away"), conflict()])
    def test_state_that_could_not_be_told(self, log: Any, error: Exception) -> None:
        """It is forgotten, for it would be taken for told when the task has ended."""
        process = Supervised()
        try:
            fail(process, FAILED, log, 7, error=error)
        except ServerResponseError:
            assert error.args == conflict().args
        assert process._terminal_state is None

    @pytest.mark.parametrize("error", [BrokenPipeError(), ConnectionResetError()])
    def test_answer_that_nobody_takes(self, log: Any, error: Exception) -> None:
        """A runner that is gone when its request was handled has reported its state."""
        process = Supervised()
        fail(process, FAILED, log, 7, error=error)
        assert process._terminal_state == "noted"
        assert process.answers == log.calls == []

    def test_answer_of_the_server(self, log: Any) -> None:
        """An error that the server has answered is for the caller, who passes it on."""
        with pytest.raises(ServerResponseError):
            fail(Supervised(), GetVariable(key="k"), log, 7, error=conflict())

    @pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
    def test_task_that_is_gone(
        self, log: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
    ) -> None:
        """Nobody may be there to take the answer."""

        def send(*_: Any, **__: Any) -> None:
            raise error

        process = Supervised()
        monkeypatch.setattr(process, "send_msg", send)
        fail(process, GetVariable(key="k"), log, 7, error=OSError())
        assert len(log.calls) == 1

    def test_nobody_waits(self, log: Any) -> None:
        """Before 1.0.3 a runner that reports reads no answer, which its next request would get."""
        process = Supervised()
        fail(process, FAILED, log, error=OSError())
        assert process.answers == []

    def test_other_types(self, log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A type that leads no session of its own is served as ever."""
        process = Supervised()
        monkeypatch.setattr(process, "_new_session", False)
        with pytest.raises(OSError, match="away"):
            fail(process, FAILED, log, 7, error=OSError("away"))
        assert process.answers == log.calls == []


@pytest.mark.parametrize(
    ("msg", "expected"),
    [
        (GetVariable(key="k"), True),
        (comms.DeleteXCom.model_construct(), False),
        (comms.TriggerDagRun.model_construct(), True),
        (PutVariable(key="k", value="v", description=None), False),
        (SetXCom.model_construct(), False),
        (FAILED, False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else "",
)
def test_expects_answer(msg: Any, *, expected: bool) -> None:
    """Before 1.0.3 what gets something is answered, and little else."""
    assert expects_answer(msg) is expected
