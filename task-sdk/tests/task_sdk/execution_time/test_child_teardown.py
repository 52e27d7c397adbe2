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
import signal
import time
from configparser import ConfigParser
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised_task import (
    Relay,
    Tree,
    ending_all,
    fork,
    pause_for_ever,
    waiting,
)

from airflow.sdk.execution_time import child_teardown
from airflow.sdk.execution_time.child_exit import ExitWatch
from airflow.sdk.execution_time.child_policy import GRACE, MAX_GRACE, MIN_GRACE, StopPolicy
from airflow.sdk.execution_time.child_stop import StopRequest, catch_stop_signals
from airflow.sdk.execution_time.child_teardown import (
    HEARTBEAT_INTERVAL,
    MAX_GRACE_UNASKED,
    RETRY_TOLD_GRACE,
    end_leftovers,
    end_on_exception,
    end_unless_started,
    handle_request_of_tree,
    prepare_kill,
    signal_tree,
)
from airflow.sdk.execution_time.child_tree import Process, ProcessTree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_mock import MockerFixture

STUBBORN = Process(pid=2**22 + 1, start=1, name="stubborn", parent=1, session=1, stopped=False, dead=False)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("", "_CMD", "_SECRET"):
        monkeypatch.delenv(f"AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME{suffix}", raising=False)


class Conf(ConfigParser):
    """Airflow's, as far as this goes: what is set in the file, and a grace that nobody has set."""

    def get(self, section: str, option: str, **kwargs: Any) -> Any:
        if self.has_option(section, option):
            return super().get(section, option, **kwargs)
        return kwargs.get("fallback", "60")


@pytest.fixture
def conf() -> Conf:
    return Conf()


@pytest.fixture
def process(mocker: MockerFixture) -> Any:
    """Return a task whose tree has one member that nothing ends; real processes cannot be that."""
    tree = mocker.create_autospec(ProcessTree, instance=True, sudo_failures={}, look_failure=None)
    tree.configure_mock(ended={}, spared=frozenset(), ends=True)
    tree.find.return_value = tree.kill_all.return_value = [STUBBORN]
    mocker.patch.object(child_teardown, "is_alive", autospec=True, return_value=True)
    mocker.patch.object(child_teardown, "is_unreaped_child", autospec=True, return_value=True)
    return SimpleNamespace(
        pid=4711,
        id="the task instance's",
        client=SimpleNamespace(task_instances=mocker.Mock(spec_set=["heartbeat"])),
        failed_heartbeats=0,
        final_state="failed",
        selector=mocker.MagicMock(),
        process_log=structlog.testing.CapturingLogger(),
        _exit_code=None,
        _exit_watch=ExitWatch(),
        _last_heartbeat_attempt=0,
        _new_session=True,
        _stop=StopRequest(),
        _stop_policy=StopPolicy.STOP,
        _service_subprocess=lambda max_wait_time: None,
        _terminal_state=None,
        _tree=tree,
    )


class TestGrace:
    @pytest.mark.parametrize("option", [None, "17", "60"])
    def test_kill_by_others_than_the_server(self, conf: Conf, process: Any, option: str | None) -> None:
        """A caller of kill() gets the grace that it names: 5 s after failed heartbeats, whatever the option says."""
        if option:
            conf.read_dict({"core": {"killed_task_cleanup_time": option}})
        assert prepare_kill(process, GRACE, conf) == GRACE
        assert process._exit_watch.grace_ends(default=NEVER) <= time.monotonic() + GRACE

    @pytest.mark.parametrize(("option", "grace"), [(None, 5), ("17", 17), ("60", 60), ("soon", 5)])
    def test_kill_because_the_server_has_ended_the_task(
        self, conf: Conf, process: Any, option: str | None, grace: float
    ) -> None:
        """What the deployment has set counts."""
        if option:
            conf.read_dict({"core": {"killed_task_cleanup_time": option}})
        process._stop.server_ended = True
        assert prepare_kill(process, GRACE, conf) == grace

    @pytest.mark.parametrize(("grace", "limited"), [(0, MIN_GRACE), (float("inf"), MAX_GRACE)])
    def test_limits(self, conf: Conf, process: Any, grace: float, limited: float) -> None:
        """kill() collects nobody without a grace, and cannot wait for ever."""
        assert prepare_kill(process, grace, conf) == limited

    def test_other_types(self, conf: Conf, process: Any) -> None:
        """Without a session of its own a process is killed as ever."""
        conf.read_dict({"core": {"killed_task_cleanup_time": "17"}})
        process._new_session = False
        process._stop.server_ended = True
        assert prepare_kill(process, 0, conf) == 0
        process._tree.remember.assert_not_called()


class TestSurvivors:
    @pytest.fixture(autouse=True)
    def clock(self, process: Any, mocker: MockerFixture) -> None:
        """Have time pass only while somebody waits: as long as that says, however busy the machine is."""

        def wait(max_wait_time: float) -> None:
            clock.return_value += max_wait_time

        clock = mocker.patch.object(child_teardown.time, "monotonic", autospec=True, return_value=100.0)
        mocker.patch.object(child_teardown.time, "sleep", autospec=True, side_effect=wait)
        process._service_subprocess = wait

    @pytest.mark.parametrize(
        ("refused", "reason"), [(4711, "after SIGKILL"), (4712, "a password is required")]
    )
    def test_survivor_is_named(
        self, conf: Conf, process: Any, mocker: MockerFixture, refused: int, reason: str
    ) -> None:
        """What cannot be ended is named once, with its own reason, and the supervisor goes on."""
        owners = mocker.patch.object(child_teardown, "group_by_owner", autospec=True)
        owners.return_value = {4712: [STUBBORN]}
        process._tree.sudo_failures = {refused: "a password is required"}
        assert end_leftovers(process, -9, conf) == -9
        [call] = process.process_log.calls
        assert call.method_name == "error"
        assert call.kwargs["processes"] == [{"pid": STUBBORN.pid, "name": "stubborn"}]
        assert reason in call.kwargs["reason"]

    def test_survivor_that_cannot_be_looked_for(self, conf: Conf, process: Any) -> None:
        """Nobody is said to have ended whom a look that fails has merely not found."""

        def fail(*_: Any, **__: Any) -> list[Process]:
            process._tree.look_failure = "Too many open files"
            return []

        process._tree.kill_all.side_effect = fail
        end_leftovers(process, -9, conf)
        assert [call.method_name for call in process.process_log.calls] == ["error", "error"]

    def test_survivor_that_came_late(self, conf: Conf, process: Any) -> None:
        """What a process has started between the last look and its own end is killed, and named if it stays."""
        late = replace(STUBBORN, pid=STUBBORN.pid + 1)
        process._tree.find.return_value = [STUBBORN, late]
        end_leftovers(process, -9, conf)
        process._tree.signal.assert_called_with([late], signal.SIGKILL)
        [call] = process.process_log.calls
        assert [named["pid"] for named in call.kwargs["processes"]] == [STUBBORN.pid, late.pid]

    def test_message_that_cannot_be_handled(self, conf: Conf, process: Any) -> None:
        """What goes wrong with a request of the task does not end the teardown."""
        process._service_subprocess = Mock(side_effect=RuntimeError)
        assert end_leftovers(process, -9, conf) == -9
        assert process._service_subprocess.called
        process._tree.signal.assert_called_with([STUBBORN], signal.SIGKILL)

    def test_sockets_are_given_up(self, conf: Conf, process: Any) -> None:
        """Whoever is left may hold them for as long as it likes, but the time is up."""
        end_leftovers(process, -9, conf)
        assert process._exit_watch.sockets_overdue(-9)
        assert process._exit_watch.exit_expected
        assert process._exit_watch.grace_ends(default=60) <= time.monotonic()


class TestKill:
    def test_settled_exit_code_stands(self, process: Any) -> None:
        """A runner that is gone is not signalled, which would let kill() take it for one that failed."""
        process._tree.signal_leader.return_value = False
        process._exit_code = 0
        assert signal_tree(process, signal.SIGTERM)
        assert not process._tree.mock_calls

    def test_nobody_waits_for_long_unasked(self, conf: Conf, process: Any, mocker: MockerFixture) -> None:
        """What a crash has left gets a minute of a longer grace, for the server is not told of the end before."""
        grace_ends = mocker.patch.object(ExitWatch, "grace_ends", autospec=True, side_effect=InterruptedError)
        conf.read_dict({"core": {"killed_task_cleanup_time": "600"}})
        with pytest.raises(InterruptedError):
            end_leftovers(process, -9, conf)
        grace_ends.assert_called_once_with(process._exit_watch, default=MAX_GRACE_UNASKED)


class TestNotStarted:
    @pytest.fixture(autouse=True)
    def leave_nothing(self) -> Iterator[None]:
        with ending_all():
            yield

    def test_time_is_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a process has started that does not become a task is killed, however late its supervisor comes to it."""
        monkeypatch.setattr(child_teardown, "KILL_TIME", 0)

        def lead() -> None:
            os.setsid()
            relay.tell(fork(pause_for_ever))

        def fail_to_start(pid: int) -> None:
            with end_unless_started() as tree:
                tree.adopt(pid)
                raise TimeoutError

        with contextlib.closing(Relay()) as relay, contextlib.closing(Tree()) as held, waiting(lead) as pid:
            child = held.add(relay.hear())
            with pytest.raises(TimeoutError):
                fail_to_start(pid)
            assert held.gone(child)


class TestNothingToEnd:
    @pytest.mark.parametrize("exit_code", [None, 0])
    def test_exit_that_is_unknown_or_good(self, conf: Conf, process: Any, exit_code: int | None) -> None:
        """A task that still runs, or has succeeded, has nothing ended, or even looked for."""
        assert end_leftovers(process, exit_code, conf) is exit_code
        assert not process._tree.mock_calls

    def test_other_types(self, conf: Conf, process: Any) -> None:
        """What leads no session of its own leaves what it has started, however it ends."""
        process._new_session = False
        assert end_leftovers(process, 1, conf) == 1
        assert not process._tree.mock_calls
