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
"""Signals for the supervisor, in a row and at the wrong moment; before 1.4, when it passes them on."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading
from typing import Any

import pytest
from task_sdk.execution_time.teardown.faults import (
    NOISE,
    be_deaf_runner,
    end_supervised,
    refuse_sigterm,
)
from task_sdk.execution_time.teardown.supervised_task import (
    GRACE_WITH_FAULTS,
    Api,
    Relay,
    forked,
    pause_for_ever,
    start_task,
)

pytestmark = pytest.mark.usefixtures("faulty_surroundings")


class TestForwarding:
    """Before 1.4: signals for the supervisor."""

    def pester(self, *_: Any) -> None:
        """
        Have a thread send this process SIGTERMs once it handles them; it ignores them before and after.

        It goes on for longer than the task may take to end.
        """
        intervals = [0.002] * 200 + [0.02] * round(2 * NOISE / 0.02)

        def send() -> None:
            while signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
                select.select([], [], [], 0.002)
            for interval in intervals:
                os.kill(os.getpid(), signal.SIGTERM)
                select.select([], [], [], interval)

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=send, daemon=True).start()

    def test_signals_in_a_row(self, relay: Relay) -> None:
        """However many there are, the task ends as after one, and has its grace."""
        outcome = end_supervised(relay, "signalled", after=self.pester)
        assert outcome.left == []
        assert outcome.code == -signal.SIGTERM
        assert outcome.seconds > GRACE_WITH_FAULTS

    def test_signals_while_killing(self, relay: Relay) -> None:
        """They neither shorten nor prolong the grace of a kill."""
        outcome = end_supervised(relay, "conflict", runner=be_deaf_runner, after=self.pester)
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL
        assert GRACE_WITH_FAULTS < outcome.seconds < GRACE_WITH_FAULTS + 1 + NOISE

    def test_signal_that_cannot_be_passed_on(self, relay: Relay) -> None:
        """The supervisor survives that the task belongs to somebody else."""

        class Signalled(Api):
            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                if self.terminate:
                    signal.raise_signal(signal.SIGTERM)
                super().heartbeat(*args, **kwargs)

        outcome = end_supervised(
            relay, "conflict", api=Signalled(), after=lambda *_: refuse_sigterm(errno.EPERM)
        )
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL

    def test_signal_during_start(self, relay: Relay) -> None:
        """A supervisor that dies before its task has begun takes the runner along, which sees its socket close."""
        waiting = Relay()

        class Interrupted(Api):
            def start(self, *args: Any, **kwargs: Any) -> Any:
                assert waiting.hear()
                os.kill(os.getpid(), signal.SIGTERM)
                pause_for_ever()

        def target() -> None:
            waiting.tell("yes")
            os.read(0, 1)
            relay.tell("closed")

        with contextlib.closing(waiting), forked(lambda: start_task(target, Interrupted())) as supervising:
            assert relay.hear() == "closed"
            assert os.waitid(os.P_PID, supervising, os.WEXITED | os.WNOWAIT).si_status == signal.SIGTERM
