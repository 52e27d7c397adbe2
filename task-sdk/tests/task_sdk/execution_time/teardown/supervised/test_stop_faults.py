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
"""
A supervisor that is told to stop, or fails, while the kernel, the server or other code does what it should not.

As in test_faults, none of it ends in a traceback that hides the task's end, and whatever is left is named.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.faults import (
    NOISE,
    Outcome,
    be_deaf_runner,
    end_supervised,
    refuse_sigterm,
    supervise,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    GRACE_WITH_FAULTS,
    NEVER,
    Api,
    Log,
    Relay,
    SteppingApi,
    be_deaf,
    detach,
    hear_ready,
    in_turn,
    pause_for_ever,
    set_grace,
    start_task,
    stop_supervisor,
    wait_to_end,
)

from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.teardown import leftovers, stop_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk.execution_time.supervisor import ActivitySubprocess

pytestmark = pytest.mark.usefixtures("faulty_surroundings", "stop_policy")


class TestSignals:
    """Signals for the supervisor, in a row and at the wrong moment."""

    def pester(self, *_: Any) -> None:
        """
        Have a thread send this process SIGTERMs once it handles them; it ignores them before and after.

        It goes on for longer than the task may take to end.
        """
        intervals = [0.002] * 200 + [0.02] * round(2 * NOISE / 0.02)

        def ignore(*_: Any) -> None: ...

        def send() -> None:
            while signal.getsignal(signal.SIGTERM) is ignore:
                select.select([], [], [], 0.002)
            for interval in intervals:
                os.kill(os.getpid(), signal.SIGTERM)
                select.select([], [], [], interval)

        # Not SIG_IGN, which the supervisor would leave in its place.
        signal.signal(signal.SIGTERM, ignore)
        threading.Thread(target=send, daemon=True).start()

    def test_signals_in_a_row(self, relay: Relay) -> None:
        """However many there are, the task ends as after one, and what it has left has its grace."""
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

    @pytest.mark.parametrize("error", [errno.EPERM, errno.ESRCH], ids=errno.errorcode.get)
    def test_signal_that_cannot_be_passed_on(self, relay: Relay, error: int) -> None:
        """A task that SIGTERM does not reach is killed when its grace is over."""
        outcome = end_supervised(
            relay, "signalled", api=SteppingApi(stop_supervisor), after=lambda *_: refuse_sigterm(error)
        )
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL

    def test_kill_after_the_grace_takes_all(self, relay: Relay) -> None:
        """A task that is deaf to the stop is killed with all that it has started."""
        outcome = end_supervised(relay, "signalled", runner=be_deaf_runner, api=SteppingApi(stop_supervisor))
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL
        assert outcome.seconds < GRACE_WITH_FAULTS + 1 + NOISE


def stop_when_waiting(process: ActivitySubprocess) -> None:
    """Have a thread tell this process, the supervisor, to stop while its loop waits."""

    def stop() -> None:
        while not process._exit_watch.is_waiting:
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


class TestHeartbeats:
    def test_loop_sends_none(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once the supervisor is told to stop, a thread does: the API server may be away, and keep who asks for a minute."""
        set_grace(monkeypatch, 0.5)
        late: list[str] = []

        class Away(Api):
            process: ActivitySubprocess
            started = False

            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                if not self.started:
                    self.started = True
                    stop_when_waiting(self.process)
                caught = stop_request.find_caught()
                if caught and caught.signum and threading.current_thread() is threading.main_thread():
                    late.append("in the grace" if self.process._stop.kill_at else "before the task was told")
                raise ConnectionError("away")

        def main() -> dict[str, Any]:
            api = Away()
            api.process = start_task(
                in_turn(be_deaf_runner, lambda: relay.tell("ready"), pause_for_ever), api
            )
            assert relay.hear() == "ready"
            with structlog.testing.capture_logs():
                code = api.process.wait()
            return {"code": code, "log": [{"log_level": "late", "event": event} for event in late]}

        outcome = supervise(main)
        assert outcome.code == -signal.SIGKILL
        assert outcome.log == []

    def test_task_that_answers(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that is told while nobody is busy, and then prints, is not told once more."""
        set_grace(monkeypatch, NEVER)

        def speak(*_: Any) -> None:
            relay.tell("SIGTERM")
            os.write(1, b"I have heard\n")

        def target() -> None:
            signal.signal(signal.SIGTERM, speak)
            # Its number is higher: of two signals Python handles SIGTERM first.
            signal.signal(signal.SIGWINCH, lambda *_: os._exit(1))
            relay.tell("ready")
            pause_for_ever()

        class Ending(Log):
            process: ActivitySubprocess

            def __call__(self, logger: Any, method_name: str, event_dict: Any) -> Any:
                if event_dict["event"] == "I have heard":
                    os.kill(self.process.pid, signal.SIGWINCH)
                return super().__call__(logger, method_name, event_dict)

        def main() -> dict[str, Any]:
            log = Ending()
            log.process = process = start_task(target, logger=log.logger)
            assert relay.hear() == "ready"
            stop_when_waiting(process)
            code = process.wait()
            relay.tell("ended")
            return {"code": code, "log": []}

        outcome = supervise(main)
        assert outcome.code == 1
        assert [relay.hear(), relay.hear()] == ["SIGTERM", "ended"]


class TestExceptions:
    """Exceptions that leave the supervisor's loop."""

    def end_by_exception(
        self,
        relay: Relay,
        api: Api,
        *,
        second: BaseException | None = None,
        place: tuple[Any, str] = (leftovers, "serve_sockets"),
        log: Log | None = None,
        runner: Callable[[], Any] = be_deaf_runner,
    ) -> Outcome:
        """
        Supervise a task, deaf unless said otherwise, with a deaf daemon; the code is that of the runner, what was raised is in the log.

        :param second: what is raised once while the task is being ended, at a place.
        """

        def target() -> None:
            runner()
            detach(lambda: be_deaf(relay))
            os.write(1, b"line\n")
            wait_to_end(relay)

        def raise_once(*_: Any) -> None:
            setattr(*place, original)
            assert second
            raise second

        def main() -> dict[str, Any]:
            process = start_task(target, api, logger=(log or Log()).logger)
            hear_ready(relay)
            if second:
                setattr(*place, raise_once)
            try:
                process.wait()
            except BaseException as error:  # noqa: BLE001 - it is the result
                raised = {"log_level": "raised", "event": repr(error)}
            return {"code": process._exit_code, "log": [raised]}

        original = getattr(*place)
        return supervise(main)

    def raise_in_handler(self) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
        signal.raise_signal(signal.SIGUSR1)

    def test_one(self, relay: Relay) -> None:
        """The task ends with its tree, then the exception goes on."""
        outcome = self.end_by_exception(relay, SteppingApi(self.raise_in_handler))
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL
        assert outcome.find("raised", "SystemExit(3)")

    @pytest.mark.parametrize("second", [KeyboardInterrupt(), LookupError("hard limit")])
    def test_second(self, relay: Relay, second: BaseException) -> None:
        """One that comes while the task is being ended cuts its grace short, and leaves nothing either."""
        outcome = self.end_by_exception(relay, SteppingApi(self.raise_in_handler), second=second)
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL
        assert outcome.find("raised", type(second).__name__)

    def test_second_while_leftovers_end(self, relay: Relay) -> None:
        """One that cuts short how leftovers are ended leaves none of them, either."""
        outcome = self.end_by_exception(
            relay,
            SteppingApi(self.raise_in_handler),
            second=LookupError("hard limit"),
            place=(leftovers.Teardown, "terminate"),
            runner=lambda: None,
        )
        assert outcome.code == -signal.SIGTERM
        assert outcome.left == []
        assert outcome.find("raised", "SystemExit(3)")

    def test_log_that_cannot_be_written(self, relay: Relay) -> None:
        """A disk that is full ends the task, and nothing that is left of it."""

        class FullLog(Log):
            def __call__(self, *args: Any) -> Any:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        outcome = self.end_by_exception(relay, Api(), log=FullLog())
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL
        assert outcome.find("raised", os.strerror(errno.ENOSPC))


class TestRequests:
    """What a task asks while its supervisor, or the server, is not at its best."""

    def test_server_that_is_away(self, relay: Relay) -> None:
        """The task gets an error, and can ask again; its supervisor goes on."""

        class Away(Api):
            def get(self, *args: Any, **kwargs: Any) -> Any:
                raise ConnectionError("no route to host")

        def target() -> None:
            decoder: comms.CommsDecoder[comms.ToTask, comms.ToSupervisor] = comms.CommsDecoder()
            decoder._read_frame()
            for _ in "ab":
                try:
                    decoder.send(comms.GetVariable(key="k"))
                except AirflowRuntimeError as error:
                    relay.tell((error.error.detail or {})["status_code"])
            os._exit(3)

        def main() -> dict[str, Any]:
            return {"code": start_task(target, Away()).wait(), "log": []}

        outcome = supervise(main)
        assert outcome.code == 3
        assert outcome.left == []
        assert [relay.hear(), relay.hear()] == [None, None]

    def test_state_that_the_server_does_not_want(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that the server has ended gets none accepted, as the server would answer."""

        def report(decoder: comms.CommsDecoder) -> None:
            try:
                decoder.send(comms.SucceedTask(end_date=datetime(2026, 1, 1, tzinfo=timezone.utc)))
            except AirflowRuntimeError as error:
                relay.tell((error.error.detail or {})["status_code"])
            os._exit(0)

        def target() -> None:
            decoder: comms.CommsDecoder[comms.ToTask, comms.ToSupervisor] = comms.CommsDecoder()
            decoder._read_frame()
            signal.signal(signal.SIGTERM, lambda *_: report(decoder))
            relay.tell("ready")
            pause_for_ever()

        class Ending(Api):
            def tell(self, state: Any) -> None:
                self.told.append(state)

        def main() -> dict[str, Any]:
            api = Ending()
            process = start_task(target, api)
            assert relay.hear() == "ready"
            api.terminate = True
            code = process.wait()
            return {"code": code, "log": [{"log_level": "told", "event": str(api.told)}]}

        set_grace(monkeypatch, NEVER)
        outcome = supervise(main)
        assert relay.hear() == 409
        assert not outcome.find("told", "success")


class TestLeftovers:
    def test_heartbeats_go_on(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """While leftovers have their grace the server is told that the task is not over."""
        set_grace(monkeypatch, NEVER)
        monkeypatch.setattr(stop_request, "HEARTBEAT_INTERVAL", 0.05)
        heartbeat = Relay()

        class Telling(Api):
            process: ActivitySubprocess | None = None

            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                if self.process is not None and self.process._exit_code is not None:
                    heartbeat.tell("heartbeat")

        def be_deaf_until_heartbeat(relay: Relay) -> None:
            be_deaf(relay)
            assert heartbeat.hear() == "heartbeat"
            os._exit(0)

        api = Telling()
        outcome = end_supervised(
            relay,
            "killed",
            be_deaf_until_heartbeat,
            api=api,
            after=lambda process, _: setattr(api, "process", process),
        )
        assert outcome.left == []
        [entry] = outcome.find("warning", "left running")
        assert [process["signal"] for process in entry["processes"]] == ["SIGTERM"]
        heartbeat.close()
