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
"""A task that was told to stop leaves nothing, and one that has told a good end keeps what it has left."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from task_sdk.execution_time.teardown.supervised.supervised_task import (
    Relay,
    SteppingApi,
    Tree,
    be_polite,
    detach,
    ending,
    fork,
    forked,
    hear_ready,
    pause_for_ever,
    set_grace,
    set_stop_policy,
    start_task,
    stop_supervisor,
    tell_when_monitoring,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


class SoftLimitError(Exception):
    """What a signal handler of the worker raises, as Celery's soft time limit does."""


class TestStopping:
    def test_leftovers_end(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """They do so although the runner, told to stop, exits with 0."""
        set_stop_policy(monkeypatch, "stop")

        def target() -> None:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            detach(lambda: be_polite(relay))
            pause_for_ever()

        with forked(lambda: supervise(target, relay, monkeypatch)) as supervising:
            daemon = tree.add(*hear_ready(relay, ready="monitoring"))
            os.kill(supervising, signal.SIGTERM)
            assert relay.hear() == ["ended", 1]
            assert tree.gone(daemon, timeout=0)

    def test_grace_of_leftovers_ends(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """A supervisor that is told to stop while it waits for what a failure has left waits no more."""
        set_stop_policy(monkeypatch, "stop")
        set_grace(monkeypatch, 3600)

        def be_deaf_and_tell() -> None:
            signal.signal(signal.SIGTERM, lambda *_: relay.tell("asked"))
            relay.tell(os.getpid())
            deaf.tell("deaf")
            while True:
                pause_for_ever()

        def target() -> None:
            detach(be_deaf_and_tell)
            assert deaf.hear() == "deaf"
            relay.tell("ready")
            os._exit(1)

        def run() -> None:
            supervise(target, relay, monkeypatch)

        with contextlib.closing(Relay()) as deaf, forked(run) as supervising:
            told = [relay.hear() for _ in range(4)]
            assert "asked" in told
            daemon = tree.add(next(pid for pid in told if isinstance(pid, int)))
            os.kill(supervising, signal.SIGTERM)
            assert relay.hear() == ["ended", 1]
            assert tree.gone(daemon, timeout=0)

    def test_success_all_the_same(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the task is to finish, it is sent nothing, and keeps what it has left running when it succeeds."""
        set_stop_policy(monkeypatch, "finish")

        def target() -> None:
            detach(lambda: be_polite(relay))
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
            relay.tell("ready")
            signal.sigwaitinfo({signal.SIGUSR1})
            relay.tell(["pending", *signal.sigpending()])

        def run() -> None:
            def finish() -> None:
                process._terminal_state = "success"
                os.kill(process.pid, signal.SIGUSR1)

            process = start_task(target, SteppingApi(gate.hear, stop_supervisor, finish))
            relay.tell(["ended", process.wait()])

        with contextlib.closing(Relay()) as gate, forked(run):
            daemon = tree.add(*hear_ready(relay))
            gate.tell("go")
            assert [relay.hear(), relay.hear()] == [["pending"], ["ended", 0]]
            assert tree.runs(daemon)


class TestReportedState:
    def test_crash_after_success(self, relay: Relay, tree: Tree) -> None:
        """A task that has told its success, and dies in an atexit hook, has succeeded, and keeps what it has left."""

        def target() -> None:
            detach(lambda: be_polite(relay))
            pause_for_ever()

        with ending(start_task(target)) as process:
            process._terminal_state = "success"
            daemon = tree.add(relay.hear())
            os.kill(process.pid, signal.SIGSEGV)
            assert process.wait() == -signal.SIGSEGV
            assert process.final_state == "success"
            assert tree.runs(daemon)


class TestException:
    """An exception leaves the supervisor's loop, and nobody would watch the task any more."""

    def test_task_ends(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is told to stop, all of it, before what a signal handler has raised goes on."""

        def limit(*_: object) -> None:
            raise SoftLimitError

        def target() -> None:
            detach(lambda: be_polite(relay))
            relay.tell(fork(pause_for_ever))
            pause_for_ever()

        def run() -> None:
            signal.signal(signal.SIGUSR1, limit)
            tell_when_monitoring(relay, monkeypatch)
            try:
                start_task(target).wait()
            except SoftLimitError:
                relay.tell("raised")

        with forked(run) as supervising:
            pids = [tree.add(pid) for pid in hear_ready(relay, 2, ready="monitoring")]
            os.kill(supervising, signal.SIGUSR1)
            assert relay.hear() == "raised"
            assert [pid for pid in pids if tree.runs(pid)] == []


def supervise(target: Callable[[], object], relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervise a task; tell when signals are caught, and with what code it has ended."""
    tell_when_monitoring(relay, monkeypatch)
    relay.tell(["ended", start_task(target).wait()])
