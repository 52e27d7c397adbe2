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
"""When a supervisor dies, nothing of its task outlives it by more than the grace."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from task_sdk.execution_time.teardown.supervised.faults import be_deaf_runner
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    SLEEPER,
    Relay,
    be_polite,
    detach,
    fork,
    forked,
    hear_ready,
    kill_child,
    list_sockets,
    pause_for_ever,
    set_name,
    set_of_teardown,
    start_task,
    supervising,
    wait_to_end,
    wait_until_left,
)
from task_sdk.execution_time.teardown.supervised.test_leftovers import DAEMONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


LIFELINE = "airflow.sdk.execution_time.teardown.lifeline"
"""What a runner with an unfixed supervisor has not."""


@pytest.fixture(autouse=True)
def patient_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an on_kill have as long as a busy machine takes."""
    set_of_teardown(monkeypatch, "lifeline", "ORPHAN_GRACE", PATIENCE)


@pytest.fixture
def short_orphan_grace(monkeypatch: pytest.MonkeyPatch, patient_watchdog: None) -> None:
    """Let what is deaf to SIGTERM be killed soon."""
    set_of_teardown(monkeypatch, "lifeline", "ORPHAN_GRACE", 0.3)


def hide_from_sweeps() -> None:
    """Have no other supervisor on this machine, whose own settings would count, take this task for an orphan."""
    resource.setrlimit(resource.RLIMIT_RSS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class TestTree:
    @pytest.mark.usefixtures("short_orphan_grace")
    @pytest.mark.parametrize("daemon", DAEMONS, ids=lambda daemon: daemon.__name__)
    def test_nothing_is_left(
        self, relay: Relay, daemon: Callable[[Relay], None], list_left: Callable[[], list[int]]
    ) -> None:
        """The runner, its group, and whatever has left its session and lost its parent are gone."""

        def target() -> None:
            fork(pause_for_ever)
            detach(lambda: daemon(relay))
            wait_to_end(relay)

        with supervising(target) as supervisor:
            hear_ready(relay)
            kill_child(supervisor)
            wait_until_left(list_left)

    @pytest.mark.usefixtures("short_orphan_grace")
    def test_deaf_runner(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """One that ignores SIGTERM is killed when the grace is over."""

        def target() -> None:
            be_deaf_runner()
            wait_to_end(relay)

        with supervising(target) as supervisor:
            hear_ready(relay, 0)
            kill_child(supervisor)
            wait_until_left(list_left)

    @pytest.mark.parametrize(("policy", "stays"), [("killed", False), ("report", True), ("never", True)])
    def test_policy(
        self,
        relay: Relay,
        monkeypatch: pytest.MonkeyPatch,
        list_left: Callable[[], list[int]],
        policy: str,
        *,
        stays: bool,
    ) -> None:
        """What the deployment has chosen is heeded: the runner and its group end in any case."""
        monkeypatch.setenv("AIRFLOW__WORKERS__LEFTOVER_POLICY", policy)

        def target() -> None:
            hide_from_sweeps()
            fork(pause_for_ever)
            detach(lambda: be_polite(relay))
            wait_to_end(relay)

        with supervising(target) as supervisor:
            daemons = hear_ready(relay)
            kill_child(supervisor)
            wait_until_left(list_left, daemons if stays else [])
            assert list_left() == (daemons if stays else [])

    def test_spared_program(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """A daemon that tasks share is left alone, and another is not."""
        monkeypatch.setenv("AIRFLOW__WORKERS__SPARED_LEFTOVERS", "gpg-agent, daemon-of-many")

        def be_shared() -> None:
            set_name(b"daemon-of-many")
            relay.tell(["shared", os.getpid()])

        def target() -> None:
            hide_from_sweeps()
            detach(lambda: be_polite(relay))
            detach(be_shared)
            wait_to_end(relay)

        with supervising(target) as supervisor:
            [shared] = [told[1] for told in hear_ready(relay, 2) if isinstance(told, list)]
            kill_child(supervisor)
            wait_until_left(list_left, [shared])
            assert list_left() == [shared]


class TestRunner:
    def hold_sockets(self, target: Callable[[], Any], relay: Relay) -> None:
        """Supervise a task beside another process that has all that the supervisor has open."""
        start_task(target)
        fork(pause_for_ever)
        relay.tell("held")
        pause_for_ever()

    @pytest.mark.parametrize("held", [False, True])
    def test_last_words(self, relay: Relay, *, held: bool) -> None:
        """What on_kill says goes nowhere; it does not raise, nor wait for who has the other ends and reads nothing."""

        def target() -> None:
            sockets = {1, 2, *list_sockets()}.difference(others)

            def on_kill(*_: Any) -> None:
                sys.stdout.write("last words\n")
                written = {os.write(descriptor, bytes(1 << 20)) for descriptor in sockets}
                relay.tell(["on_kill", *written])
                os._exit(0)

            signal.signal(signal.SIGTERM, on_kill)
            relay.tell("ready")
            pause_for_ever()

        # Other tests may have left them in this process, and nobody at their other ends.
        others = list_sockets()
        with forked(lambda: self.hold_sockets(target, relay)) if held else supervising(target) as supervisor:
            assert {relay.hear() for _ in range(1 + held)} == ({"ready", "held"} if held else {"ready"})
            kill_child(supervisor)
            assert relay.hear() == ["on_kill", 1 << 20]

    def test_answer_that_does_not_come(self, relay: Relay) -> None:
        """A runner that waits for an answer wakes up, also if somebody else has the other end of its requests."""

        def target() -> None:
            be_deaf_runner()
            while os.read(0, 1 << 16):
                relay.tell("answer")
            relay.tell("no answer")
            pause_for_ever()

        with forked(lambda: self.hold_sockets(target, relay)) as supervisor:
            assert {relay.hear(), relay.hear()} == {"held", "answer"}
            kill_child(supervisor)
            assert relay.hear() == "no answer"


class TestBystanders:
    def test_others_live(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """Another supervisor's task with the same tree, and processes of this one, are not the task's."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            detach(lambda: be_polite(relay))
            wait_to_end(relay)

        others = [subprocess.Popen(SLEEPER, start_new_session=session).pid for session in (False, True)]
        others += [start_task(target).pid, *hear_ready(relay, 2)]
        with supervising(target) as supervisor:
            hear_ready(relay, 2)
            kill_child(supervisor)
            wait_until_left(list_left, others)
            assert sorted(list_left()) == sorted(others)


class TestDyingSupervisor:
    """It closes its sockets, one after the other, before the kernel tells of its end; a runner may fail for that."""

    def close_sockets(self, order: Relay, target: Callable[[], Any], relay: Relay) -> None:
        """Supervise a task, and be as a supervisor that dies slowly."""
        process = start_task(target)
        assert order.hear() == "close"
        for key in list(process.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        process.stdin.close()
        relay.tell("closed")
        pause_for_ever()

    def start_to_fail(self, relay: Relay) -> None:
        """Be a runner that ends when nobody hears it any more."""
        detach(lambda: be_polite(relay))
        relay.tell("ready")
        while os.read(0, 1 << 16):
            continue  # what the supervisor had said before
        raise ConnectionError("nobody listens")

    @contextlib.contextmanager
    def supervising(self, relay: Relay) -> Iterator[tuple[int, Relay]]:
        """Yield the PID of such a supervisor, and what tells it to close its sockets."""

        def supervise() -> None:
            self.close_sockets(order, lambda: self.start_to_fail(relay), relay)

        order = Relay()
        with contextlib.closing(order), forked(supervise) as pid:
            yield pid, order

    def test_runner_that_fails_for_it(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """It does not end before its supervisor does, and so nothing is left."""
        with self.supervising(relay) as (supervisor, order):
            [daemon] = hear_ready(relay)
            order.tell("close")
            assert relay.hear() == "closed"
            assert len(list_left()) == 3, "the supervisor, its runner, which waits, and the daemon"
            assert daemon in list_left()
            kill_child(supervisor)
            wait_until_left(list_left)

    def test_supervisor_that_lives(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """A runner does not wait long for a supervisor that has closed its sockets to die; it is not told to stop."""
        monkeypatch.setattr(f"{LIFELINE}.DEATH_TIME", 0.1)
        with self.supervising(relay) as (supervisor, order):
            daemons = hear_ready(relay)
            order.tell("close")
            assert relay.hear() == "closed"
            wait_until_left(list_left, [supervisor, *daemons])
            assert sorted(list_left()) == sorted([supervisor, *daemons])

    def test_sibling_that_has_ended(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sockets of another task of the same supervisor, which are closed when that ends, are not a runner's own."""
        monkeypatch.setattr(f"{LIFELINE}.DEATH_TIME", PATIENCE)

        def supervise_two() -> None:
            first = start_task(first_order.hear)
            second = start_task(second_order.hear)
            first_order.tell("end")
            first.wait()
            second_order.tell("end")
            relay.tell(second.wait())

        first_order, second_order = Relay(), Relay()
        with contextlib.closing(first_order), contextlib.closing(second_order), forked(supervise_two):
            began = time.monotonic()
            assert relay.hear() == 0
            assert time.monotonic() - began < PATIENCE / 2
