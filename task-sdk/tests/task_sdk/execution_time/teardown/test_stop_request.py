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
import math
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from configparser import ConfigParser
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    MadeUpTask,
    Relay,
    Tree,
    conflict,
    ended_by,
    find_http_library,
    fork,
    forked,
    in_turn,
    kill_child,
    list_descriptors,
    pause_for_ever,
    waiting,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.teardown import session, stop_request
from airflow.sdk.execution_time.teardown.policy import STOP_GRACE, StopPolicy
from airflow.sdk.execution_time.teardown.session import lead_session, signal_task
from airflow.sdk.execution_time.teardown.stop_request import (
    KILL_INTERVAL,
    RUNNER_FAILED,
    STOP_SIGNALS,
    _CaughtSignals,
    begin_runner,
    catch_stop_signals,
    find_caught,
    heed_refusal,
    heed_stop_signals,
    note_failed_heartbeats,
    note_overtime,
    note_server_ended,
    send_heartbeat,
    send_heartbeat_if_due,
    signal_pid,
    watch_stop_signals,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_mock import MockerFixture

WITHOUT_UNIX = """
import signal, sys
import psutil
for name in ("SIGHUP", "SIGQUIT", "SIGKILL", "SIGALRM", "SIGCONT", "SIGSTOP", "SIGRTMAX", "pthread_sigmask"):
    delattr(signal, name)
sys.modules["resource"] = None
import airflow.sdk.execution_time.supervisor
import airflow.sdk.execution_time.task_runner
"""
"""A program that imports the supervisor where what Windows lacks is not there."""


FORKS = 5
"""Who runs first after a fork, parent or child, is not always the same."""


def conflict_of_proxy() -> Exception:
    """Return what the client raises for a page of HTML."""
    http = find_http_library()
    request = http.Request("PUT", "http://127.0.0.1/")
    error: Exception = http.HTTPStatusError("not found", request=request, response=http.Response(404))
    return error


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch) -> ConfigParser:
    """Return a configuration in which nothing is set."""
    monkeypatch.delenv("AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME", raising=False)
    return ConfigParser()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Begin with handlers that end no test, and leave to other tests what they had."""
    former = {signum: signal.signal(signum, lambda *_: None) for signum in STOP_SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    yield
    for signum, handler in former.items():
        signal.signal(signum, handler)
    signal.set_wakeup_fd(descriptor)


def get_caught() -> _CaughtSignals:
    """Return what catches signals here."""
    caught = find_caught()
    assert caught
    return caught


def list_handlers() -> list[Any]:
    return [signal.getsignal(signum) for signum in STOP_SIGNALS]


class Supervised(MadeUpTask):
    """A task whose selector watches the signals alone; ``killed`` says how it was killed instead of killing it."""

    def __init__(
        self, pid: int = 0, policy: StopPolicy = StopPolicy.STOP, *, new_session: bool = True
    ) -> None:
        super().__init__(
            pid=pid, _last_successful_heartbeat=1.0, _new_session=new_session, _stop_policy=policy
        )
        self.killed: list[tuple[signal.Signals, bool]] = []

    def kill(
        self,
        signal_to_send: signal.Signals = signal.SIGINT,
        escalation_delay: float = 5.0,
        force: bool = False,
    ) -> None:
        self.killed.append((signal_to_send, force))

    def await_heartbeat(self) -> None:
        """Wait until the heartbeat that a thread sends has been answered."""
        assert self._stop.heartbeat
        self._stop.heartbeat.join()

    def say(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return what the task's log says: level, event and fields of each entry."""
        log: Any = self.process_log
        return [(call.method_name, call.args[0], call.kwargs) for call in log.calls]


class Sent(list[int]):
    """The signals that a task was sent, instead of sending them."""

    def __call__(self, _process: Any, sig: int) -> bool:
        self.append(sig)
        return True


class TestCatchStopSignals:
    @pytest.mark.parametrize("signum", STOP_SIGNALS)
    def test_handler_only_takes_note(self, signum: signal.Signals) -> None:
        """A handler that logs could wait for ever for the lock that the code that it interrupts holds."""
        with structlog.testing.capture_logs() as logs, catch_stop_signals():
            signal.raise_signal(signum)
            assert get_caught().signum is signum
        assert logs == []

    def test_first_signal_counts(self) -> None:
        """However many come, and of what kind, they are one request."""
        with catch_stop_signals():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(signum)
            assert get_caught().signum == signal.SIGINT

    def test_inherited_wakeup_descriptor(self) -> None:
        """That of an asyncio loop, say, is not told of our signals, and is there again afterwards."""
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            writer.setblocking(False)
            signal.set_wakeup_fd(writer.fileno())
            with catch_stop_signals():
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(BlockingIOError):
                reader.recv(1)
            assert signal.set_wakeup_fd(-1) == writer.fileno()

    def test_many_signals(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A wakeup descriptor that is full neither blocks nor complains (signal.set_wakeup_fd)."""
        with catch_stop_signals():
            get_caught().writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            for _ in range(2000):
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(BlockingIOError):
                get_caught().writer.send(b"." * 4096 * 1024)
        assert capfd.readouterr().err == ""

    def test_ignored_signal_stays_ignored(self) -> None:
        """Celery's pool ignores SIGINT, so that Ctrl-C lets its tasks finish."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with catch_stop_signals():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert get_caught().signum is None

    def test_former_handlers_return(self) -> None:
        """They do so however the supervision ends, and the descriptors are closed."""

        def handle(signum: int, frame: Any) -> None: ...

        def monitor() -> None:
            with catch_stop_signals():
                assert handle not in list_handlers()
                sockets.extend([get_caught().reader, get_caught().writer])
                raise InterruptedError

        sockets: list[socket.socket] = []
        signal.signal(signal.SIGHUP, handle)
        former = list_handlers()
        with pytest.raises(InterruptedError):
            monitor()
        assert list_handlers() == former
        assert [sock.fileno() for sock in sockets] == [-1, -1]
        assert find_caught() is None
        assert signal.set_wakeup_fd(-1) == -1

    @pytest.mark.parametrize("when", range(1, 2 * len(STOP_SIGNALS) + 1))
    def test_former_handlers_return_also_if_one_raises(self, mocker: MockerFixture, when: int) -> None:
        """A signal that comes while they are replaced, or restored, may have a former handler raise."""
        former, install, calls = list_handlers(), signal.signal, []

        def install_and_interrupt(signum: int, handler: Any) -> Any:
            replaced = install(signum, handler)
            calls.append(signum)
            if len(calls) == when:
                raise KeyboardInterrupt
            return replaced

        mocker.patch("signal.signal", autospec=True, side_effect=install_and_interrupt)
        with pytest.raises(KeyboardInterrupt), catch_stop_signals():
            pass
        assert list_handlers() == former
        assert find_caught() is None

    def test_handler_of_other_code(self, mocker: MockerFixture) -> None:
        """What C code has installed cannot be restored, and is replaced by the default."""
        mocker.patch("signal.getsignal", autospec=True, return_value=None)
        with catch_stop_signals():
            pass
        mocker.stopall()
        assert list_handlers() == [signal.SIG_DFL] * len(STOP_SIGNALS)

    def test_nested(self) -> None:
        """The inner one changes nothing, and ends nothing that the outer one has begun."""
        with catch_stop_signals():
            caught = get_caught()
            with catch_stop_signals():
                assert find_caught() is caught
            signal.raise_signal(signal.SIGTERM)
            assert find_caught() is caught
            assert caught.signum == signal.SIGTERM

    def test_other_threads_install_nothing(self) -> None:
        """Python lets the main thread alone handle signals; elsewhere the task is monitored without."""
        seen: list[Any] = []

        def monitor() -> None:
            process = Supervised()
            with catch_stop_signals(), watch_stop_signals(process, ConfigParser()):
                seen.extend([list_handlers(), find_caught(), len(process.selector.get_map())])

        former = list_handlers()
        thread = threading.Thread(target=monitor)
        thread.start()
        thread.join()
        assert seen == [former, None, 0]

    def test_other_threads_are_not_told(self) -> None:
        """A task that a thread monitors beside one of the main thread is not stopped by the main thread's signals."""
        seen: list[Any] = []
        with catch_stop_signals():
            signal.raise_signal(signal.SIGTERM)
            thread = threading.Thread(target=lambda: seen.append(find_caught()))
            thread.start()
            thread.join()
        assert seen == [None]

    @pytest.mark.parametrize("policy", StopPolicy)
    def test_signal_that_is_late(self, policy: StopPolicy) -> None:
        """One that comes when the task to be stopped has ended is for the process, when all is done."""
        handled: list[int] = []
        signal.signal(signal.SIGHUP, lambda signum, _: handled.append(signum))
        with catch_stop_signals():
            with watch_stop_signals(Supervised(policy=policy), ConfigParser()):
                pass
            signal.raise_signal(signal.SIGHUP)
            assert handled == []
        assert handled == ([signal.SIGHUP] if policy is StopPolicy.STOP else [])

    def test_signal_that_has_stopped_a_task(self, conf: ConfigParser) -> None:
        """It does not end the process as well, which may go on to its next task; nor do those that follow it."""
        handled: list[int] = []
        signal.signal(signal.SIGTERM, lambda signum, _: handled.append(signum))
        with catch_stop_signals():
            process = Supervised()
            with watch_stop_signals(process, conf):
                process._exit_watch.is_waiting = True
                signal.raise_signal(signal.SIGTERM)
                heed_stop_signals(process, conf, send=Sent())
            signal.raise_signal(signal.SIGTERM)
        assert handled == []

    def test_signal_without_a_task(self) -> None:
        """One that comes when no task has started is not sent again: nobody has said yet what it means."""
        handled: list[int] = []
        signal.signal(signal.SIGTERM, lambda signum, _: handled.append(signum))
        with catch_stop_signals():
            signal.raise_signal(signal.SIGTERM)
        assert handled == []

    def test_forked_copy(self) -> None:
        """A runner that gets a signal before it comes to begin_runner() dies of it."""
        ready = Relay()
        with catch_stop_signals(), forked(in_turn(lambda: ready.tell("ready"), pause_for_ever)) as pid:
            assert ready.hear() == "ready"
            os.kill(pid, signal.SIGTERM)
            assert ended_by(pid) == signal.SIGTERM
        ready.close()


class TestHoldStopSignals:
    def test_handler_that_raises(self, mocker: MockerFixture) -> None:
        """A handler that runs while the signals are blocked for a fork, and raises, does not leave them blocked."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        change = signal.pthread_sigmask

        def change_and_raise(how: int, signals: Any) -> Any:
            result = change(how, signals)
            if signals == STOP_SIGNALS:
                raise TimeoutError
            return result

        mocker.patch.object(signal, "pthread_sigmask", autospec=True, side_effect=change_and_raise)
        with catch_stop_signals():
            with pytest.raises(TimeoutError):
                stop_request.hold_stop_signals()
            stop_request.release_stop_signals()
        assert change(signal.SIG_BLOCK, ()) == former


class TestWatchStopSignals:
    def test_signal_wakes_the_selector(self) -> None:
        """Python would go on waiting where the signal has come (PEP 475)."""
        process = Supervised()
        with watch_stop_signals(process, ConfigParser()):
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            assert process.selector.select(PATIENCE)
            timer.join()
            assert get_caught().signum == signal.SIGTERM
        assert not process.selector.get_map()

    def test_signal_during_start(self) -> None:
        """One that has come before the loop begins wakes it, too."""
        process = Supervised()
        with catch_stop_signals():
            signal.raise_signal(signal.SIGTERM)
            with watch_stop_signals(process, ConfigParser()):
                assert process.selector.select(PATIENCE)

    def test_runner_that_has_not_run_yet(self) -> None:
        """A signal reaches a forked child that has not had a processor yet; signals come as before after the fork."""

        def main() -> None:
            # The child waits for the only processor.
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            with catch_stop_signals(), forked(pause_for_ever) as child:
                os.kill(child, signal.SIGTERM)
                relay.tell([ended_by(child), *signal.pthread_sigmask(signal.SIG_BLOCK, [])])

        with contextlib.closing(Relay()) as relay:
            for _ in range(FORKS):
                with forked(main):
                    assert relay.hear() == [signal.SIGTERM]

    def test_closed_selector(self) -> None:
        """The loop may have closed it by itself."""
        process = Supervised()
        with watch_stop_signals(process, ConfigParser()):
            process.selector.close()
        assert find_caught() is None


class TestBusyLoop:
    """A loop that is in a request to an API server that is away comes to nothing else for a minute and more."""

    def test_task_is_told_at_once(self, conf: ConfigParser) -> None:
        """The handler passes the signal on, the loop does not do so again, and the grace has begun with the signal."""
        with waiting(lead_session) as pid:
            process, sent = Supervised(pid), Sent()
            with watch_stop_signals(process, conf):
                signal.raise_signal(signal.SIGTERM)
                assert ended_by(pid) == signal.SIGTERM
                received_at = get_caught().received_at
                heed_stop_signals(process, conf, send=sent)
        assert sent == []
        assert process._stop.kill_at == received_at + STOP_GRACE

    @pytest.mark.parametrize(
        ("option", "busy", "left"), [(None, 30, 30), (None, 58, 5), (None, 90, 5), ("2", 1, 2), ("2", 90, 2)]
    )
    def test_grace_that_is_over_when_the_loop_is_back(
        self, conf: ConfigParser, mocker: MockerFixture, option: str | None, busy: float, left: float
    ) -> None:
        """A task that prints could not run its ``on_kill``, for which it then has some seconds, as its leftovers have."""
        if option:
            conf.read_dict({"core": {"killed_task_cleanup_time": option}})
        clock = mocker.patch.object(stop_request.time, "monotonic", autospec=True, return_value=100.0)
        mocker.patch.object(stop_request, "signal_task", autospec=True, return_value=True)
        process = Supervised()
        with watch_stop_signals(process, conf):
            signal.raise_signal(signal.SIGTERM)
            clock.return_value += busy
            assert process._exit_watch.grace_ends(default=0) == clock.return_value + left
            for seconds in (0, left - 0.1):
                clock.return_value = 100.0 + busy + seconds
                heed_stop_signals(process, conf, send=Sent())
            assert process._exit_watch.grace_ends(default=0) == 100 + busy + left
            assert process.killed == []
            clock.return_value = 100.0 + busy + left
            heed_stop_signals(process, conf, send=Sent())
            assert process.killed == [(signal.SIGKILL, True)]

    def test_task_that_is_out_of_reach(self, conf: ConfigParser, mocker: MockerFixture) -> None:
        """If the handler may not signal it, as that of another user, the loop does, which asks sudo."""
        with waiting(lead_session) as pid:
            process, sent = Supervised(pid), Sent()
            kill = mocker.patch.object(stop_request.os, "kill", autospec=True, side_effect=PermissionError)
            mocker.patch.object(session.os, "killpg", autospec=True, side_effect=PermissionError)
            with watch_stop_signals(process, conf):
                signal.raise_signal(signal.SIGTERM)
                assert kill.called
                heed_stop_signals(process, conf, send=sent)
            mocker.stopall()
        assert sent == [signal.SIGTERM]

    def test_loop_that_has_told_the_task(self, conf: ConfigParser) -> None:
        """When the task answers, the handler's second try does not tell it again."""
        process, sent = Supervised(), Sent()
        process._exit_watch.is_waiting = True
        with watch_stop_signals(process, conf):
            signal.raise_signal(signal.SIGTERM)
            heed_stop_signals(process, conf, send=sent)
            process._exit_watch.is_waiting = False
            get_caught().repeat()
        assert sent == [signal.SIGTERM]
        assert process._stop.sigterm_sent

    def test_signal_that_another_task_has_heard_of(self, conf: ConfigParser) -> None:
        """It wakes the loop of the next task of this process at once, and not only the first one's."""
        process = Supervised()
        with catch_stop_signals():
            signal.raise_signal(signal.SIGTERM)
            while get_caught().reader in select.select([get_caught().reader], [], [], 0)[0]:
                get_caught().reader.recv(1)
            with watch_stop_signals(process, conf):
                assert process.selector.select(0)

    @pytest.mark.parametrize("stopped", [False, True])
    def test_task_that_ends_before_the_loop_comes_to_it(self, conf: ConfigParser, *, stopped: bool) -> None:
        """The log tells of the signal, and nobody takes its end for a success; a stopped task hears of it, too."""
        with waiting(lead_session) as pid:
            process = Supervised(pid)
            if stopped:
                os.kill(pid, signal.SIGSTOP)
                os.waitid(os.P_PID, pid, os.WSTOPPED)
            with watch_stop_signals(process, conf):
                signal.raise_signal(signal.SIGTERM)
                process._exit_code = 0
            assert ended_by(pid) == signal.SIGTERM
        [(level, event, _)] = process.say()
        assert (level, "told to stop" in event) == ("warning", True)
        assert process._exit_watch.exit_expected

    @pytest.mark.parametrize(
        ("policy", "waits", "exit_code"),
        [(StopPolicy.FINISH, False, None), (StopPolicy.STOP, True, None), (StopPolicy.STOP, False, 0)],
    )
    def test_nothing_is_passed_on(
        self,
        conf: ConfigParser,
        mocker: MockerFixture,
        policy: StopPolicy,
        *,
        waits: bool,
        exit_code: int | None,
    ) -> None:
        """Not where the task may finish, nor by a loop that comes to it at once, nor to a task that has ended."""
        signalled = mocker.patch.object(stop_request, "signal_task", autospec=True)
        process = Supervised(policy=policy)
        process._exit_watch.is_waiting, process._exit_code = waits, exit_code
        with watch_stop_signals(process, conf):
            signal.raise_signal(signal.SIGTERM)
        signalled.assert_not_called()

    @pytest.mark.parametrize("spares", [False, True])
    def test_group_is_spared(self, conf: ConfigParser, mocker: MockerFixture, *, spares: bool) -> None:
        """The task's own process alone is signalled where others of its group may be spared."""
        group = mocker.patch.object(stop_request, "signal_task", autospec=True, return_value=True)
        alone = mocker.patch.object(stop_request, "signal_pid", autospec=True)
        process = Supervised()
        process._stop.spares_group_members = spares
        with watch_stop_signals(process, conf):
            signal.raise_signal(signal.SIGTERM)
        told_alone = [call.args for call in alone.mock_calls if signal.SIGCONT not in call.args]
        assert (group.called, bool(told_alone)) == (not spares, spares)

    def test_signal_between_wait_and_events(self, conf: ConfigParser) -> None:
        """The handler takes a loop for waiting that has just returned with a request, which may take a minute."""

        class Interrupting(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                events = super().select(timeout)
                signal.raise_signal(signal.SIGTERM)
                return events

        ours, theirs = socket.socketpair()
        with ours, theirs, waiting(lead_session) as pid, Interrupting() as selector:
            process = Supervised(pid)
            process.selector = selector
            process._exit_watch.start(selector, pid)
            selector.register(ours, selectors.EVENT_READ, lambda _: True)
            theirs.send(b".")
            with watch_stop_signals(process, conf):
                process._exit_watch.select(selector, timeout=PATIENCE, exit_code=None)
                assert process._stop.sigterm_sent
            assert ended_by(pid) == signal.SIGTERM
            process._exit_watch.close(selector)

    def test_heartbeat_that_hangs(self, conf: ConfigParser) -> None:
        """While a task has its grace the loop sends none, which may take longer than the grace: a thread does, one at a time."""
        process, asked, answer = Supervised(), threading.Event(), threading.Event()
        process._stop.kill_at = time.monotonic() + PATIENCE
        process._last_successful_heartbeat = -stop_request.HEARTBEAT_INTERVAL

        def hang(*_: Any, **__: Any) -> None:
            asked.set()
            answer.wait(PATIENCE)

        process.client.task_instances.heartbeat.side_effect = hang
        for _ in "ab":
            process._stop.heartbeat_sent_at = -stop_request.HEARTBEAT_INTERVAL
            heed_stop_signals(process, conf, send=Sent())
        assert asked.wait(PATIENCE)
        answer.set()
        process.await_heartbeat()
        process.client.task_instances.heartbeat.assert_called_once()
        assert process._last_heartbeat_attempt == math.inf, "none is ever due"


class TestSendHeartbeatIfDue:
    @pytest.mark.parametrize(
        ("state", "is_sent"), [(None, True), ("failed", True), ("success", False), ("deferred", False)]
    )
    def test_task_that_has_reported(self, state: str | None, *, is_sent: bool) -> None:
        """The server refuses the heartbeats of a task whose state it knows; of a failure it hears when all is over."""
        process = Supervised()
        process._last_successful_heartbeat = -stop_request.HEARTBEAT_INTERVAL
        process._terminal_state = state
        send_heartbeat_if_due(process)
        assert (process._stop.heartbeat is not None) is is_sent
        if is_sent:
            process.await_heartbeat()


class TestHeedRefusal:
    """The server has answered to a heartbeat of a thread that the task is not to run any more."""

    @pytest.fixture
    def process(self) -> Supervised:
        process = Supervised()
        process.client.task_instances.heartbeat.side_effect = conflict()
        send_heartbeat(process)
        return process

    def test_task_is_ended(self, process: Supervised) -> None:
        """The log says so once, and the state is that of a task whose heartbeat the loop has sent."""
        for _ in "ab":
            heed_refusal(process)
        [(level, _, fields)] = process.say()
        assert (level, fields["status"], fields["state"]) == ("warning", 409, "failed")
        assert process._stop.server_ended
        assert process._terminal_state == supervisor.SERVER_TERMINATED

    def test_loop(self, process: Supervised, conf: ConfigParser) -> None:
        """The loop notes it while the task has its grace period."""
        process._stop.kill_at = time.monotonic() + PATIENCE
        heed_stop_signals(process, conf, send=Sent())
        assert process._stop.server_ended

    def test_task_that_has_succeeded(self, process: Supervised) -> None:
        """The server then refuses heartbeats because of that."""
        process._terminal_state = "success"
        heed_refusal(process)
        assert process.say() == []
        assert not process._stop.server_ended
        assert process._terminal_state == "success"

    @pytest.mark.parametrize("error", [ConnectionError("away"), conflict(503), conflict_of_proxy()])
    def test_other_errors(self, error: Exception) -> None:
        """A server that is away, or a proxy that knows nothing of it, does not end a task."""
        process = Supervised()
        process.client.task_instances.heartbeat.side_effect = error
        send_heartbeat(process)
        heed_refusal(process)
        assert not process._stop.server_ended
        assert process._stop.refusal is None


class TestBeginRunner:
    def run(self, *steps: Any) -> int:
        """Be a runner with these steps; return its exit status, 0 if it gets beyond them."""
        pid = fork(lambda: begin_runner(*steps))
        with contextlib.closing(Tree()) as tree:
            assert tree.gone(tree.add(pid))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_steps(self) -> None:
        """The runner leads a session when its steps are taken, and goes on after them."""
        told = Relay()
        assert self.run(lambda: told.tell(os.getsid(0) == os.getpid()), lambda: told.tell("second")) == 0
        assert [told.hear(), told.hear()] == [True, "second"]
        told.close()

    @pytest.mark.parametrize("error", [RuntimeError, SystemExit(0), KeyboardInterrupt, GeneratorExit])
    def test_never_raises(self, error: Any) -> None:
        """The code after it is the supervisor's, of which the runner is a copy, and would go on as a second worker."""

        def fail() -> None:
            raise error

        assert self.run(fail) == RUNNER_FAILED == 124

    def test_never_raises_without_stderr(self, mocker: MockerFixture) -> None:
        """Also where it cannot say so."""

        def fail() -> None:
            raise OSError

        mocker.patch("traceback.print_exc", autospec=True, side_effect=OSError)
        assert self.run(fail) == RUNNER_FAILED

    def test_handlers_of_the_supervisor_are_dropped(self) -> None:
        """Signals end the runner, those that are ignored excepted, and are not told to its supervisor."""
        told = Relay()

        def tell() -> None:
            told.tell([signal.getsignal(signum) == signal.SIG_DFL for signum in STOP_SIGNALS])
            told.tell([signal.set_wakeup_fd(-1), find_caught() is None])

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with catch_stop_signals():
            assert self.run(tell) == 0
        assert told.hear() == [signum != signal.SIGINT for signum in STOP_SIGNALS]
        assert told.hear() == [-1, True]
        told.close()

    def test_descriptors_of_the_supervisor_are_closed(self) -> None:
        """A task starts with as many as without the sockets that wake its supervisor."""
        told = Relay()
        for around in (contextlib.nullcontext, catch_stop_signals):
            with around():
                assert self.run(lambda: told.tell(list_descriptors())) == 0
        assert told.hear() == told.hear()
        told.close()

    def test_handler_that_was_inherited(self) -> None:
        """One that the supervisor's own parent had, and catch_stop_signals() has not replaced, is dropped as well."""
        told = Relay()
        signal.signal(signal.SIGHUP, lambda *_: told.tell("handled"))
        with waiting(begin_runner) as pid:
            os.kill(pid, signal.SIGHUP)
            assert ended_by(pid) == signal.SIGHUP
        told.close()


class TestHeedStopSignals:
    @pytest.fixture
    def clock(self, mocker: MockerFixture) -> Any:
        return mocker.patch.object(stop_request.time, "monotonic", autospec=True, return_value=100.0)

    @pytest.fixture(autouse=True)
    def caught(self) -> Iterator[None]:
        with catch_stop_signals():
            yield

    def test_nothing_has_come(self, conf: ConfigParser) -> None:
        """The loop comes by all the time, mostly for other reasons."""
        process, sent = Supervised(), Sent()
        with structlog.testing.capture_logs() as logs:
            heed_stop_signals(process, conf, send=sent)
        assert (sent, logs, process.say()) == ([], [], [])
        assert not process._exit_watch.exit_expected

    @pytest.mark.parametrize("signum", STOP_SIGNALS)
    @pytest.mark.parametrize("new_session", [False, True])
    def test_task_gets_sigterm(
        self, conf: ConfigParser, signum: signal.Signals, *, new_session: bool
    ) -> None:
        """Whatever has come, the task gets SIGTERM, for which it has an ``on_kill``, with or without a session."""
        with waiting(lead_session if new_session else lambda: None) as pid:
            signal.raise_signal(signum)
            process = Supervised(pid, new_session=new_session)
            heed_stop_signals(process, conf, send=signal_task)
            assert ended_by(pid) == signal.SIGTERM
            assert process._exit_watch.exit_expected

    def test_one_request(self, conf: ConfigParser) -> None:
        """Signals that come later change nothing, and are not logged."""
        process, sent = Supervised(), Sent()
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                heed_stop_signals(process, conf, send=sent)
        assert sent == [signal.SIGTERM]
        assert len(logs) == len(process.say()) == 1

    def test_both_logs_tell(self, conf: ConfigParser) -> None:
        """The supervisor's log names the task, the task's log the signal."""
        process = Supervised(4711)
        signal.raise_signal(signal.SIGHUP)
        with structlog.testing.capture_logs() as logs:
            heed_stop_signals(process, conf, send=Sent())
        [entry] = logs
        assert (entry["log_level"], entry["signal"], entry["pid"]) == ("info", "SIGHUP", 4711)
        assert "stopping the task" in entry["event"]
        assert process.say() == [("warning", entry["event"], {"signal": "SIGHUP"})]

    @pytest.mark.parametrize(("option", "grace"), [(None, 60), ("17", 17)])
    def test_grace(self, conf: ConfigParser, clock: Any, option: str | None, grace: float) -> None:
        """The task is killed once its grace is over, which is a minute unless the deployment sets it, and only once."""
        if option:
            conf.read_dict({"core": {"killed_task_cleanup_time": option}})
        process, sent = Supervised(), Sent()
        signal.raise_signal(signal.SIGTERM)
        heed_stop_signals(process, conf, send=sent)
        assert process._exit_watch.grace_ends(default=0) == process._exit_watch._wake_at == 100 + grace
        clock.return_value = 99.9 + grace
        heed_stop_signals(process, conf, send=sent)
        assert process.killed == []
        clock.return_value = 100.0 + grace
        for _ in "ab":
            heed_stop_signals(process, conf, send=sent)
        assert process.killed == [(signal.SIGKILL, True)]
        assert sent == [signal.SIGTERM]

    def test_kill_in_vain(self, conf: ConfigParser, clock: Any) -> None:
        """A task that could not be killed is killed again, and until then the server hears that it still runs."""
        process, sent = Supervised(), Sent()
        signal.raise_signal(signal.SIGTERM)
        heed_stop_signals(process, conf, send=sent)
        clock.return_value += STOP_GRACE
        for kills in (1, 2):
            heed_stop_signals(process, conf, send=sent)
            assert process.killed == [(signal.SIGKILL, True)] * kills
            process.await_heartbeat()
            process.client.task_instances.heartbeat.reset_mock()
            clock.return_value += KILL_INTERVAL - 1
            heed_stop_signals(process, conf, send=sent)
            process.await_heartbeat()
            process.client.task_instances.heartbeat.assert_called_once()
            clock.return_value += 1
        process._exit_code = -signal.SIGKILL
        heed_stop_signals(process, conf, send=sent)
        assert process._stop.kill_at is None

    def test_finish(self, conf: ConfigParser) -> None:
        """Where the task is to finish, both logs say so, once, and it is sent nothing."""
        process, sent = Supervised(policy=StopPolicy.FINISH), Sent()
        with structlog.testing.capture_logs() as logs:
            for _ in "ab":
                signal.raise_signal(signal.SIGTERM)
                heed_stop_signals(process, conf, send=sent)
        assert sent == []
        assert not process._exit_watch.exit_expected
        [entry] = logs
        assert "lets the task finish" in entry["event"]
        assert process.say() == [("info", entry["event"], {"signal": "SIGTERM"})]

    @pytest.mark.parametrize("policy", StopPolicy)
    def test_deployment_chooses(self, conf: ConfigParser, policy: StopPolicy) -> None:
        """What the deployment sets counts, whatever the release has as its default."""
        [default] = set(StopPolicy) - {policy}
        conf.read_dict({"workers": {"stop_signal_policy": policy.value}})
        process, sent = Supervised(policy=default), Sent()
        signal.raise_signal(signal.SIGTERM)
        heed_stop_signals(process, conf, send=sent)
        assert bool(sent) is (policy is StopPolicy.STOP)

    @pytest.mark.parametrize("policy", StopPolicy)
    def test_sockets_of_an_exited_task(self, conf: ConfigParser, policy: StopPolicy) -> None:
        """Whoever holds them keeps a supervisor that was told to stop no longer, and the log says that it was told."""
        process, sent = Supervised(policy=policy), Sent()
        process._exit_code = 0
        assert not process._exit_watch.sockets_overdue(0)
        signal.raise_signal(signal.SIGTERM)
        heed_stop_signals(process, conf, send=sent)
        assert sent == []
        assert not process._exit_watch.exit_expected, "it was not asked to end"
        assert process._exit_watch.sockets_overdue(0) is (policy is StopPolicy.STOP)
        assert len(process.say()) == 1

    def test_two_tasks(self, conf: ConfigParser) -> None:
        """A supervisor of several tasks, as a test may be, stops each."""
        signal.raise_signal(signal.SIGTERM)
        for _ in "ab":
            sent = Sent()
            heed_stop_signals(Supervised(), conf, send=sent)
            assert sent == [signal.SIGTERM]


class TestSignalPid:
    @pytest.mark.parametrize("pid", [-1, 0, 1])
    def test_number_of_many(self, mocker: MockerFixture, pid: int) -> None:
        """Neither everybody, nor the supervisor's own group, nor init is signalled, whatever has made up the number."""
        kill = mocker.patch("os.kill", autospec=True)
        mocker.patch.object(stop_request, "is_unreaped_child", autospec=True, return_value=True)
        signal_pid(pid)
        kill.assert_not_called()

    def test_child(self) -> None:
        """A child of ours gets it."""
        with waiting(lambda: None) as pid:
            signal_pid(pid)
            assert ended_by(pid) == signal.SIGTERM

    def test_reaped_child(self, mocker: MockerFixture) -> None:
        """The number of a child that was collected may be another's."""
        with waiting(lambda: None) as pid:
            kill_child(pid)
        kill = mocker.patch("os.kill", autospec=True)
        signal_pid(pid)
        kill.assert_not_called()

    @pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
    def test_refused(self, mocker: MockerFixture, error: type[Exception]) -> None:
        """A child that is gone, or that may not be signalled, is nothing that the supervisor dies of."""
        with waiting(lambda: None) as pid:
            mocker.patch("os.kill", autospec=True, side_effect=error)
            signal_pid(pid)
            mocker.stopall()


class TestNotes:
    """The task's log says who has asked for the task's end."""

    @pytest.mark.parametrize(
        ("detail", "reason", "state"),
        [
            ({"reason": "not_running", "current_state": "failed"}, "not_running", "failed"),
            ({"detail": {"reason": "not_running", "current_state": "failed"}}, "not_running", "failed"),
            ({"detail": "gone"}, None, None),
            ("Task Instance not found", None, None),
            (None, None, None),
        ],
    )
    def test_server(self, detail: Any, reason: str | None, state: str | None) -> None:
        """The API server, with its status, and with reason and state where it gives them, in whatever form."""
        process = Supervised()
        error = conflict()
        error.detail = detail
        note_server_ended(process, error)
        [(level, _, fields)] = process.say()
        assert (level, fields) == ("warning", {"status": 409, "reason": reason, "state": state})
        assert process._stop.server_ended

    @pytest.mark.parametrize(
        ("error", "told"), [(ConnectionError("away"), "ConnectionError('away')"), (None, None)]
    )
    def test_failed_heartbeats(self, error: Exception | None, told: str | None) -> None:
        """Heartbeats that have failed: how many, and how the last one did."""
        process = Supervised()
        process.failed_heartbeats = 3
        note_failed_heartbeats(process, error)
        [(level, _, fields)] = process.say()
        assert (level, fields) == ("error", {"failed_heartbeats": 3, "last_error": told})
        assert not process._stop.server_ended

    def test_overtime(self, mocker: MockerFixture) -> None:
        """The overtime that the deployment allows."""
        mocker.patch.object(stop_request.time, "monotonic", autospec=True, return_value=125.2)
        process = Supervised()
        process._task_end_time_monotonic = 100.0
        note_overtime(process)
        [(level, _, fields)] = process.say()
        assert (level, fields) == ("warning", {"seconds": 25, "limit": "[core] task_success_overtime"})


def test_supervisor_can_be_imported_on_windows() -> None:
    """Nothing of Unix is needed before a task starts, as before: the modules of Dags import the supervisor."""
    subprocess.run([sys.executable, "-c", WITHOUT_UNIX], check=True)
