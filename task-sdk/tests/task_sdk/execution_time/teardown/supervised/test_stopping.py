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
"""A supervisor that is told to stop stops its task, waits for its end, and tells the truth about it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    SLEEPER,
    Api,
    Log,
    Relay,
    SteppingApi,
    Tree,
    describe_task,
    find_entry_point,
    forked,
    hear_ready,
    in_turn,
    name_state,
    pause_for_ever,
    start_task,
    stop_supervisor,
    tell_when_monitoring,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

pytestmark = pytest.mark.usefixtures("stop_policy")


def tell_end(relay: Relay, process: ActivitySubprocess) -> None:
    """Wait for a task, and tell how it has ended."""
    code = process.wait()
    relay.tell(["ended", code, name_state(process.final_state)])


class TestStopping:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
    def test_task_ends(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
    ) -> None:
        """Whatever tells a supervisor to stop, its task and the task's group get SIGTERM; then handlers are restored."""

        def handle(signum: int, frame: Any) -> None: ...

        def supervise() -> None:
            tell_when_monitoring(relay, monkeypatch)
            process = start_task(in_turn(lambda: relay.tell(subprocess.Popen(SLEEPER).pid), pause_for_ever))
            signal.signal(signum, handle)
            code = process.wait()
            relay.tell([code, signal.getsignal(signum) is handle])

        with forked(supervise) as supervising:
            child = tree.add(*hear_ready(relay, ready="monitoring"))
            os.kill(supervising, signum)
            assert relay.hear() == [-signal.SIGTERM, True]
            assert tree.gone(child)

    def test_task_is_told_once(self, relay: Relay, runner: Relay) -> None:
        """However many signals come, they are one request to the task."""

        def target() -> None:
            signal.signal(signal.SIGTERM, lambda *_: runner.tell("SIGTERM"))
            signal.signal(signal.SIGUSR1, lambda *_: os._exit(1))
            runner.tell("ready")
            pause_for_ever()

        def supervise() -> None:
            api = SteppingApi(
                stop_supervisor,
                lambda: relay.tell(runner.hear()),
                *[stop_supervisor] * 3,
                lambda: os.kill(process.pid, signal.SIGUSR1),
            )
            process = start_task(target, api)
            assert runner.hear() == "ready"
            tell_end(relay, process)
            runner.tell("no more")
            relay.tell(runner.hear())

        with forked(supervise):
            assert relay.hear() == "SIGTERM"
            assert relay.hear() == ["ended", 1, "failed"]
            assert relay.hear() == "no more"

    def test_signals_while_logging(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
    ) -> None:
        """A signal while something is logged, under the lock of the log's file, does not hang the supervisor."""

        class Interrupting(io.StringIO):
            def write(self, text: str) -> int:
                stop_supervisor()
                return super().write(text)

        def supervise() -> None:
            process = start_task(pause_for_ever)
            signal.signal(signal.SIGTERM, lambda *_: None)
            log, install = log_into(Interrupting(), monkeypatch), signal.signal

            def install_and_log(signum: int, handler: Any) -> Any:
                former = install(signum, handler)
                log.info("A handler was installed")
                return former

            mocker.patch.object(signal, "signal", autospec=True, side_effect=install_and_log)
            relay.tell(process.wait())

        with forked(supervise):
            assert relay.hear() == -signal.SIGTERM

    @pytest.mark.usefixtures("short_grace")
    def test_deaf_task_is_killed(self, relay: Relay, runner: Relay) -> None:
        """A task that does not end is killed when its grace is over, and nobody guesses at a lack of memory."""

        def target() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            runner.tell("ready")
            pause_for_ever()

        def supervise() -> None:
            log = Log()
            process = start_task(target, SteppingApi(stop_supervisor), logger=log.logger)
            assert runner.hear() == "ready"
            tell_end(relay, process)
            relay.tell([len(log.find("told to stop")), log.find("memory")])

        with forked(supervise):
            assert relay.hear() == ["ended", -signal.SIGKILL, "failed"]
            assert relay.hear() == [1, []]

    def test_signal_during_start(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """A supervisor that is told to stop before its task has begun stops it, instead of dying beside it."""

        class Interrupted(Api):
            def start(self, *args: Any, **kwargs: Any) -> Any:
                stop_supervisor()
                return super().start(*args, **kwargs)

        def supervise() -> None:
            task = describe_task(Interrupted())
            start = partial(ActivitySubprocess.start, target=pause_for_ever)
            monkeypatch.setattr(ActivitySubprocess, "start", start)
            run = find_entry_point()
            names = ("bundle_info", "dag_rel_path", "client")
            relay.tell(run(ti=task["what"], token="", **{name: task[name] for name in names}))

        with forked(supervise):
            assert relay.hear() == -signal.SIGTERM


class TestIgnoredSignal:
    def test_stays_ignored(self, relay: Relay, runner: Relay) -> None:
        """A signal that the supervisor ignores it goes on to ignore: Celery's pool does so with Ctrl-C."""

        def interrupt() -> None:
            os.kill(os.getpid(), signal.SIGINT)

        def supervise() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            api = SteppingApi(interrupt, lambda: runner.tell("go"))
            tell_end(relay, start_task(in_turn(runner.hear, lambda: os._exit(3)), api))

        with forked(supervise):
            assert relay.hear() == ["ended", 3, "failed"]


class TestWhoHasAsked:
    """The task's log says who has asked for its end, when it is asked, not only when it is over."""

    @pytest.fixture
    def log(self) -> Log:
        return Log()

    @pytest.fixture
    def before_kill(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """Return what the log says when the task is killed."""
        entries: list[dict[str, Any]] = []
        kill = ActivitySubprocess.kill

        def note_and_kill(process: ActivitySubprocess, *args: Any, **kwargs: Any) -> None:
            entries.extend(map(dict, log.entries))
            kill(process, *args, **kwargs)

        monkeypatch.setattr(ActivitySubprocess, "kill", note_and_kill)
        return entries

    def test_server(self, log: Log, before_kill: list[dict[str, Any]]) -> None:
        """It tells status, reason and state of the server's answer."""
        api = Api()
        process = start_task(pause_for_ever, api, logger=log.logger)
        api.terminate = True
        process.wait()
        [entry] = [entry for entry in before_kill if "status" in entry]
        assert (entry["status"], entry["reason"], entry["state"]) == (409, "not_running", "failed")

    def test_failed_heartbeats(
        self, log: Log, before_kill: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It tells how many heartbeats have failed."""

        def fail() -> None:
            raise ConnectionError("away")

        monkeypatch.setattr(supervisor, "MAX_FAILED_HEARTBEATS", 2)
        process = start_task(pause_for_ever, SteppingApi(fail, fail), logger=log.logger)
        # Not every release can print its own warning.
        with structlog.testing.capture_logs():
            process.wait()
        [entry] = [entry for entry in before_kill if "failed_heartbeats" in entry]
        assert entry["failed_heartbeats"] == 2

    def test_overtime(
        self, log: Log, before_kill: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It tells of the limit."""
        monkeypatch.setattr(supervisor, "TASK_OVERTIME_THRESHOLD", 0)
        process = start_task(pause_for_ever, logger=log.logger)
        process._terminal_state, process._task_end_time_monotonic = "success", 1.0
        process.wait()
        assert [entry for entry in before_kill if "task_success_overtime" in str(entry.get("limit"))]


def log_into(file: TextIO, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have whatever supervises a task log into a file, under its lock; return the logger."""
    log = structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(0),
    )
    for name, module in list(sys.modules.items()):
        if name.startswith(supervisor.__package__) and hasattr(module, "log"):
            monkeypatch.setattr(module, "log", log)
    return log
