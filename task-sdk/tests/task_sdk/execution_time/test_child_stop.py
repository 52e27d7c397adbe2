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

import os
import signal
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised_task import ended_by, waiting

from airflow.sdk.execution_time import child_forwarding
from airflow.sdk.execution_time.child_exit import ExitWatch
from airflow.sdk.execution_time.child_forwarding import forward_signal, forward_signals
from airflow.sdk.execution_time.child_session import lead_session

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


def supervise(pid: int, *, new_session: bool = True) -> Any:
    return SimpleNamespace(pid=pid, _new_session=new_session, _exit_code=None, _exit_watch=ExitWatch())


class TestForwardSignal:
    @pytest.mark.parametrize("new_session", [False, True])
    def test_child_gets_it(self, *, new_session: bool) -> None:
        """The child gets the signal, in a session of its own or not."""
        with waiting(lead_session if new_session else lambda: None) as pid:
            forward_signal(supervise(pid, new_session=new_session), signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM

    def test_reaped_child_is_not_signalled(self, mocker: MockerFixture) -> None:
        """A child that was collected meanwhile is reported, not the process that has its number now signalled."""
        with waiting(lead_session) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kill, killpg = (mocker.patch(f"os.{call}", autospec=True) for call in ("kill", "killpg"))
        with pytest.raises(ProcessLookupError):
            forward_signal(supervise(pid), signal.SIGTERM)
        kill.assert_not_called()
        killpg.assert_not_called()


class TestForwardSignals:
    @pytest.mark.parametrize("signum", child_forwarding.FORWARDED_SIGNALS)
    def test_child_gets_it(self, signum: signal.Signals) -> None:
        """What the supervisor is sent while it monitors, the child gets."""
        with waiting(lead_session) as pid, forward_signals(supervise(pid)):
            signal.raise_signal(signum)
            assert ended_by(pid) == signum

    def test_child_is_gone(self) -> None:
        """A signal that comes after the task's end is nothing that the supervisor dies of, or boasts of."""
        with waiting(lead_session) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with structlog.testing.capture_logs() as logs, forward_signals(supervise(pid)):
                signal.raise_signal(signal.SIGTERM)
            assert logs == []

    def test_former_handlers_return(self) -> None:
        """They do so however the monitoring ends."""

        def handle(signum: int, frame: Any) -> None: ...

        def monitor() -> None:
            with waiting(lead_session) as pid, forward_signals(supervise(pid)):
                assert signal.getsignal(signal.SIGTERM) is not handle
                raise InterruptedError

        former = signal.signal(signal.SIGTERM, handle)
        try:
            with pytest.raises(InterruptedError):
                monitor()
            assert signal.getsignal(signal.SIGTERM) is handle
        finally:
            signal.signal(signal.SIGTERM, former)

    def test_former_handlers_return_also_half_installed(self, mocker: MockerFixture) -> None:
        """A signal that comes while they are replaced may have its former handler raise."""
        former = [signal.getsignal(signum) for signum in child_forwarding.FORWARDED_SIGNALS]
        install = signal.signal
        interrupted = iter([False, True])

        def interrupt(signum: int, handler: Any) -> Any:
            if next(interrupted, False):
                raise KeyboardInterrupt
            return install(signum, handler)

        with waiting(lead_session) as pid:
            mocker.patch("signal.signal", autospec=True, side_effect=interrupt)
            with pytest.raises(KeyboardInterrupt), forward_signals(supervise(pid)):
                pass
        assert [signal.getsignal(signum) for signum in child_forwarding.FORWARDED_SIGNALS] == former

    def test_former_handlers_return_also_if_one_raises(self, mocker: MockerFixture) -> None:
        """A signal that comes when the first of them is back may have it raise."""
        former = [signal.getsignal(signum) for signum in child_forwarding.FORWARDED_SIGNALS]
        install = signal.signal
        interrupted = iter([False, False, True])

        def interrupt(signum: int, handler: Any) -> Any:
            replaced = install(signum, handler)
            if next(interrupted, False):
                raise KeyboardInterrupt
            return replaced

        with waiting(lead_session) as pid:
            mocker.patch("signal.signal", autospec=True, side_effect=interrupt)
            with pytest.raises(KeyboardInterrupt), forward_signals(supervise(pid)):
                pass
        assert [signal.getsignal(signum) for signum in child_forwarding.FORWARDED_SIGNALS] == former

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
