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
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from airflow.sdk.execution_time import child_session
from airflow.sdk.execution_time.child_exit import ExitWatch
from airflow.sdk.execution_time.child_session import (
    forward_signal,
    forward_signals,
    lead_session,
    signal_session,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_mock import MockerFixture


@contextlib.contextmanager
def child(prepare: Callable[[], Any]) -> Iterator[int]:
    """Fork a child that runs ``prepare`` and then waits for signals; yields its PID when it waits."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            prepare()
            os.write(writer, b".")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    pidfd = os.pidfd_open(pid)
    try:
        assert os.read(reader, 1) == b".", "the child failed"
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(pidfd)
        os.close(reader)


def ended_by(pid: int) -> int:
    """Collect a child, and return the number of the signal that ended it."""
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def supervise(pid: int, *, new_session: bool = True) -> Any:
    return SimpleNamespace(pid=pid, _new_session=new_session, _exit_code=None, _exit_watch=ExitWatch())


@pytest.fixture
def killpg(mocker: MockerFixture) -> Any:
    """Keep a mistake from ending the test runner."""
    return mocker.patch("os.killpg", autospec=True)


class TestLeadSession:
    def test_child_leads(self) -> None:
        """The child leads a session and a group that its PID numbers."""
        with child(lead_session) as pid:
            assert os.getsid(pid) == os.getpgid(pid) == pid

    def test_parent_was_first(self) -> None:
        """A child that its parent has made a group leader already gets its session all the same."""

        def lead_after_parent() -> None:
            os.setpgid(0, 0)
            assert lead_session()

        with child(lead_after_parent) as pid:
            assert os.getsid(pid) == os.getpgid(pid) == pid

    def test_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kernel that refuses leaves the child where it is, and the child is told."""

        def refuse() -> None:
            raise PermissionError

        monkeypatch.setattr(os, "setsid", refuse)

        def stay() -> None:
            assert not lead_session()

        with child(stay) as pid:
            assert os.getsid(pid) == os.getsid(0)


class TestSignalSession:
    def test_group_is_signalled(self) -> None:
        with child(lead_session) as pid:
            assert signal_session(pid, signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    @pytest.mark.parametrize("call", ["getpgid", "killpg"])
    @pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
    def test_falls_back(self, mocker: MockerFixture, call: str, error: type[Exception]) -> None:
        """A group that is not there, or may not be signalled, is reported, so that the caller signals the PID."""
        with child(lead_session) as pid:
            mocker.patch(f"os.{call}", autospec=True, side_effect=error)
            assert not signal_session(pid, signal.SIGTERM)

    @pytest.mark.parametrize("pid", [-1, 0, 1])
    def test_everybody_and_init_are_refused(self, killpg: Any, pid: int) -> None:
        assert not signal_session(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_own_group_is_refused(self, killpg: Any) -> None:
        """Before the child has opened its session it shares our group."""
        with child(lambda: None) as pid:
            assert not signal_session(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_own_group_that_the_child_leads_is_refused(
        self, killpg: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with child(lead_session) as pid:
            monkeypatch.setattr(os, "getpgrp", lambda: pid)
            assert not signal_session(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_reaped_child_is_refused(self, killpg: Any) -> None:
        """The number of a child that was collected may belong to somebody else by now."""
        with child(lead_session) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert not signal_session(pid, signal.SIGTERM)
        killpg.assert_not_called()

    def test_somebody_elses_child_is_refused(self, killpg: Any) -> None:
        assert not signal_session(os.getppid(), signal.SIGTERM)
        killpg.assert_not_called()

    def test_without_waitid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a Python that has no waitid() the group is guarded by its number alone."""
        monkeypatch.delattr(os, "waitid")
        with child(lead_session) as pid:
            assert signal_session(pid, signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    def test_dead_leader(self) -> None:
        """The group of a leader that is dead, and not collected yet, is still signalled."""
        with child(lead_session) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert signal_session(pid, signal.SIGTERM)


class TestForwardSignal:
    @pytest.mark.parametrize("new_session", [False, True])
    def test_child_gets_it(self, *, new_session: bool) -> None:
        with child(lead_session if new_session else lambda: None) as pid:
            forward_signal(supervise(pid, new_session=new_session), signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    def test_reaped_child_is_not_signalled(self, killpg: Any, mocker: MockerFixture) -> None:
        """A child that was collected meanwhile is reported, not the process that has its number now signalled."""
        with child(lead_session) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kill = mocker.patch("os.kill", autospec=True)
        with pytest.raises(ProcessLookupError):
            forward_signal(supervise(pid), signal.SIGTERM)
        kill.assert_not_called()
        killpg.assert_not_called()


class TestForwardSignals:
    @pytest.mark.parametrize("signum", child_session.FORWARDED_SIGNALS)
    def test_child_gets_it(self, signum: signal.Signals) -> None:
        with child(lead_session) as pid, forward_signals(supervise(pid)):
            signal.raise_signal(signum)
            assert ended_by(pid) == signum

    def test_child_is_gone(self) -> None:
        """A signal that comes after the task's end is nothing that the supervisor dies of."""
        with child(lead_session) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with forward_signals(supervise(pid)):
                signal.raise_signal(signal.SIGTERM)

    def test_former_handlers_return(self) -> None:
        """They do so however the monitoring ends."""

        def handle(signum: int, frame: Any) -> None: ...

        def monitor() -> None:
            with child(lead_session) as pid, forward_signals(supervise(pid)):
                assert signal.getsignal(signal.SIGTERM) is not handle
                raise InterruptedError

        former = signal.signal(signal.SIGTERM, handle)
        try:
            with pytest.raises(InterruptedError):
                monitor()
            assert signal.getsignal(signal.SIGTERM) is handle
        finally:
            signal.signal(signal.SIGTERM, former)

    def test_other_threads_install_nothing(self) -> None:
        """Python lets the main thread alone handle signals; elsewhere the task is monitored without."""
        seen = []

        def monitor() -> None:
            with forward_signals(supervise(os.getpid())):
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=monitor)
        thread.start()
        thread.join()
        assert seen == [signal.getsignal(signal.SIGTERM)]
