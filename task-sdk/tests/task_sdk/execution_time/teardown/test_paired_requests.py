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
import io
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from task_sdk.execution_time.teardown.test_interruption import Runner
from task_sdk.execution_time.teardown.test_task_requests import FAILED, Supervised

from airflow.sdk.execution_time.comms import GetVariable, PutVariable
from airflow.sdk.execution_time.task_runner import CommsDecoder
from airflow.sdk.execution_time.teardown import interruption
from airflow.sdk.execution_time.teardown.paired_requests import CommsLock, reads_answer, sends_request
from airflow.sdk.execution_time.teardown.task_requests import handle_request

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWERED = GetVariable(key="k")
UNANSWERED = PutVariable(key="k", value="v", description=None)


@pytest.fixture
def runner() -> Iterator[Runner]:
    with contextlib.closing(Runner()) as runner:
        yield runner


class Comms(SimpleNamespace):
    """A runner's, as before 1.0.3, that is told to stop while it sends or reads."""

    def __init__(self, runner: Runner, when: str) -> None:
        super().__init__(runner=runner, when=when)

    def do(self, what: str) -> None:
        if what == self.when:
            signal.raise_signal(signal.SIGTERM)
        self.runner.note(what)

    @sends_request
    def send_request(self, log: Any, msg: Any) -> None:
        self.do("send")

    @reads_answer
    def get_message(self) -> str:
        self.do("read")
        return "answer"


class TestPairs:
    @pytest.mark.parametrize("when", ["send", "read"])
    def test_request_and_answer(self, runner: Runner, when: str) -> None:
        """A task that is told to stop while it asks is interrupted when it has read the answer."""
        comms = Comms(runner, when)

        def execute() -> None:
            comms.send_request(None, ANSWERED)
            comms.get_message()
            runner.note("unreachable")

        assert runner.run(execute) == ["send", "read", "on_kill"]

    def test_between(self, runner: Runner) -> None:
        """Nor is it interrupted between the two."""
        comms = Comms(runner, "never")

        def execute() -> None:
            comms.send_request(None, ANSWERED)
            signal.raise_signal(signal.SIGTERM)
            comms.get_message()

        assert runner.run(execute) == ["send", "read", "on_kill"]

    def test_request_without_an_answer(self, runner: Runner) -> None:
        """One that nobody answers is over when it was sent."""
        comms = Comms(runner, "send")
        assert runner.run(lambda: (comms.send_request(None, UNANSWERED), runner.note("unreachable"))) == [
            "send",
            "on_kill",
        ]

    @pytest.mark.parametrize("msg", [ANSWERED, UNANSWERED])
    def test_request_that_cannot_be_sent(self, runner: Runner, msg: Any) -> None:
        """It is over, too."""

        @sends_request
        def send_request(comms: Any, log: Any, msg: Any) -> None:
            raise BrokenPipeError

        def execute() -> None:
            with pytest.raises(BrokenPipeError):
                send_request(None, None, msg)
            signal.raise_signal(signal.SIGTERM)
            runner.note("unreachable")

        assert runner.run(execute) == ["on_kill"]

    def test_answer_that_nobody_has_asked_for(self, runner: Runner) -> None:
        """What the supervisor sends at the start is none."""
        comms = Comms(runner, "never")

        def execute() -> None:
            comms.get_message()
            assert interruption._requests_in_flight == 0
            signal.raise_signal(signal.SIGTERM)

        assert runner.run(execute) == ["read", "on_kill"]


class TestReport:
    def test_nobody_waits_for_a_refusal(self) -> None:
        """A runner that reports reads no answer, which its next request would get."""
        process = Supervised()
        process._stop.server_ended = True
        handle_request(process, FAILED, structlog.get_logger())
        assert process.answers == process.handled == []


class TestComms:
    def test_real_comms(self, runner: Runner) -> None:
        """The runner's own are such: whatever comes while a request is sent, its answer is read."""

        class Requests(io.BytesIO):
            def write(self, request: Any) -> int:
                signal.raise_signal(signal.SIGTERM)
                return super().write(request)

        answers = io.StringIO('{"type": "VariableResult", "key": "k", "value": "v"}\n')

        def execute() -> None:
            comms = CommsDecoder(input=answers)
            comms.request_socket = Requests()
            with comms.lock:
                comms.send_request(structlog.get_logger(), ANSWERED)
                comms.get_message()
            runner.note("unreachable")

        runner.on_kill = lambda: runner.note(f"{answers.read()!r} is unread")
        assert runner.run(execute) == ["on_kill", "'' is unread"]


class TestCommsLock:
    def test_holder_is_not_interrupted(self, runner: Runner) -> None:
        """An ``on_kill`` that asks needs the lock, which is not reentrant."""
        lock = CommsLock()
        runner.on_kill = lambda: lock.__enter__() and lock.__exit__(None, None, None)

        def execute() -> None:
            with lock:
                signal.raise_signal(signal.SIGTERM)
                runner.note("held")
            runner.note("unreachable")

        assert runner.run(execute) == ["held", "on_kill"]

    def test_lock_that_is_not_acquired(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever does not get it can be interrupted again."""

        def fail(_lock: Any) -> None:
            raise TimeoutError

        monkeypatch.setattr(CommsLock.__mro__[1], "__enter__", fail)

        def execute() -> None:
            with pytest.raises(TimeoutError), CommsLock():
                pass
            signal.raise_signal(signal.SIGTERM)
            runner.note("unreachable")

        assert runner.run(execute) == ["on_kill"]
