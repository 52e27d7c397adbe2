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

import contextlib
import errno
import itertools
import os
import signal
import sys
import threading
from datetime import datetime, timezone
from functools import partial, partialmethod
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.faults import (
    NOISE,
    Outcome,
    be_deaf_runner,
    end_supervised,
    misbehave,
    refuse_sigterm,
    supervise,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    GRACE_WITH_FAULTS,
    NEVER,
    PATIENCE,
    Api,
    Log,
    Relay,
    SteppingApi,
    be_deaf,
    be_polite,
    conflict,
    describe_task,
    detach,
    find_entry_point,
    hear_ready,
    in_turn,
    name_state,
    pause_for_ever,
    set_grace,
    start_task,
    stop_supervisor,
    tells_again,
    wait_to_end,
)

from airflow.sdk.api.datamodels._generated import TaskInstanceState
from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.sdk.execution_time import comms, supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess
from airflow.sdk.execution_time.teardown import leftovers, stop_request
from airflow.sdk.execution_time.teardown.stop_request import CONFLICT

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("faulty_surroundings", "stop_policy")

SOME_DAY = datetime(2026, 1, 1, tzinfo=timezone.utc)

MANY_LINES = 200_000
"""More than the socket of a task holds, whatever its size."""


class TestSignals:
    """Signals for the supervisor, in a row and at the wrong moment."""

    def pester(self, *_: Any) -> None:
        """
        Have a thread send this process SIGTERMs as long as it handles them; it ignores them before and after.

        After 200 of them there are fewer, so that the supervisor comes to something else.
        """

        def ignore(*_: Any) -> None: ...

        def send() -> None:
            while signal.getsignal(signal.SIGTERM) is ignore:
                os.sched_yield()
            intervals = itertools.chain([0.002] * 200, itertools.repeat(0.02))
            while signal.getsignal(signal.SIGTERM) is not ignore:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(next(intervals))

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

    def test_signal_when_the_task_has_ended(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """The handler of whatever runs supervisors gets one that comes while the task's state is told, after that."""

        class Interrupted(Api):
            def finish(self, *args: Any, **kwargs: Any) -> None:
                stop_supervisor()
                relay.tell("told")

        def main() -> dict[str, Any]:
            signal.signal(signal.SIGTERM, lambda *_: relay.tell("handled"))
            task = describe_task(Interrupted())
            start = partial(ActivitySubprocess.start, target=lambda: os._exit(3))
            monkeypatch.setattr(ActivitySubprocess, "start", start)
            names = ("bundle_info", "dag_rel_path", "client")
            code = find_entry_point()(ti=task["what"], token="", **{name: task[name] for name in names})
            relay.tell("returned")
            return {"code": code, "log": []}

        assert supervise(main).code == 3
        assert [relay.hear() for _ in range(3)] == ["told", "handled", "returned"]

    @pytest.mark.parametrize("error", [errno.EPERM, errno.ESRCH], ids=errno.errorcode.get)
    def test_signal_that_cannot_be_passed_on(self, relay: Relay, error: int) -> None:
        """A task that SIGTERM does not reach is killed when its grace is over."""
        outcome = end_supervised(
            relay, "signalled", api=SteppingApi(stop_supervisor), after=lambda *_: refuse_sigterm(error)
        )
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL


def stop_when_waiting(process: ActivitySubprocess) -> None:
    """Have a thread tell this process, the supervisor, to stop while its loop waits."""

    def stop() -> None:
        while not process._exit_watch.is_waiting:
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


class TestBusyLoop:
    """A supervisor that is told to stop during a request to the server, which takes longer than the grace period."""

    def be_told(self, process: ActivitySubprocess) -> None:
        """Be told to stop, and be as late as if the whole grace period had passed since."""
        stop_supervisor()
        caught = stop_request.find_caught()
        assert caught
        assert process._exit_watch._kill_ends
        caught.received_at -= NEVER
        process._exit_watch._kill_ends -= NEVER

    @pytest.fixture(autouse=True)
    def patience(self, faulty_surroundings: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give the task, once the loop is back, all the time that a busy machine needs."""
        set_grace(monkeypatch, PATIENCE)
        monkeypatch.setattr(stop_request, "GRACE", PATIENCE)

    def test_task_that_prints(self, relay: Relay) -> None:
        """It cannot end in order before the supervisor reads what it prints, and then has the time for it."""

        def end_in_order(*_: Any) -> None:
            with open(1, "w", closefd=False) as output:
                output.writelines("line\n" for _ in range(MANY_LINES))
            os._exit(3)

        def target() -> None:
            signal.signal(signal.SIGTERM, end_in_order)
            relay.tell("ready")
            pause_for_ever()

        def main() -> dict[str, Any]:
            process = start_task(target, SteppingApi(lambda: self.be_told(process)))
            assert relay.hear() == "ready"
            return {"code": process.wait(), "log": []}

        assert supervise(main).code == 3

    @pytest.mark.parametrize("request_of", ["supervisor", "task"])
    def test_leftovers(self, relay: Relay, request_of: str) -> None:
        """A task may end meanwhile; what it has left is asked to end, too, and is not killed at once."""

        def target() -> None:
            decoder: comms.CommsDecoder[comms.ToTask, comms.ToSupervisor] = comms.CommsDecoder()
            decoder._read_frame()
            detach(lambda: be_polite(relay))
            relay.tell("ready")
            if request_of == "task":
                decoder.send(comms.GetVariable(key="k"))
            pause_for_ever()

        class Slow(Api):
            process: ActivitySubprocess
            told_to_stop = False

            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                if request_of == "supervisor":
                    self.take_long()

            def get(self, *args: Any, **kwargs: Any) -> Any:
                self.take_long()
                raise ConnectionError("away")

            def take_long(self) -> None:
                if not self.told_to_stop:
                    self.told_to_stop = True
                    be_told(self.process)
                    os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

        def main() -> dict[str, Any]:
            log, api = Log(), Slow()
            api.process = start_task(target, api, logger=log.logger)
            hear_ready(relay)
            return {"code": api.process.wait(), "log": log.entries}

        be_told = self.be_told
        outcome = supervise(main)
        assert outcome.left == []
        [entry] = outcome.find("warning", "left running")
        assert [process["signal"] for process in entry["processes"]] == ["SIGTERM"]


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

    def test_refused(self, relay: Relay, runner: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the server has ended the task meanwhile, its state is refused, and no callback of a failure runs."""
        set_grace(monkeypatch, NEVER)

        def tell_when_over(heartbeat: threading.Thread) -> None:
            heartbeat.join()
            runner.tell("refused")

        class Refusing(Api):
            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                thread = threading.current_thread()
                if thread is threading.main_thread():
                    stop_supervisor()
                else:
                    threading.Thread(target=tell_when_over, args=[thread], daemon=True).start()
                    raise conflict()

        def target() -> None:
            decoder: comms.CommsDecoder[comms.ToTask, comms.ToSupervisor] = comms.CommsDecoder()
            decoder._read_frame()
            signal.signal(signal.SIGTERM, lambda *_: None)
            relay.tell("ready")
            assert runner.hear() == "refused"
            try:
                decoder.send(comms.TaskState(state=TaskInstanceState.FAILED, end_date=SOME_DAY))
            except AirflowRuntimeError as error:
                relay.tell((error.error.detail or {})["status_code"])
            else:
                relay.tell("accepted")
            os._exit(1)

        def main() -> dict[str, Any]:
            log = Log()
            process = start_task(target, Refusing(), logger=log.logger)
            assert relay.hear() == "ready"
            code = process.wait()
            relay.tell(name_state(process.final_state))
            return {"code": code, "log": log.entries}

        outcome = supervise(main)
        assert relay.hear() == CONFLICT
        assert relay.hear() == supervisor.SERVER_TERMINATED
        [entry] = outcome.find("warning", "does not want it to run")
        assert entry["status"] == CONFLICT

    def test_task_that_cannot_be_killed(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """The server goes on to hear of it, and the supervisor to try."""
        monkeypatch.setattr(stop_request, "KILL_INTERVAL", 0.3)
        # It waits for so long after each signal.
        kill = partialmethod(ActivitySubprocess.kill, escalation_delay=0.1)
        monkeypatch.setattr(ActivitySubprocess, "kill", kill)
        beats = threading.Event()

        class Beating(Api):
            process: ActivitySubprocess

            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                if not self.process._stop.signal_heard:
                    stop_supervisor()
                elif self.process._stop.sigkill_sent:
                    beats.set()

        def is_refused(_who: object, sig: int, *_: Any) -> bool:
            return sig in (signal.SIGSTOP, signal.SIGKILL) and not beats.is_set()

        def main() -> dict[str, Any]:
            api = Beating()
            api.process = start_task(
                in_turn(be_deaf_runner, lambda: relay.tell("ready"), pause_for_ever), api
            )
            assert relay.hear() == "ready"
            for call in ("os.kill", "os.killpg", "signal.pidfd_send_signal"):
                misbehave(call, errno.EPERM, concerns=is_refused)
            return {"code": api.process.wait(), "log": []}

        outcome = supervise(main)
        assert outcome.code == -signal.SIGKILL
        assert outcome.left == []

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
                setattr(*place, create_autospec(original, side_effect=raise_once))
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

    def test_success_that_the_server_takes_later(self, relay: Relay) -> None:
        """It stays one where the supervisor tells it again in the end, although a stop signal came meanwhile."""

        class AwayOnce(Api):
            times = 0

            def succeed(self, *args: Any, **kwargs: Any) -> None:
                self.times += 1
                if self.times == 1:
                    stop_supervisor()
                    raise ConnectionError("no route to host")
                super().succeed(*args, **kwargs)

        def target() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            decoder: comms.CommsDecoder[comms.ToTask, comms.ToSupervisor] = comms.CommsDecoder()
            decoder._read_frame()
            with contextlib.suppress(AirflowRuntimeError):
                decoder.send(comms.SucceedTask(end_date=SOME_DAY))
            os._exit(0)

        def main() -> dict[str, Any]:
            api = AwayOnce()
            code = start_task(target, api).wait()
            return {"code": code, "log": [{"log_level": "told", "event": str(api.told)}]}

        outcome = supervise(main)
        assert outcome.code == (0 if tells_again() else 1)
        assert outcome.find("told", str(["success" if tells_again() else "failed"]))

    def test_state_that_the_server_does_not_want(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that the server has ended gets none accepted, as the server would answer."""

        def report(decoder: comms.CommsDecoder) -> None:
            try:
                decoder.send(comms.SucceedTask(end_date=SOME_DAY))
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
