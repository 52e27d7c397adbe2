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
import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import psutil
import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.faults import lack, misbehave, run_in_fork
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    Relay,
    be_polite,
    detach,
    ended_by,
    fork,
    forked,
    in_turn,
    kill_child,
    leave_others_alone,
    list_descriptors,
    pause_for_ever,
    start_task,
    supervising,
    wait_until_left,
)
from task_sdk.execution_time.teardown.trees import read_dead_or_alive

from airflow.sdk.execution_time.supervisor import conf
from airflow.sdk.execution_time.teardown import (
    lifeline,
    policy,
    process_tree,
    processes,
    stop_request,
    watchdog,
)
from airflow.sdk.execution_time.teardown.marks import (
    MARK_VARIABLE,
    compute_mark,
    mark_process,
    read_limits,
    read_origin,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from pytest_mock import MockerFixture


pytestmark = pytest.mark.usefixtures("list_left")


@pytest.fixture(autouse=True)
def patient_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_others_alone(monkeypatch)
    monkeypatch.setattr(lifeline, "ORPHAN_GRACE", PATIENCE)


def tell_when_told(relay: Relay) -> None:
    """Be a runner with an on_kill."""

    def on_kill(*_: Any) -> None:
        relay.tell("on_kill")
        os._exit(0)

    signal.signal(signal.SIGTERM, on_kill)
    relay.tell(os.getpid())
    pause_for_ever()


def tell_of_death_signal(relay: Relay) -> None:
    """Tell when the signal of a parent's end was handled."""
    assert lifeline.PARENT_DEATH_SIGNAL
    handle = signal.getsignal(lifeline.PARENT_DEATH_SIGNAL)
    assert callable(handle)

    def handle_and_tell(signum: int, frame: FrameType | None) -> None:
        handle(signum, frame)
        relay.tell("handled")

    signal.signal(lifeline.PARENT_DEATH_SIGNAL, handle_and_tell)


class TestSignal:
    def test_thread_that_ends(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """The end of the thread that has forked the runner is none of its supervisor: nothing happens to the task."""

        def target() -> None:
            tell_of_death_signal(relay)
            ready.tell("ready")
            mode = os.fstat(1).st_mode
            select.select([order.reader], [], [])  # in one call, which the signal interrupts
            assert order.hear() == "end"
            relay.tell([mode == os.fstat(1).st_mode, *list_children()])
            tell_when_told(relay)

        def start() -> None:
            runner = psutil.Process(start_task(target).pid)
            ready.hear()
            # In a process that a thread has forked, Python 3.13.0 handles a signal only if it interrupts a call.
            while runner.status() != psutil.STATUS_SLEEPING:
                os.sched_yield()

        def supervise() -> None:
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
            pause_for_ever()

        order, ready = Relay(), Relay()
        with contextlib.closing(order), contextlib.closing(ready), forked(supervise) as supervisor:
            assert relay.hear() == "handled"
            order.tell("end")
            assert relay.hear() == [True], "it has its sockets, and no watchdog"
            assert relay.hear() in list_left()
            kill_child(supervisor)
            # SIGTERM may cut short what tells of the first signal.
            assert relay.hear() == "on_kill" or relay.hear() == "on_kill"
            wait_until_left(list_left)

    def test_forked_child(self, relay: Relay) -> None:
        """What the runner forks inherits the handler, which does nothing there when somebody sends the signal."""

        def be_child() -> None:
            tell_of_death_signal(relay)
            assert lifeline.PARENT_DEATH_SIGNAL
            os.kill(os.getpid(), lifeline.PARENT_DEATH_SIGNAL)
            relay.tell([os.getppid(), *list_children()])

        def target() -> None:
            relay.tell(os.getpid())
            fork(be_child)
            pause_for_ever()

        with supervising(target):
            runner = relay.hear()
            assert relay.hear() == "handled"
            assert relay.hear() == [runner]

    def test_supervisor_that_is_dead_before(self, relay: Relay, mocker: MockerFixture) -> None:
        """A runner whose supervisor has died before it could follow it ends at once, and starts nothing."""

        def lead_session_late() -> bool:
            relay.tell(os.getpid())
            gate.hear()
            return led()

        led = stop_request.lead_session
        mocker.patch.object(stop_request, "lead_session", autospec=True, side_effect=lead_session_late)
        with contextlib.closing(Relay()) as gate:
            with supervising(lambda: relay.tell("started")) as supervisor:
                runner = relay.hear()
                kill_child(supervisor)
                gate.tell("go")
            _, status = os.waitpid(runner, 0)
            assert os.waitstatus_to_exitcode(status) == stop_request.RUNNER_FAILED
            relay.tell("nothing")
            assert relay.hear() == "nothing"

    @pytest.mark.parametrize(
        "lacking",
        [lambda: setattr(sys, "platform", "darwin"), lambda: setattr(lifeline, "PARENT_DEATH_SIGNAL", None)],
    )
    def test_no_such_signal(self, relay: Relay, lacking: Callable[[], None]) -> None:
        """Where the kernel does not tell of a parent's end the runner runs, without a handler."""

        def target() -> None:
            handler = signal.getsignal(signum)
            relay.tell(handler is None or handler == signal.SIG_DFL)

        assert lifeline.PARENT_DEATH_SIGNAL
        signum = lifeline.PARENT_DEATH_SIGNAL
        with supervising(target, lacking):
            assert relay.hear() is True


class TestFaults:
    @pytest.mark.parametrize(
        ("call", "error"),
        [("os.listdir", errno.ENOENT), ("os.dup2", errno.EBADF), ("socket.socket.shutdown", errno.EIO)],
    )
    def test_sockets_that_cannot_be_left(self, relay: Relay, call: str, error: int) -> None:
        """What it says matters less than its end."""

        def target() -> None:
            misbehave(call, error)
            tell_when_told(relay)

        with supervising(target) as supervisor:
            relay.hear()
            kill_child(supervisor)
            assert relay.hear() == "on_kill"

    def test_no_descriptor_left(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """A runner that has run out of descriptors ends, with all that it has started."""

        def target() -> None:
            detach(lambda: be_polite(relay))
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(list_descriptors()) + 1, 1 << 12))
            with contextlib.suppress(OSError):
                while os.dup(0):
                    pass
            tell_when_told(relay)

        with supervising(target) as supervisor:
            relay.hear(), relay.hear()
            kill_child(supervisor)
            assert relay.hear() == "on_kill"
            wait_until_left(list_left)

    @pytest.mark.parametrize("missing", ["interpreter", "name of it", "memory for it", "any memory"])
    def test_watchdog_that_cannot_be_had(self, relay: Relay, missing: str) -> None:
        """It is forked, where there is no interpreter; where memory is wanting the runner tells itself to end."""

        def target() -> None:
            if missing == "interpreter":
                sys.executable = ""
            elif missing == "name of it":
                sys.executable = None  # type: ignore[assignment]
            else:
                misbehave("os.posix_spawn", errno.ENOMEM)
            if missing == "any memory":
                misbehave("os.fork", errno.ENOMEM)
            tell_when_told(relay)

        with supervising(target) as supervisor:
            relay.hear()
            kill_child(supervisor)
            assert relay.hear() == "on_kill"

    def test_watchdog_that_does_not_come_up(self, relay: Relay) -> None:
        """The runner is told to end when its watchdog has ended before it."""

        def prepare() -> None:
            watchdog.__file__ = "/nowhere"

        with supervising(lambda: tell_when_told(relay), prepare) as supervisor:
            relay.hear()
            kill_child(supervisor)
            assert relay.hear() == "on_kill"

    def test_handler_that_raises(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """A signal whose handler raises comes in the middle, and does not keep the watchdog from being started."""

        def interrupt(supervisor: int) -> None:
            signal.raise_signal(signal.SIGALRM)

        def target() -> None:
            detach(lambda: be_polite(relay))
            signal.signal(signal.SIGALRM, lambda *_: os._exit(5))
            lifeline.leave_sockets = create_autospec(lifeline.leave_sockets, side_effect=interrupt)
            relay.tell("ready")
            pause_for_ever()

        with supervising(target) as supervisor:
            assert {type(relay.hear()), type(relay.hear())} == {int, str}
            kill_child(supervisor)
            wait_until_left(list_left)

    def test_signal_while_the_death_is_noticed(self, mocker: MockerFixture) -> None:
        """A runner that learns of the death in two ways at once starts one watchdog."""
        change = signal.pthread_sigmask
        arrivals = [1]

        def change_and_handle(how: int, signals: Any) -> Any:
            former = change(how, signals)
            # A signal that came just before is handled when the mask has changed.
            if arrivals and arrivals.pop():
                follower.start_watchdog_once()
            return former

        follower = lifeline.Lifeline(os.getppid(), conf)
        mocker.patch.object(lifeline, "leave_sockets", autospec=True)
        mocker.patch.object(lifeline, "stop_when_watchdog_ends", autospec=True)
        start = mocker.patch.object(lifeline, "start_watchdog", autospec=True)
        mocker.patch.object(signal, "pthread_sigmask", autospec=True, side_effect=change_and_handle)
        follower.start_watchdog_once()
        assert start.call_count == 1

    @pytest.mark.parametrize("missing", ["ctypes", "prctl", "handler"])
    def test_signal_that_cannot_be_asked_for(self, relay: Relay, mocker: MockerFixture, missing: str) -> None:
        """A task starts without it, too."""

        def lack_means() -> None:
            if missing == "ctypes":
                sys.modules["ctypes"] = None  # type: ignore[assignment]
            elif missing == "prctl":
                mocker.patch.object(
                    lifeline.importlib, "import_module", autospec=True, side_effect=ImportError
                )
            else:
                mocker.patch.object(
                    lifeline.Lifeline, "handle", new_callable=mocker.PropertyMock, side_effect=ImportError
                )

        with supervising(lambda: relay.tell("started"), lack_means):
            assert relay.hear() == "started"

    def test_bad_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A setting that means nothing is warned of another time: the log may be in use where the signal has come."""
        monkeypatch.setenv("AIRFLOW__WORKERS__LEFTOVER_POLICY", "nonsense")
        monkeypatch.setattr(policy, "_warned", set())
        with structlog.testing.capture_logs() as logs:
            assert lifeline.describe(conf)["ends"] is True
            assert logs == []
            policy.find_leftover_policy(conf)
            assert [log["value"] for log in logs] == ["nonsense"]


def take_for_creator(pid: int) -> None:
    """Take a process for the one that has made any socket."""
    lifeline.find_creator = create_autospec(lifeline.find_creator, return_value=pid)


class TestSpawner:
    """A runner that is a new interpreter, and knows its supervisor by a socket."""

    def follow(self, relay: Relay, prepare: Callable[[], Any]) -> None:
        """Be a supervisor whose runner does so."""

        def be_runner() -> None:
            prepare()
            lifeline.follow_spawner(theirs, conf)
            tell_when_told(relay)

        _ours, theirs = socket.socketpair()
        fork(be_runner)
        pause_for_ever()

    def test_mark_in_a_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no limit can be the mark, which its supervisor would set, it names the mark, once."""
        monkeypatch.delenv(MARK_VARIABLE, raising=False)

        def main() -> dict[str, Any]:
            os.setsid()
            lack("resource.RLIMIT_RTTIME")
            lack("socket.SO_PEERCRED")
            for _ in range(2):
                lifeline.follow_spawner(theirs, conf)
            own = processes.read_process(os.getpid())
            assert own
            return {"named": os.environ.get(MARK_VARIABLE), "mark": str(compute_mark(own))}

        _ours, theirs = socket.socketpair()
        result = run_in_fork(main)
        assert result["named"] == result["mark"]

    def test_followed(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """It ends when that has died."""
        with forked(lambda: self.follow(relay, os.setsid)) as supervisor:
            relay.hear()
            kill_child(supervisor)
            assert relay.hear() == "on_kill"
            wait_until_left(list_left)

    @pytest.mark.parametrize(
        "prepare",
        [
            lambda: None,
            in_turn(os.setsid, lambda: lack("socket.SO_PEERCRED")),
            in_turn(os.setsid, lambda: take_for_creator(os.getpid())),
        ],
        ids=["none", "unknown", "itself"],
    )
    def test_not_followed(self, relay: Relay, prepare: Callable[[], Any]) -> None:
        """Who leads no session is no runner, and a supervisor that cannot be told is not followed."""

        def prepare_and_tell() -> None:
            prepare()
            lifeline.follow_supervisor = create_autospec(
                lifeline.follow_supervisor, side_effect=lambda *_: relay.tell("followed")
            )

        with forked(lambda: self.follow(relay, prepare_and_tell)):
            assert isinstance(relay.hear(), int)


def describe(leader: int, grace: float) -> dict[str, Any]:
    """Return the watchdog's argument, as a runner would describe itself."""
    return {
        "leader": (leader, read_dead_or_alive(leader).start),
        "limits": read_limits(leader),
        "origin": read_origin(leader),
        "grace": grace,
        "ends": True,
        "spared": [],
        "path": lifeline.describe(conf)["path"],
    }


class TestWatchdog:
    """The program, run as a runner runs it."""

    def start(self, pid: int, **kwargs: Any) -> subprocess.Popen[bytes]:
        """Have it end a tree; the times of its imports are noted on stderr."""
        order = {**describe(pid, PATIENCE), **kwargs}
        options = ["-I", "-S", "-X", "importtime"]
        command = [sys.executable, *options, watchdog.__file__, json.dumps(order)]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    def lead(self, relay: Relay) -> int:
        def be_deaf_leader() -> None:
            os.setsid()
            mark_process()
            signal.signal(signal.SIGTERM, lambda *_: relay.tell("told to end"))
            signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
            relay.tell("ready")
            pause_for_ever()

        leader = fork(be_deaf_leader)
        process_tree.ProcessTree().set_leader(leader)
        assert relay.hear() == "ready"
        return leader

    def test_stands_alone(self, relay: Relay) -> None:
        """It imports neither site nor Airflow, nor anybody's module but psutil, and ends with the task."""
        leader = self.lead(relay)
        process = self.start(leader)
        assert relay.hear() == "told to end"
        os.kill(leader, signal.SIGUSR1)
        _, notes = process.communicate(timeout=PATIENCE)
        imported = {line.rpartition(b"|")[2].strip().decode() for line in notes.splitlines() if b"|" in line}
        modules = ("orphans", "ending", "exit_status", "process_tree", "processes", "marks", "sudo")
        ours = {f"{watchdog.PACKAGE}.{name}" for name in modules}
        assert {name for name in imported if name.startswith("airflow")} <= ours
        assert "psutil" in imported
        assert not {"site", "structlog", "attrs", "pydantic", "asyncio"} & imported
        assert process.returncode == 0

    def test_signal_while_it_starts(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """Whoever ends all processes of a service does not end it before it can ignore that."""
        leader = self.lead(relay)
        watchdog = lifeline.execute_watchdog(describe(leader, grace=0.2))
        os.kill(watchdog, signal.SIGTERM)
        assert relay.hear() == "told to end"
        assert ended_by(leader) == signal.SIGKILL
        os.waitpid(watchdog, 0)
        assert list_left() == []

    def test_is_on_its_own(self, relay: Relay) -> None:
        """It leads a session, carries no marks, and does not heed who ends all processes of a service at once."""

        def run_in_tree() -> dict[str, Any]:
            # What a runner executes inherits its marks.
            os.setsid()
            mark_process()
            process_tree.ProcessTree().set_leader(leader)
            process = self.start(leader)
            assert relay.hear() == "told to end"
            for signum in watchdog.IGNORED:
                process.send_signal(signum)
            outcome = [
                os.getsid(process.pid) == process.pid,
                read_limits(process.pid),
                read_origin(process.pid),
            ]
            os.kill(leader, signal.SIGUSR1)
            return {
                "outcome": outcome,
                "code": process.wait(PATIENCE),
                "own": bool(read_limits(os.getpid())),
            }

        leader = self.lead(relay)
        assert run_in_fork(run_in_tree) == {"outcome": [True, [], None], "code": 0, "own": True}

    def test_kills(self, relay: Relay) -> None:
        """It kills the deaf when the grace is over, and nobody who has got the leader's number since."""
        leader = self.lead(relay)
        start = read_dead_or_alive(leader).start
        namesake = self.start(leader, leader=(leader, start - 1), limits=[], origin=None, grace=0.1)
        assert namesake.wait(PATIENCE) == 0
        assert processes.read_process(leader) is not None
        assert self.start(leader, grace=0.1).wait(PATIENCE) == 0
        assert ended_by(leader) == signal.SIGKILL


def list_children() -> list[int]:
    """Return the PIDs of the calling process' children, dead or alive."""
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return [int(pid) for pid in children.read().split()]
