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

import enum
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import MadeUpTask, make_up_process

from airflow.sdk.execution_time.supervisor import WatchedSubprocess
from airflow.sdk.execution_time.teardown.exit_status import (
    find_reported_state,
    has_reported,
    settle_exit_code,
    signal_popen,
    wait_for_popen,
)


@pytest.fixture
def log() -> structlog.testing.CapturingLogger:
    return structlog.testing.CapturingLogger()


def task(log: structlog.testing.CapturingLogger, reported: Any) -> MadeUpTask:
    return MadeUpTask(pid=4711, process_log=log, _terminal_state=reported)


State = enum.Enum("State", {"UP_FOR_RETRY": "up_for_retry", "SERVER_TERMINATED": "server_terminated"})


class TestSettleExitCode:
    @pytest.mark.parametrize(
        ("reported", "code"), [(None, 1), ("success", 0), ("deferred", 0), ("SERVER_TERMINATED", 1)]
    )
    def test_unknown(self, log: structlog.testing.CapturingLogger, reported: str | None, code: int) -> None:
        """A reported state stands, and unknown is not success; one warning says so."""
        assert settle_exit_code(task(log, reported), None) == code
        [call] = log.calls
        assert call.method_name == "warning"
        assert call.kwargs == {"pid": 4711, "reported_state": reported if code == 0 else None}

    @pytest.mark.parametrize("code", [0, 1, -9])
    def test_known(self, log: structlog.testing.CapturingLogger, code: int) -> None:
        """A status that is known stands, and nothing is said."""
        assert settle_exit_code(task(log, None), code) == code
        assert not log.calls

    def test_other_types(self) -> None:
        """A type that reports no terminal state gets what psutil said."""
        assert settle_exit_code(WatchedSubprocess(**make_up_process()), None) is None


class TestReportedState:
    @pytest.mark.parametrize(
        ("reported", "state"),
        [
            (None, None),
            ("success", "success"),
            (State.UP_FOR_RETRY, "up_for_retry"),
            ("SERVER_TERMINATED", None),
            (State.SERVER_TERMINATED, None),
        ],
    )
    def test_task(self, log: structlog.testing.CapturingLogger, reported: Any, state: str | None) -> None:
        """What the task has told counts, as a string or a member; what the supervisor itself notes does not."""
        process = task(log, reported)
        assert find_reported_state(process) == state
        assert has_reported(process) is (state is not None)


class TestWaitForPopen:
    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    def test_status_is_there(self) -> None:
        """A status that nobody has taken is returned, as often as it is asked for."""
        popen = self.start()
        assert wait_for_popen(popen, None) == 3
        assert wait_for_popen(popen, None) == 3

    def test_status_was_taken(self) -> None:
        """Popen itself would say 0, which reads as success."""
        popen = self.start()
        os.waitpid(popen.pid, 0)
        signal_popen(popen, signal.SIGTERM)
        assert wait_for_popen(popen, None) is None
        assert popen.wait() == 0

    def test_signal(self) -> None:
        """A child that runs is signalled, and its status says by what it was ended."""
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as popen:
            signal_popen(popen, signal.SIGKILL)
            assert wait_for_popen(popen, None) == -signal.SIGKILL

    def test_without_waitid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a Python that has no waitid() a lost status stays what Popen makes of it."""
        monkeypatch.delattr(os, "waitid")
        popen = self.start()
        os.waitpid(popen.pid, 0)
        assert wait_for_popen(popen, None) == 0

    def test_timeout(self) -> None:
        """A child that does not end in time is waited for no longer, as by Popen."""
        waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with waiting, pytest.raises(subprocess.TimeoutExpired):
            wait_for_popen(waiting, 0)
