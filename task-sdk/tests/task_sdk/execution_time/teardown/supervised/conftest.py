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

import signal
from typing import TYPE_CHECKING, Any

import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    GRACE_WITH_FAULTS,
    PATIENCE,
    Relay,
    Tree,
    leave_others_alone,
    set_grace,
    set_of_teardown,
    set_stop_policy,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_mock import MockerFixture


@pytest.fixture
def runner() -> Iterator[Relay]:
    """Return what a runner tells its supervisor over, or the supervisor its runner."""
    runner = Relay()
    yield runner
    runner.close()


@pytest.fixture
def stop_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have signals stop the task, which is not every release's default."""
    set_stop_policy(monkeypatch, "stop")


@pytest.fixture
def tree() -> Iterator[Tree]:
    tree = Tree()
    yield tree
    tree.close()


@pytest.fixture(autouse=True)
def leave_nothing(list_left: Callable[[], list[int]]) -> None:
    """Leave nothing behind, whatever a test has started."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Turn a wait without an end, which is what some of these tests are about, into a failure."""

    def fail(signum: int, frame: Any) -> None:
        pytest.fail(f"not done after {PATIENCE} s")

    # Not for longer: while pytest describes a failure an exception is the end of it.
    former = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture(autouse=True)
def quick_supervisor(monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture) -> None:
    mocker.patch.object(ActivitySubprocess, "_upload_logs", autospec=True)
    monkeypatch.setattr(supervisor, "SOCKET_CLEANUP_TIMEOUT", 0.1)
    monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", 0.1)
    set_of_teardown(monkeypatch, "stop_request", "HEARTBEAT_INTERVAL", 0.1)


@pytest.fixture(autouse=True)
def harmless_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_others_alone(monkeypatch)


@pytest.fixture(autouse=True)
def patient_teardown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let killed processes take as long to die as a busy machine takes; otherwise they are named as survivors."""
    set_of_teardown(monkeypatch, "leftovers", "KILL_TIME", PATIENCE / 3)


@pytest.fixture
def faulty_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give supervisors with a fault a short grace, and a PATH without sudo, which would end what is to stay."""
    set_grace(monkeypatch, GRACE_WITH_FAULTS)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are deaf to SIGTERM be killed soon."""
    set_grace(monkeypatch, 0.3)
