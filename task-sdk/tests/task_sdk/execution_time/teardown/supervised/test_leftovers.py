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
"""Nothing that a task has started outlives it, unless it succeeds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    NEVER,
    PATIENCE,
    SLEEPER,
    Api,
    Log,
    Relay,
    SteppingApi,
    Tree,
    be_deaf,
    be_polite,
    conflict,
    detach,
    end_task,
    ending,
    exec_sleeper,
    forked,
    hear_ready,
    in_turn,
    keep_open,
    leave_holder,
    lift_limit,
    limit_realtime,
    list_pending,
    pause_for_ever,
    set_grace,
    start_task,
    stop_supervisor,
    tell_when_monitoring,
    wait_to_end,
    wait_until_left,
)

from airflow.sdk.api.client import ServerResponseError
from airflow.sdk.api.datamodels._generated import TaskInstanceState
from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.comms import TaskState, _RequestFrame

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk.api.datamodels._generated import TIRunContext


def be_exec(relay: Relay) -> None:
    """Drop the environment, as ``env -i`` does."""
    exec_sleeper(relay, env={})


def be_stopped(relay: Relay) -> None:
    relay.tell(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def be_phoenix(relay: Relay) -> None:
    """Start a successor when told to end."""

    def hand_over(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        detach(lambda: None)
        os._exit(0)

    signal.signal(signal.SIGTERM, hand_over)
    relay.tell(os.getpid())


def be_forker(relay: Relay) -> None:
    """Start a detached successor every 20 ms, and be deaf."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    relay.tell(os.getpid())
    while True:
        detach(lambda: None)
        select.select([], [], [], 0.02)


def be_pool(relay: Relay) -> None:
    """Start 30 children, every third of them in a session of its own."""
    for number in range(30):
        if os.fork() == 0:
            if number % 3 == 0:
                os.setsid()
            pause_for_ever()
    relay.tell(os.getpid())


def be_realtime(relay: Relay) -> None:
    """Limit what is scheduled in real time, as PipeWire does in all of its clients."""
    limit_realtime()
    relay.tell(os.getpid())


DAEMONS = [be_polite, be_exec, be_stopped, be_deaf, be_phoenix, be_forker, be_pool, be_realtime]


@pytest.mark.usefixtures("short_grace")
class TestLeftovers:
    """What has left the task's group, its session, or lost its parent, ends with the task."""

    @pytest.mark.parametrize("way", ["conflict", "killed", "failed"])
    @pytest.mark.parametrize("daemon", DAEMONS, ids=lambda daemon: daemon.__name__)
    def test_nothing_is_left(
        self, relay: Relay, daemon: Callable[[Relay], None], way: str, list_left: Callable[[], list[int]]
    ) -> None:
        """Whatever the daemon does, and however the task ends but well."""
        api = Api()
        process = start_task(in_turn(lambda: detach(lambda: daemon(relay)), lambda: wait_to_end(relay)), api)
        hear_ready(relay)
        end_task(way, process, api)
        assert list_left() == []

    @pytest.mark.parametrize("state", ["failed", "up_for_retry"])
    def test_daemon_of_a_task_that_reports_its_failure_ends(
        self, relay: Relay, list_left: Callable[[], list[int]], state: str
    ) -> None:
        """The runner catches whatever a task raises, tells the state, and exits with 0."""
        process = start_task(lambda: detach(lambda: be_polite(relay)))
        process._terminal_state = state
        relay.hear()
        assert process.wait() == 0
        assert list_left() == []

    def test_daemon_ends_of_a_task_whose_report_is_read_late(
        self, relay: Relay, list_left: Callable[[], list[int]]
    ) -> None:
        """A runner that exits before the answer has told that it failed, though its exit code is read first."""
        gate = Relay()

        class BusyLog(Log):
            pid = 0

            def __call__(self, logger: Any, method_name: str, event_dict: Any) -> Any:
                if event_dict["event"] == "busy":
                    gate.tell("go")
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
                return super().__call__(logger, method_name, event_dict)

        def target() -> None:
            detach(lambda: be_polite(relay))
            report = TaskState(
                state=TaskInstanceState.FAILED, end_date=datetime(2026, 1, 1, tzinfo=timezone.utc)
            )
            os.write(1, b"busy\n")
            gate.hear()
            os.write(0, _RequestFrame(id=0, body=report.model_dump()).as_bytes())
            os._exit(0)

        log = BusyLog()
        with contextlib.closing(gate):
            process = start_task(target, logger=log.logger)
            log.pid = process.pid
            relay.hear()
            assert process.wait() == 0
        assert list_left() == []

    def test_task_that_does_not_start_leaves_nothing(
        self, relay: Relay, list_left: Callable[[], list[int]]
    ) -> None:
        """A task that the server refuses is killed with all that it has started already."""

        class Refusing(Api):
            def start(self, *args: Any, **kwargs: Any) -> TIRunContext:
                relay.hear()
                raise conflict()

        with pytest.raises(ServerResponseError):
            start_task(
                in_turn(lambda: detach(lambda: be_polite(relay)), lambda: wait_to_end(relay)), Refusing()
            )
        assert list_left() == []

    def test_runner_goes_first(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """The runner has the grace for its on_kill, in which its daemons are left alone."""
        set_grace(monkeypatch, PATIENCE)
        api, gate = Api(), Relay()

        class Waiting(Log):
            def __call__(self, logger: Any, method_name: str, event_dict: Any) -> Any:
                # The supervisor waits for the runner by now.
                if event_dict["event"] == "on_kill":
                    gate.tell("go on")
                return super().__call__(logger, method_name, event_dict)

        def target() -> None:
            def be_daemon() -> None:
                # What it is told stays to be seen as long as the runner is there.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                be_polite(started)
                assert tree.gone(runner)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

            def on_kill(*_: Any) -> None:
                os.write(1, b"on_kill\n")
                gate.hear()
                relay.tell(["on_kill", list_pending(daemon)])
                os._exit(1)

            runner, started = tree.add(os.getpid()), Relay()
            detach(be_daemon)
            daemon = started.hear()
            signal.signal(signal.SIGTERM, on_kill)
            relay.tell("ready")
            pause_for_ever()

        with contextlib.closing(gate):
            process = start_task(target, api, logger=Waiting().logger)
            assert relay.hear() == "ready"
            end_task("conflict", process, api)
        assert relay.hear() == ["on_kill", 0]
        assert list_left() == []

    def test_successor_is_asked_to_end(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """What a leftover starts when it is told to end is told so, too, while another one is deaf."""
        set_grace(monkeypatch, NEVER)
        asked = Relay()

        def be_deaf_until_asked() -> None:
            be_deaf(relay)
            assert asked.hear() == "asked"
            os._exit(0)

        def tell_and_exit(*_: Any) -> None:
            asked.tell("asked")
            os._exit(0)

        def hand_over(*_: Any) -> None:
            signal.signal(signal.SIGTERM, tell_and_exit)
            detach(lambda: None)
            os._exit(0)

        def be_phoenix() -> None:
            signal.signal(signal.SIGTERM, hand_over)
            relay.tell(os.getpid())

        def target() -> None:
            detach(be_deaf_until_asked)
            detach(be_phoenix)
            wait_to_end(relay)

        process = start_task(target)
        hear_ready(relay, 2)
        end_task("killed", process, Api())
        asked.close()
        assert list_left() == []

    def test_last_words_arrive(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a leftover writes when it is told to end is in the task's log."""
        set_grace(monkeypatch, PATIENCE)

        def speak(*_: Any) -> None:
            os.write(1, b"last words\n")
            os._exit(0)

        def be_talkative() -> None:
            signal.signal(signal.SIGTERM, speak)
            relay.tell(os.getpid())

        log = Log()
        process = start_task(
            in_turn(lambda: detach(be_talkative), lambda: wait_to_end(relay)), logger=log.logger
        )
        hear_ready(relay)
        end_task("killed", process, Api())
        assert log.find("last words") == ["last words"]

    def test_held_socket_does_not_outlast_leftovers(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """Once they have ended, nobody waits for a heartbeat to find that somebody out of reach holds a socket."""
        for interval in ("SOCKET_CLEANUP_TIMEOUT", "MIN_HEARTBEAT_INTERVAL", "HEARTBEAT_TIMEOUT"):
            monkeypatch.setattr(supervisor, interval, NEVER)
        process = start_task(
            in_turn(lambda: detach(lambda: be_polite(relay)), lambda: leave_holder(relay, "stdout"))
        )
        relay.hear(), relay.hear()
        end_task("killed", process, Api())
        assert len(list_left()) == 1

    def test_log_names_what_was_ended(self, relay: Relay) -> None:
        """One event with number, PID, name and signal, and no command line, which may hold a secret."""
        log = Log()
        process = start_task(
            in_turn(lambda: detach(lambda: be_deaf(relay)), lambda: wait_to_end(relay)), logger=log.logger
        )
        [pid] = hear_ready(relay)
        name = psutil.Process(pid).name()
        end_task("failed", process, Api())
        [event] = [entry for entry in log.entries if "left running" in entry["event"]]
        assert event["processes"] == [{"pid": pid, "name": name, "signal": "SIGKILL"}]
        assert event["count"] == 1

    def test_bystanders_live(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """Another task with the same tree, and processes of the supervisor, are not the task's."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            detach(lambda: be_polite(relay))
            wait_to_end(relay)

        neighbours = [subprocess.Popen(SLEEPER, start_new_session=session).pid for session in (False, True)]
        other = start_task(target)
        neighbours += [other.pid, *hear_ready(relay, 2)]
        process = start_task(target)
        hear_ready(relay, 2)
        end_task("killed", process, Api())
        assert sorted(list_left()) == sorted(neighbours)


class TestPatience:
    """A grace that nobody needs."""

    def test_stopped_daemon_is_asked_to_end(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """One that is stopped is continued when it is told to end, so that it does not take the whole grace."""
        set_grace(monkeypatch, NEVER)
        process = start_task(in_turn(lambda: detach(lambda: be_stopped(relay)), lambda: wait_to_end(relay)))
        hear_ready(relay)
        end_task("failed", process, Api())
        assert list_left() == []


@pytest.mark.usefixtures("short_grace")
class TestNested:
    """A task that supervises tasks itself, as dag.test() does with an executor."""

    @pytest.mark.parametrize("way", ["conflict", "killed", "failed"])
    def test_nothing_is_left(self, relay: Relay, way: str, list_left: Callable[[], list[int]]) -> None:
        """The inner task's own process and its daemon end with the outer one, in whose tree they are."""

        def start_inner_task() -> None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            start_task(
                in_turn(
                    lambda: detach(lambda: be_deaf(relay)), lambda: relay.tell(os.getpid()), pause_for_ever
                )
            )
            wait_to_end(relay)

        api = Api()
        process = start_task(start_inner_task, api)
        hear_ready(relay, processes=2)
        end_task(way, process, api)
        # An inner runner that outlived its supervisor for a moment may have started its watchdog, which ends by itself.
        wait_until_left(list_left)

    @pytest.mark.parametrize("way", ["conflict", "killed", "failed"])
    def test_inner_task_is_ended_alone(
        self, relay: Relay, way: str, list_left: Callable[[], list[int]]
    ) -> None:
        """What the outer task has started beside the inner one stays when that ends."""

        def run_inner_task() -> None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.closing(Relay()) as inner:
                detach(lambda: be_polite(inner))
                sibling = inner.hear()
                api = Api()
                process = start_task(
                    in_turn(lambda: detach(lambda: be_deaf(inner)), lambda: wait_to_end(inner)), api
                )
                daemon = [process.pid, *hear_ready(inner)]
                end_task(way, process, api)
            relay.tell([sibling, daemon])
            pause_for_ever()

        with ending(start_task(run_inner_task)):
            sibling, daemon = relay.hear()
            left = list_left()
            assert sibling in left
            assert not set(daemon) & set(left)


class TestSpared:
    @pytest.mark.parametrize("is_busy", [False, True])
    def test_member_of_the_group(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, *, is_busy: bool
    ) -> None:
        """A program that the deployment spares survives a signal to the supervisor, even in a request, or later in a kill."""
        monkeypatch.setenv("AIRFLOW__WORKERS__SPARED_LEFTOVERS", "sleep")
        monkeypatch.setenv("AIRFLOW__WORKERS__STOP_SIGNAL_POLICY", "stop")

        def supervise() -> None:
            # Its heartbeat is a request, in which it hears that the program runs, and is told to stop.
            api = SteppingApi(in_turn(started.hear, stop_supervisor)) if is_busy else Api()
            process = start_task(in_turn(start_sleep, pause_for_ever), api)
            if not is_busy:
                tell_when_monitoring(relay, monkeypatch)
            relay.tell(process.wait())

        def start_sleep() -> None:
            relay.tell(subprocess.Popen(["sleep", "600"]).pid)
            started.tell("started")

        with contextlib.closing(Relay()) as started, forked(supervise) as supervising:
            child = tree.add(relay.hear() if is_busy else hear_ready(relay, ready="monitoring")[0])
            if not is_busy:
                os.kill(supervising, signal.SIGTERM)
            assert relay.hear() == -signal.SIGTERM
            assert tree.runs(child)
            os.kill(child, signal.SIGKILL)


class TestUnchanged:
    def test_opt_out(self, relay: Relay, tree: Tree) -> None:
        """A daemon that has lifted its limit lives on when the task is killed."""

        def lift() -> None:
            lift_limit()
            keep_open(relay.writer)
            relay.tell(os.getpid())

        process = start_task(in_turn(lambda: detach(lift), lambda: wait_to_end(relay)))
        daemon = tree.add(hear_ready(relay)[0])
        end_task("killed", process, Api())
        assert tree.runs(daemon)

    @pytest.mark.parametrize("state", [None, "success", "deferred", "up_for_reschedule", "skipped"])
    def test_success_leaves_processes_alone(self, relay: Relay, tree: Tree, state: str | None) -> None:
        """What a task that ends well has left running on purpose goes on running, whether or not it has told so."""

        def target() -> None:
            null = subprocess.DEVNULL
            relay.tell(subprocess.Popen(SLEEPER, stdin=null, stdout=null, stderr=null).pid)

        with ending(start_task(target)) as process:
            process._terminal_state = state
            child = tree.add(relay.hear())
            assert process.wait() == 0
            assert tree.runs(child)

    def test_log_is_silent_when_nothing_was_left(self) -> None:
        """The log of a task that fails, and leaves nothing, says nothing of leftovers."""
        log = Log()
        start_task(lambda: os._exit(1), logger=log.logger).wait()
        assert log.find("exited abnormally")
        assert not log.find("left running")
