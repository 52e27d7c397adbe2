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
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    MadeUpTask,
    Relay,
    ended_by,
    fork,
    in_turn,
    kill_child,
    make_zombie,
    pause_for_ever,
    waiting,
)

from airflow.sdk.execution_time.teardown.session import lead_session, signal_led_group, signal_task

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


@pytest.fixture
def killpg(mocker: MockerFixture) -> Any:
    """Keep a mistake from ending the test runner."""
    return mocker.patch("os.killpg", autospec=True)


class TestLeadSession:
    def test_child_leads(self) -> None:
        """The child leads a session and a group that its PID numbers."""
        with waiting(lead_session) as pid:
            assert os.getsid(pid) == os.getpgid(pid) == pid

    def test_parent_was_first(self) -> None:
        """A child that its parent has made a group leader already gets its session all the same."""

        def lead_after_parent() -> None:
            os.setpgid(0, 0)
            assert lead_session()

        with waiting(lead_after_parent) as pid:
            assert os.getsid(pid) == os.getpgid(pid) == pid

    @pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
    def test_group_without_a_number(self, mocker: MockerFixture, disposition: signal.Handlers) -> None:
        """So does one whose parent's group was opened outside of this PID namespace; nobody helps it from then on."""

        def lead_after_parent() -> None:
            signal.signal(signal.SIGCHLD, disposition)
            os.setpgid(0, 0)
            assert lead_session()

        mocker.patch("os.getpgid", autospec=True, return_value=0)
        with waiting(lead_after_parent) as pid:
            mocker.stopall()
            assert os.getsid(pid) == os.getpgid(pid) == pid
            assert psutil.Process(pid).children() == []

    def test_refused(self, mocker: MockerFixture) -> None:
        """A kernel that refuses leaves the child where it is, and the child is told."""

        def stay() -> None:
            assert not lead_session()

        mocker.patch("os.setsid", autospec=True, side_effect=PermissionError)
        with waiting(stay) as pid:
            assert os.getsid(pid) == os.getsid(0)


class TestSignalSession:
    def test_group_is_signalled(self) -> None:
        """The leader, as one of its group, gets the signal."""
        with waiting(lead_session) as pid:
            assert signal_led_group(pid, signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    @pytest.mark.parametrize("call", ["getpgid", "killpg"])
    @pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
    def test_falls_back(self, mocker: MockerFixture, call: str, error: type[Exception]) -> None:
        """A group that is not there, or may not be signalled, is reported, so that the caller signals the PID."""
        with waiting(lead_session) as pid:
            mocker.patch(f"os.{call}", autospec=True, side_effect=error)
            assert not signal_led_group(pid, signal.SIGTERM)

    @pytest.mark.parametrize("pid", [-1, 0, 1])
    def test_everybody_and_init_are_refused(self, killpg: Any, pid: int) -> None:
        """What kill(2) takes for everybody, for our own group or for init is not signalled."""
        assert not signal_led_group(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_own_group_is_refused(self, killpg: Any) -> None:
        """Before the child has opened its session it shares our group."""
        with waiting(lambda: None) as pid:
            assert not signal_led_group(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_own_group_that_the_child_leads_is_refused(self, killpg: Any, mocker: MockerFixture) -> None:
        """Our own group is not signalled, even where the child leads it."""
        with waiting(lead_session) as pid:
            mocker.patch("os.getpgrp", autospec=True, return_value=pid)
            assert not signal_led_group(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_reaped_child_is_refused(self, killpg: Any) -> None:
        """The number of a child that was collected may belong to somebody else by now."""
        with waiting(lead_session) as pid:
            kill_child(pid)
            assert not signal_led_group(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_somebody_elses_child_is_refused(self, killpg: Any) -> None:
        """A process that we have not started is not signalled."""
        told = Relay()

        def start_leader() -> None:
            told.tell(fork(in_turn(lead_session, lambda: told.tell("leads"), pause_for_ever)))

        with contextlib.closing(told), waiting(start_leader):
            [stranger] = [pid for pid in (told.hear(), told.hear()) if pid != "leads"]
            assert os.getpgid(stranger) == stranger
            assert not signal_led_group(stranger, signal.SIGTERM)
            os.kill(stranger, signal.SIGKILL)
        killpg.assert_not_called()

    def test_without_waitid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a Python that has no waitid() the group is guarded by its number alone."""
        monkeypatch.delattr(os, "waitid")
        with waiting(lead_session) as pid:
            assert signal_led_group(pid, signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    def test_dead_leader(self) -> None:
        """The group of a leader that is dead, and not collected yet, is still signalled."""
        with waiting(lead_session) as pid:
            make_zombie(pid)
            assert signal_led_group(pid, signal.SIGTERM)


def task(pid: int, *, new_session: bool = True) -> MadeUpTask:
    return MadeUpTask(pid=pid, _new_session=new_session)


class TestSignalTask:
    def test_session_is_signalled(self) -> None:
        """A type that has asked for a session has it signalled."""
        with waiting(lead_session) as pid:
            assert signal_task(task(pid), signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    def test_other_types(self, killpg: Any) -> None:
        """A type that has not asked for a session is left to the caller, who signals the PID alone."""
        with waiting(lead_session) as pid:
            assert not signal_task(task(pid, new_session=False), signal.SIGTERM)
        killpg.assert_not_called()

    def test_own_sigkill_is_noted(self) -> None:
        """It is for nobody else to be blamed; SIGTERM before it, or after it, changes nothing."""
        with waiting(lead_session) as pid:
            process = task(pid)
            signal_task(process, signal.SIGCONT)
            assert not process._stop.sigkill_sent
            signal_task(process, signal.SIGKILL)
            signal_task(process, signal.SIGTERM)
            assert process._stop.sigkill_sent
