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
import itertools
import os
import selectors
import signal
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    NEVER,
    MadeUpTask,
    Relay,
    Tree,
    conflict,
    fork,
    forked,
    pause_for_ever,
    waiting,
)

from airflow.sdk.execution_time.comms import RetryTask, SucceedTask
from airflow.sdk.execution_time.teardown import ending, leftovers, stop_request
from airflow.sdk.execution_time.teardown.ending import KILL_TIME
from airflow.sdk.execution_time.teardown.exit_status import is_unreaped_child
from airflow.sdk.execution_time.teardown.leftovers import (
    NAMED_IN_LOG,
    end_leftovers,
    end_on_exception,
    end_unless_started,
    handle_request_of_tree,
    prepare_kill,
    signal_tree,
)
from airflow.sdk.execution_time.teardown.policy import GRACE, MAX_GRACE, MIN_GRACE, StopPolicy
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.processes import Process
from airflow.sdk.execution_time.teardown.stop_request import catch_stop_signals

if TYPE_CHECKING:
    from collections.abc import Callable
    from configparser import ConfigParser

    from pytest_mock import MockerFixture

SOME_DAY = datetime(2026, 1, 1, tzinfo=timezone.utc)
STUBBORN = Process(pid=2**22 + 1, start=1, name="stubborn", parent=1, session=1, stopped=False, dead=False)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("", "_CMD", "_SECRET"):
        monkeypatch.delenv(f"AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME{suffix}", raising=False)


def longest_gap(times: list[float]) -> float:
    """Return the longest time between two events that follow one another."""
    return max(times[i] - times[i - 1] for i in range(1, len(times)))


@pytest.fixture
def process(mocker: MockerFixture) -> Any:
    """Return a task whose tree has one member that nothing ends; real processes cannot be that."""
    tree = mocker.create_autospec(ProcessTree, instance=True, sudo_failures={}, look_failure=None)
    tree.configure_mock(end_signals={}, spared=frozenset(), ends_leftovers=True)
    tree.find.return_value = tree.kill_all.return_value = [STUBBORN]
    selector = mocker.create_autospec(selectors.DefaultSelector, instance=True)
    selector.select.return_value = []
    alive = mocker.patch.object(leftovers, "is_alive", autospec=True, return_value=True)
    mocker.patch.object(ending, "is_alive", alive)
    mocker.patch.object(leftovers, "is_unreaped_child", autospec=True, return_value=True)
    task = MadeUpTask(
        selector=selector,
        _last_successful_heartbeat=1.0,
        _new_session=True,
        _stop_policy=StopPolicy.STOP,
        _tree=tree,
    )
    mocker.patch.object(task, "_handle_request", autospec=True)
    mocker.patch.object(task, "_service_subprocess", autospec=True, return_value=None)
    return task


class TestGrace:
    @pytest.mark.parametrize("option", [None, "17", "60"])
    def test_kill_by_others_than_the_server(
        self, conf: ConfigParser, process: Any, option: str | None
    ) -> None:
        """A caller of kill() gets the grace that it names: 5 s after failed heartbeats, whatever the option says."""
        if option:
            conf.read_dict({"core": {"killed_task_cleanup_time": option}})
        assert prepare_kill(process, GRACE, conf) == GRACE
        assert process._exit_watch.grace_ends(default=NEVER) <= time.monotonic() + GRACE

    @pytest.mark.parametrize(("option", "grace"), [(None, 5), ("17", 17), ("60", 60), ("soon", 5)])
    def test_kill_because_the_server_has_ended_the_task(
        self, conf: ConfigParser, process: Any, option: str | None, grace: float
    ) -> None:
        """What the deployment has set counts."""
        if option:
            conf.read_dict({"core": {"killed_task_cleanup_time": option}})
        process._stop.server_ended = True
        assert prepare_kill(process, GRACE, conf) == grace

    @pytest.mark.parametrize(("grace", "limited"), [(0, MIN_GRACE), (float("inf"), MAX_GRACE)])
    def test_limits(self, conf: ConfigParser, process: Any, grace: float, limited: float) -> None:
        """kill() collects nobody without a grace, and cannot wait for ever."""
        assert prepare_kill(process, grace, conf) == limited

    def test_other_types(self, conf: ConfigParser, process: Any) -> None:
        """Without a session of its own a process is killed as ever."""
        conf.read_dict({"core": {"killed_task_cleanup_time": "17"}})
        process._new_session = False
        process._stop.server_ended = True
        assert prepare_kill(process, 0, conf) == 0
        process._tree.remember.assert_not_called()


class Clock:
    """Time that passes only while somebody waits, and as long as that says, however busy the machine is."""

    def __init__(self, mocker: MockerFixture, process: Any) -> None:
        self._now = mocker.patch.object(leftovers.time, "monotonic", autospec=True, return_value=100.0)
        mocker.patch.object(leftovers.time, "sleep", autospec=True, side_effect=self.wait)
        self.meanwhile: Callable[[], Any] = lambda: None
        process._service_subprocess.side_effect = self.wait
        process._last_heartbeat_attempt = 100.0

    @property
    def passed(self) -> float:
        passed: float = self._now.return_value - 100
        return passed

    def wait(self, max_wait_time: float) -> None:
        self._now.return_value += max_wait_time
        self.meanwhile()


@pytest.fixture
def clock(mocker: MockerFixture, process: Any) -> Clock:
    return Clock(mocker, process)


@pytest.mark.usefixtures("clock")
class TestSurvivors:
    @pytest.mark.parametrize(
        "why",
        [
            (4711, "SIGKILL", "after SIGKILL"),
            (4711, "SIGTERM", "no SIGKILL"),
            (4712, "SIGTERM", "a password is required"),
        ],
    )
    def test_survivor_is_named(
        self, conf: ConfigParser, process: Any, mocker: MockerFixture, why: tuple[int, str, str]
    ) -> None:
        """What cannot be ended is named once, with its own reason, and the supervisor goes on."""
        refused, sent, reason = why
        owners = mocker.patch.object(leftovers, "group_by_owner", autospec=True)
        owners.return_value = {4712: [STUBBORN]}
        process._tree.sudo_failures = {refused: "a password is required"}
        process._tree.end_signals = {STUBBORN: sent}
        assert end_leftovers(process, -9, conf) == -9
        [call] = process.process_log.calls
        assert call.method_name == "error"
        assert call.kwargs["processes"] == [{"pid": STUBBORN.pid, "name": "stubborn"}]
        assert reason in call.kwargs["reason"]

    def test_survivor_that_cannot_be_looked_for(self, conf: ConfigParser, process: Any) -> None:
        """Nobody is said to have ended whom a look that fails has merely not found."""

        def fail(*_: Any, **__: Any) -> list[Process]:
            process._tree.look_failure = "Too many open files"
            process._tree.end_signals = {STUBBORN: "SIGTERM"}
            return []

        process._tree.kill_all.side_effect = fail
        end_leftovers(process, -9, conf)
        assert [call.method_name for call in process.process_log.calls] == ["error", "error"]

    def test_survivor_that_came_late(self, conf: ConfigParser, process: Any) -> None:
        """What a process has started between the last look and its own end is killed, and named if it stays."""
        late = replace(STUBBORN, pid=STUBBORN.pid + 1)
        process._tree.find.return_value = [STUBBORN, late]
        end_leftovers(process, -9, conf)
        process._tree.signal.assert_called_with([late], signal.SIGKILL)
        [call] = process.process_log.calls
        assert [named["pid"] for named in call.kwargs["processes"]] == [STUBBORN.pid, late.pid]

    def test_survivor_that_a_late_one_has_started(
        self, conf: ConfigParser, process: Any, clock: Clock
    ) -> None:
        """On a busy machine a late one, too, starts something before it is killed; the time is kept all the same."""
        crowd = [replace(STUBBORN, pid=STUBBORN.pid + number) for number in range(3)]
        looks = iter([crowd[:2], crowd, crowd])
        process._tree.find.side_effect = lambda **_: (
            next(looks) if process._tree.kill_all.called else [STUBBORN]
        )
        end_leftovers(process, -9, conf)
        process._tree.signal.assert_called_with(crowd[2:], signal.SIGKILL)
        [call] = process.process_log.calls
        assert [named["pid"] for named in call.kwargs["processes"]] == [member.pid for member in crowd]
        assert clock.passed <= GRACE + 1

    def test_time(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """A second after the grace nobody is waited for any longer."""
        end_leftovers(process, -9, conf)
        assert GRACE < clock.passed <= GRACE + 1

    def test_looks_for_what_others_start(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """While one does not die, all are looked for, and killed, time and again."""
        killed_at: list[float] = []

        def kill_all(*_: Any, **__: Any) -> list[Process]:
            killed_at.append(clock.passed)
            return [STUBBORN]

        process._tree.kill_all.side_effect = kill_all
        end_leftovers(process, -9, conf)
        assert len(killed_at) >= 3
        assert longest_gap(killed_at) < 0.5

    def test_looks_that_fail_for_a_while(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """What could not be looked for when the grace was over is killed when it can be."""

        def kill_all(*_: Any, **__: Any) -> list[Process]:
            fails = clock.passed < GRACE + 0.3
            process._tree.look_failure = "Too many open files" if fails else None
            killed.extend([] if fails else [clock.passed])
            return [] if fails else [STUBBORN]

        killed: list[float] = []
        process._tree.kill_all.side_effect = kill_all
        end_leftovers(process, -9, conf)
        assert killed

    def test_relay_without_end(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """Of processes that replace one another until the time is up, and are gone when they are signalled, one is named."""
        numbers = itertools.count()
        process._tree.find.side_effect = lambda **_: [replace(STUBBORN, start=next(numbers))]
        is_alive: Any = leftovers.is_alive
        is_alive.side_effect = lambda _: clock.passed < GRACE + KILL_TIME
        end_leftovers(process, -9, conf)
        [call] = process.process_log.calls
        assert call.method_name == "error"
        assert call.kwargs["count"] == 1

    def test_log_line_has_an_end(self, conf: ConfigParser, process: Any) -> None:
        """A hundred processes are named, of those that have ended and of those that have not, and all are counted."""
        crowd = [replace(STUBBORN, pid=STUBBORN.pid + number) for number in range(250)]
        process._tree.kill_all.return_value = process._tree.find.return_value = crowd[:120]
        process._tree.end_signals = dict.fromkeys(crowd, "SIGKILL")
        end_leftovers(process, -9, conf)
        counts = [(call.kwargs["count"], len(call.kwargs["processes"])) for call in process.process_log.calls]
        assert counts == [(130, NAMED_IN_LOG), (120, NAMED_IN_LOG)]

    def test_nobody_is_said_to_have_ended_who_has_not(self, conf: ConfigParser, process: Any) -> None:
        """A survivor was asked to end, and killed, like those that have ended, and is named among survivors alone."""
        gone = replace(STUBBORN, pid=STUBBORN.pid + 1)
        process._tree.end_signals = {STUBBORN: "SIGKILL", gone: "SIGTERM"}
        end_leftovers(process, -9, conf)
        named = [[named["pid"] for named in call.kwargs["processes"]] for call in process.process_log.calls]
        assert named == [[gone.pid], [STUBBORN.pid]]

    def test_ended_is_told_once(self, conf: ConfigParser, process: Any) -> None:
        """What was ended is not told of again, as when kill() comes after the end."""
        process._tree.find.return_value = process._tree.kill_all.return_value = []
        process._tree.end_signals = {STUBBORN: "SIGTERM"}
        for _ in "ab":
            end_leftovers(process, -9, conf)
        [call] = process.process_log.calls
        assert call.kwargs["count"] == 1

    def test_message_that_cannot_be_handled(self, conf: ConfigParser, process: Any) -> None:
        """What goes wrong with a request of the task does not end the teardown."""
        process._service_subprocess.side_effect = RuntimeError
        with structlog.testing.capture_logs():
            assert end_leftovers(process, -9, conf) == -9
        assert process._service_subprocess.called
        assert process._tree.kill_all.called

    def test_sockets_are_given_up(self, conf: ConfigParser, process: Any) -> None:
        """Whoever is left may hold them for as long as it likes, but the time is up."""
        end_leftovers(process, -9, conf)
        assert process._exit_watch.sockets_overdue(-9)
        assert process._exit_watch.exit_expected
        assert process._exit_watch.grace_ends(default=60) <= time.monotonic()
        process._exit_watch._started = True
        assert process._exit_watch._limit(60, process.selector, -9) == 0, "nobody is followed any more"

    def test_next_look_has_the_descriptor_of_the_wait(self, conf: ConfigParser, process: Any) -> None:
        """The file descriptor by which one is waited for may be the last one, which the next look needs."""
        own = replace(STUBBORN, pid=os.getpid())  # which a tree that is a mock does not signal
        held: list[int] = []

        def look(*_: Any, **__: Any) -> list[Process]:
            # Not all descriptors: the garbage collector may close what an earlier test has left to it.
            texts = [path.read_text() for path in Path("/proc/self/fdinfo").iterdir() if path.exists()]
            held.append(sum(f"Pid:\t{own.pid}\n" in text for text in texts))
            return [own]

        process._tree.find.side_effect = process._tree.kill_all.side_effect = look
        end_leftovers(process, -9, conf)
        assert len(held) > 2
        assert set(held) == {0}


class TestTerminate:
    """The grace of what a task has left."""

    def test_look_that_fails(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """One that cannot be taken has found nobody, which does not mean that nobody is there to be asked."""
        looks = []

        def fail_once(**_: Any) -> list[Process]:
            looks.append(clock.passed)
            process._tree.look_failure = "Too many open files" if len(looks) == 1 else None
            return [] if len(looks) == 1 else [STUBBORN]

        process._tree.find.side_effect = fail_once
        end_leftovers(process, -9, conf)
        asked = [call.args for call in process._tree.signal.mock_calls]
        assert ([STUBBORN], signal.SIGTERM, signal.SIGCONT) in asked
        assert clock.passed >= GRACE

    def test_looks_that_all_fail(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """They are repeated until the grace is over, and no longer."""
        process._tree.find.return_value = process._tree.kill_all.return_value = []
        process._tree.look_failure = "Too many open files"
        end_leftovers(process, -9, conf)
        assert GRACE <= clock.passed < GRACE + 1

    def test_grace_of_a_kill(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """What the runner has left of the grace of a kill is all that its leftovers have."""
        process._exit_watch.expect_exit(2)
        end_leftovers(process, -9, conf)
        assert 2 <= clock.passed <= 3

    def test_nobody(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """Nobody is waited for where nobody is."""
        process._tree.find.return_value = process._tree.kill_all.return_value = []
        end_leftovers(process, -9, conf)
        assert clock.passed == 0
        assert process.process_log.calls == []

    def test_everybody_is_asked_once(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """What comes while another is deaf is asked to end, too, and nobody twice."""
        late = replace(STUBBORN, pid=STUBBORN.pid + 1)

        def appear() -> None:
            process._tree.find.return_value = [STUBBORN, late]

        clock.meanwhile = appear
        end_leftovers(process, -9, conf)
        asked = [call.args[0] for call in process._tree.signal.mock_calls if signal.SIGTERM in call.args]
        assert asked == [[STUBBORN], [late], *[[]] * (len(asked) - 2)]

    def test_what_appears_is_asked_soon(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """While one is deaf, there is a look every half second for what others start."""
        looked_at: list[float] = []

        def look(**_: Any) -> list[Process]:
            if clock.passed < GRACE:
                looked_at.append(clock.passed)
            return [STUBBORN]

        process._tree.find.side_effect = look
        end_leftovers(process, -9, conf)
        assert longest_gap(looked_at) <= 1

    def test_told_to_stop(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """A supervisor that is told to stop ends the grace: whoever has told it may kill it soon. Both logs say so."""
        conf.read_dict({"core": {"killed_task_cleanup_time": "60"}})
        clock.meanwhile = lambda: signal.raise_signal(signal.SIGTERM)
        with structlog.testing.capture_logs() as logs, catch_stop_signals():
            end_leftovers(process, -9, conf)
        assert clock.passed < GRACE
        told = [call for call in process.process_log.calls if "told to stop" in call.args[0]]
        assert len(told) == len(logs) == 1

    def test_told_to_finish(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """One that is to let its task finish lets leftovers have their grace."""
        process._stop_policy = StopPolicy.FINISH
        clock.meanwhile = lambda: signal.raise_signal(signal.SIGTERM)
        with catch_stop_signals():
            end_leftovers(process, -9, conf)
        assert clock.passed >= GRACE

    @pytest.mark.parametrize(("pending", "grace"), [(None, 1), (RetryTask(end_date=SOME_DAY), GRACE)])
    def test_told_retry(
        self, conf: ConfigParser, process: Any, clock: Clock, pending: RetryTask | None, grace: float
    ) -> None:
        """A retry that the server knows of may start at any moment, and what the try has left has little time."""
        process._terminal_state = "up_for_retry"
        process._pending_terminal_state_msg = pending  # which not every release has
        end_leftovers(process, 0, conf)
        assert grace <= clock.passed < grace + 1.5


class TestHeartbeats:
    """While leftovers end the server is told that the task is not over: it would start a retry beside them."""

    @pytest.fixture(autouse=True)
    def long_grace(self, conf: ConfigParser, clock: Clock) -> None:
        conf.read_dict({"core": {"killed_task_cleanup_time": "60"}})

    @pytest.fixture(autouse=True)
    def in_foreground(self, mocker: MockerFixture) -> None:
        """Have each be over when the clock goes on, which only waits for the supervisor."""
        mocker.patch.object(
            stop_request, "beat_in_background", autospec=True, side_effect=stop_request.send_heartbeat
        )

    @pytest.fixture
    def heartbeat(self, process: Any) -> Any:
        return process.client.task_instances.heartbeat

    def test_sent(self, conf: ConfigParser, process: Any, clock: Clock, heartbeat: Any) -> None:
        """They are sent as long as leftovers have their grace."""
        end_leftovers(process, -9, conf)
        heartbeat.assert_called_with(process.id, pid=process.pid)
        assert heartbeat.call_count >= 10, "every five seconds, or a look later"
        assert heartbeat.call_count <= clock.passed / 5 + 1, "the first one at once"

    def test_task_that_the_server_has_ended(self, conf: ConfigParser, process: Any, heartbeat: Any) -> None:
        """The server knows of that."""
        process._stop.server_ended = True
        end_leftovers(process, -9, conf)
        heartbeat.assert_not_called()

    def test_server_that_is_away(self, conf: ConfigParser, process: Any, heartbeat: Any) -> None:
        """They go on after one has failed: the server may be back before it starts a retry."""
        heartbeat.side_effect = ConnectionError("away")
        process.failed_heartbeats = 1
        assert end_leftovers(process, -9, conf) == -9
        assert heartbeat.call_count >= 10

    @pytest.mark.parametrize("status", [404, 409, 410])
    def test_task_that_is_ended_meanwhile(
        self, conf: ConfigParser, process: Any, heartbeat: Any, status: int
    ) -> None:
        """None is sent after one that the server has refused."""
        heartbeat.side_effect = conflict(status)
        end_leftovers(process, -9, conf)
        heartbeat.assert_called_once()

    def test_other_answers(self, conf: ConfigParser, process: Any, heartbeat: Any) -> None:
        """They go on after any other answer."""
        heartbeat.side_effect = conflict(503)
        end_leftovers(process, -9, conf)
        assert heartbeat.call_count >= 10

    def test_task_that_was_not_let_start(self, conf: ConfigParser, process: Any, heartbeat: Any) -> None:
        """The server has refused it, and knows of no heartbeat of its."""
        process._last_successful_heartbeat = 0
        end_leftovers(process, -9, conf)
        heartbeat.assert_not_called()


class TestSignalWhileKilling:
    def test_dying_process_is_no_survivor(
        self, conf: ConfigParser, process: Any, clock: Clock, mocker: MockerFixture
    ) -> None:
        """A signal just after SIGKILL leaves what was killed the time to die."""
        kill_all = process._tree.kill_all
        mocker.patch.object(
            leftovers, "hear_stop_signal", autospec=True, side_effect=lambda *_: kill_all.called
        )
        dies_at = GRACE + 0.1
        is_alive: Any = leftovers.is_alive
        is_alive.side_effect = lambda _: clock.passed < dies_at
        kill_all.side_effect = [[STUBBORN], []]
        end_leftovers(process, -9, conf)
        assert clock.passed >= dies_at
        assert [call for call in process.process_log.calls if call.method_name == "error"] == []


class TestUnseenLeader:
    def test_no_look_can_succeed(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """Where /proc does not show the task, leftovers have no grace: nobody could be found when it is over."""
        process._tree.leader = None
        process._tree.look_failure = "hidden"
        process._tree.find.return_value = process._tree.kill_all.return_value = []
        end_leftovers(process, 1, conf)
        assert clock.passed < 1
        assert [call.kwargs["reason"] for call in process.process_log.calls] == ["hidden"]


class TestTold:
    """What a task has told decides what becomes of what it has left, whatever exit code follows."""

    @pytest.mark.parametrize("state", ["success", "skipped", "deferred", "up_for_reschedule"])
    @pytest.mark.parametrize("exit_code", [0, 1, -9, -11])
    def test_good_state_stands(self, conf: ConfigParser, process: Any, state: str, exit_code: int) -> None:
        """A crash in an atexit hook comes after it, or a kill for overtime: what was left on purpose stays."""
        process._terminal_state = state
        process._exit_watch.expect_exit(GRACE)
        assert end_leftovers(process, exit_code, conf) == exit_code
        assert not process._tree.mock_calls

    @pytest.mark.parametrize("state", ["failed", "up_for_retry"])
    @pytest.mark.usefixtures("clock")
    def test_failure(self, conf: ConfigParser, process: Any, state: str) -> None:
        """A task that has told its failure exits with 0, and leaves nothing."""
        process._terminal_state = state
        end_leftovers(process, 0, conf)
        assert process._tree.kill_all.called

    @pytest.mark.usefixtures("clock")
    def test_task_that_the_server_has_ended(self, conf: ConfigParser, process: Any) -> None:
        """A task whose state the server does not want leaves nothing, whatever it says."""
        process._stop.server_ended = True
        process._terminal_state = "success"
        end_leftovers(process, 0, conf)
        assert process._tree.kill_all.called

    def test_last_words(self, conf: ConfigParser, process: Any) -> None:
        """What a runner has said before it exited is heard before anything is ended."""
        process.selector.select.side_effect = [["a message"], []]
        process._service_subprocess.side_effect = lambda **_: setattr(process, "_terminal_state", "success")
        assert end_leftovers(process, 1, conf) == 1
        assert not process._tree.mock_calls

    @pytest.mark.usefixtures("clock")
    def test_silence_after_a_stop(self, conf: ConfigParser, process: Any) -> None:
        """A runner that was told to stop, and exits with 0 without a word, leaves nothing."""
        process._exit_watch.expect_exit(GRACE)
        assert end_leftovers(process, 0, conf) == 0
        assert process._tree.kill_all.called

    @pytest.mark.parametrize(
        ("name", "noted"), [("TaskState", True), ("SucceedTask", True), ("GetXCom", False)]
    )
    @pytest.mark.parametrize("new_session", [False, True])
    def test_tree_of_a_report(self, process: Any, name: str, *, noted: bool, new_session: bool) -> None:
        """A task that reports how it ends has its tree noted, for its runner ends soon."""
        msg = type(name, (), {})()
        process._new_session = new_session
        handle_request_of_tree(process, msg, process.process_log, 7)
        process._handle_request.assert_called_once_with(msg, process.process_log, 7)
        assert process._tree.remember.called is (noted and new_session)


class TestPolicies:
    """When leftovers are ended is the deployment's choice."""

    @pytest.mark.parametrize(
        ("policy", "exit_code", "ended"),
        [
            ("always", 1, True),
            ("always", -9, True),
            ("killed", 1, False),
            ("killed", -9, True),
            ("report", 1, False),
            ("report", -9, False),
            ("never", 1, False),
            ("never", -9, False),
            ("sometimes", 1, True),
        ],
    )
    @pytest.mark.usefixtures("clock")
    def test_ended(
        self, conf: ConfigParser, process: Any, policy: str, exit_code: int, *, ended: bool
    ) -> None:
        """Whoever wants it has what a failure of its own leaves stay, or what any end does."""
        conf.read_dict({"workers": {"leftover_policy": policy}})
        assert end_leftovers(process, exit_code, conf) == exit_code
        assert process._tree.kill_all.called is process._tree.signal.called is ended

    @pytest.mark.usefixtures("clock")
    def test_killed_on_request(self, conf: ConfigParser, process: Any) -> None:
        """A task that was told to stop is one that was killed, however it exits."""
        conf.read_dict({"workers": {"leftover_policy": "killed"}})
        process._exit_watch.expect_exit(GRACE)
        end_leftovers(process, 1, conf)
        assert process._tree.kill_all.called

    def test_report(self, conf: ConfigParser, process: Any) -> None:
        """The task's log tells what would be ended, by PID and name."""
        conf.read_dict({"workers": {"leftover_policy": "report"}})
        end_leftovers(process, -9, conf)
        [call] = process.process_log.calls
        assert call.method_name == "warning"
        assert call.kwargs == {"count": 1, "processes": [{"pid": STUBBORN.pid, "name": "stubborn"}]}

    @pytest.mark.parametrize("policy", ["report", "never"])
    def test_nothing_to_report(self, conf: ConfigParser, process: Any, policy: str) -> None:
        """The log is silent where nothing is left, or nobody wants to know."""
        conf.read_dict({"workers": {"leftover_policy": policy}})
        process._tree.find.return_value = []
        end_leftovers(process, -9, conf)
        assert process.process_log.calls == []

    @pytest.mark.parametrize(
        ("policy", "ends"), [("always", True), ("killed", True), ("report", False), ("never", False)]
    )
    def test_kill(self, conf: ConfigParser, process: Any, policy: str, *, ends: bool) -> None:
        """The SIGKILL of a kill goes to all of the tree only where that is to be ended."""
        conf.read_dict({"workers": {"leftover_policy": policy}})
        prepare_kill(process, GRACE, conf)
        assert process._tree.ends_leftovers is ends
        signal_tree(process, signal.SIGKILL)
        assert process._tree.kill_all.called is ends

    def test_tree_knows_whom_to_spare(self, conf: ConfigParser, process: Any) -> None:
        """It is told before the first signal of a kill, and before leftovers are looked for."""
        conf.read_dict({"workers": {"spared_leftovers": "ssh, gpg-agent"}})
        prepare_kill(process, GRACE, conf)
        assert process._tree.spared == {"ssh", "gpg-agent"}
        process._tree.spared = frozenset()
        process._tree.find.return_value = process._tree.kill_all.return_value = []
        end_leftovers(process, -9, conf)
        assert process._tree.spared == {"ssh", "gpg-agent"}

    @pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
    @pytest.mark.parametrize("spared", [frozenset(), frozenset({"ssh"})])
    @pytest.mark.parametrize("in_group", [False, True])
    def test_signal_to_the_group(
        self, process: Any, mocker: MockerFixture, sig: int, spared: frozenset[str], *, in_group: bool
    ) -> None:
        """Where somebody is spared, the members of the group get their signals one by one, else the runner alone."""
        signal_task = mocker.patch.object(leftovers, "signal_task", autospec=True, return_value=True)
        process._tree.spared = spared
        process._tree.signal_group.return_value = in_group
        assert signal_tree(process, sig)
        assert process._tree.signal_group.called is bool(spared)
        assert signal_task.called is not bool(spared)
        assert process._tree.signal_leader.called is (bool(spared) and not in_group)

    def test_runner_that_is_stopped(self) -> None:
        """A runner that is stopped is continued, so that it hears of its end, and calls on_kill."""
        with contextlib.closing(Relay()) as told, forked(lambda: signal_itself(told)) as pid:
            told.hear()
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
            tree = ProcessTree()
            tree.set_leader(pid)
            assert signal_tree(MadeUpTask(pid=pid, _new_session=True, _tree=tree), signal.SIGTERM)
            assert told.hear() == "on_kill"


def signal_itself(told: Relay) -> None:
    """Lead a session, stop, and tell what is done at SIGTERM."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: told.tell("on_kill"))
    told.tell("ready")
    os.kill(os.getpid(), signal.SIGSTOP)
    pause_for_ever()


class TestKill:
    @pytest.mark.parametrize("spared", [frozenset(), frozenset({"ssh"})])
    def test_sigkill_is_ours(self, process: Any, spared: frozenset[str]) -> None:
        """The log does not blame a lack of memory for it, whether or not somebody is spared."""
        process._tree.spared = spared
        signal_tree(process, signal.SIGKILL)
        assert process._stop.sigkill_sent

    def test_processes_have_time_to_stop(self, process: Any) -> None:
        """A SIGKILL waits for those that have not come to stop, but no longer than nobody notices."""
        signal_tree(process, signal.SIGKILL)
        [call] = process._tree.kill_all.mock_calls
        assert 0.1 <= call.args[0] <= 0.5
        assert call.kwargs == {"with_leader": True}

    def test_runner_that_somebody_else_has_collected(
        self, conf: ConfigParser, process: Any, clock: Clock, mocker: MockerFixture
    ) -> None:
        """Its number may be another's: nobody is signalled by it, and what it has left ends here and now."""
        mocker.patch.object(leftovers, "is_unreaped_child", spec=is_unreaped_child, return_value=False)
        prepare_kill(process, GRACE, conf)
        assert process._exit_code == 1, "unknown is not success"
        assert process._tree.kill_all.called
        process._tree.reset_mock()
        assert signal_tree(process, signal.SIGTERM)
        assert not process._tree.mock_calls

    def test_tree_of_a_kill(self, conf: ConfigParser, process: Any) -> None:
        """Who belongs is noted before kill() sends a signal, be that SIGKILL to the group alone."""
        conf.read_dict({"workers": {"leftover_policy": "report"}})
        prepare_kill(process, GRACE, conf)
        process._tree.remember.assert_called_once_with()

    def test_tree_of_a_signal(self, process: Any) -> None:
        """Who belongs is noted before any other signal is passed on: the runner may end of it at once."""
        process._tree.signal_leader.side_effect = lambda _: process._tree.remember.called
        assert signal_tree(process, signal.SIGTERM)
        process._tree.remember.assert_called_once_with()

    def test_nobody_waits_for_long_unasked(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """What a crash has left gets a minute of a longer grace, for the server is not told of the end before."""
        conf.read_dict({"core": {"killed_task_cleanup_time": "600"}})
        end_leftovers(process, -9, conf)
        assert 60 <= clock.passed < 61.5

    def test_error_of_our_own(self, conf: ConfigParser, process: Any) -> None:
        """It does not keep the state of the task from being told, without which it counts as running."""
        process._tree.find.side_effect = RuntimeError
        with structlog.testing.capture_logs() as logs:
            assert end_leftovers(process, -9, conf) == -9
        assert {entry["log_level"] for entry in logs} == {"error"}

    def test_error_of_a_signal_handler(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """One that cuts the teardown short, as the soft time limit of Celery, does not spare what is left."""
        process._tree.find.side_effect = itertools.chain([InterruptedError], itertools.repeat([]))
        with structlog.testing.capture_logs() as logs:
            end_leftovers(process, -9, conf)
        assert [entry["log_level"] for entry in logs] == ["error"]
        assert process._tree.kill_all.called


class TestExceptions:
    """What becomes of a task whose supervisor cannot go on."""

    def test_second_exception(self, conf: ConfigParser, process: Any, clock: Clock) -> None:
        """One that cuts the end of the leftovers short does not spare them."""

        def interrupt() -> None:
            if process._exit_code is None:
                process._exit_code = -9
                raise KeyboardInterrupt

        clock.meanwhile = interrupt
        with pytest.raises(KeyboardInterrupt), end_on_exception(process, conf):
            raise RuntimeError
        assert process._tree.kill_all.called

    @pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_any_exception(
        self, conf: ConfigParser, process: Any, clock: Clock, error: type[BaseException]
    ) -> None:
        """Whatever it is, the task is asked to end, is killed when its grace is over, and the exception goes on."""
        with pytest.raises(error), end_on_exception(process, conf):
            raise error
        signals = [call.args[0] for call in process._tree.signal_leader.call_args_list]
        assert signals == [signal.SIGTERM, signal.SIGKILL]
        assert process._tree.kill_all.called
        assert GRACE <= clock.passed <= GRACE + 1

    def test_spared_before_anything_happens(self, conf: ConfigParser, process: Any) -> None:
        """A signal to the supervisor may be the first that the task gets."""
        conf.read_dict({"workers": {"spared_leftovers": "ssh"}})
        with end_on_exception(process, conf):
            assert process._tree.spared == {"ssh"}
            assert process._stop.spares_group_members


@pytest.mark.usefixtures("list_left")
class TestNotStarted:
    @pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
    def test_any_exception(self, mocker: MockerFixture, error: type[BaseException]) -> None:
        """Whatever keeps a process from becoming a task, its tree is killed."""
        kill = mocker.patch.object(ProcessTree, "kill_all", autospec=True, return_value=[])
        with pytest.raises(error), end_unless_started():
            raise error
        kill.assert_called_once()

    def test_time_is_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a process has started that does not become a task is killed, however late its supervisor comes to it."""
        monkeypatch.setattr(leftovers, "KILL_TIME", 0)

        def lead() -> None:
            os.setsid()
            relay.tell(fork(pause_for_ever))

        def fail_to_start(pid: int) -> None:
            with end_unless_started() as tree:
                tree.set_leader(pid)
                raise TimeoutError

        with contextlib.closing(Relay()) as relay, contextlib.closing(Tree()) as held, waiting(lead) as pid:
            child = held.add(relay.hear())
            with pytest.raises(TimeoutError):
                fail_to_start(pid)
            assert held.gone(child)


class TestNothingToEnd:
    @pytest.mark.parametrize("exit_code", [None, 0])
    def test_exit_that_is_unknown_or_good(
        self, conf: ConfigParser, process: Any, exit_code: int | None
    ) -> None:
        """A task that still runs, or has succeeded, has nothing ended, or even looked for."""
        assert end_leftovers(process, exit_code, conf) is exit_code
        assert not process._tree.mock_calls

    def test_success_that_is_still_to_be_told(self, conf: ConfigParser, process: Any) -> None:
        """A task that has succeeded stays one if the server could not be told, and a stop signal came meanwhile."""
        process._exit_watch.expect_exit(GRACE)
        process._pending_terminal_state_msg = SucceedTask(end_date=SOME_DAY)  # which not every release has
        assert end_leftovers(process, 0, conf) == 0
        assert not process._tree.mock_calls

    def test_other_types(self, conf: ConfigParser, process: Any) -> None:
        """What leads no session of its own leaves what it has started, however it ends."""
        process._new_session = False
        assert end_leftovers(process, 1, conf) == 1
        assert not process._tree.mock_calls
