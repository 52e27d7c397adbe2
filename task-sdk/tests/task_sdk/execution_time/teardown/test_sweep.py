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
import ctypes
import errno
import functools
import io
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil
import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.faults import (
    become_nobody,
    misbehave,
    mount_proc,
    run_in_fork,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    PR_SET_CHILD_SUBREAPER,
    Api,
    Relay,
    be_deaf,
    be_polite,
    detach,
    end_task,
    ending_all,
    fork,
    forked,
    hear_ready,
    in_turn,
    keep_open,
    kill_child,
    leave_others_alone,
    limit_realtime,
    look_at_own_processes,
    pause_for_ever,
    set_grace,
    set_name,
    start_task,
    supervising,
    wait_to_end,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess, conf
from airflow.sdk.execution_time.teardown import marks, orphans, processes, sweep
from airflow.sdk.execution_time.teardown.marks import condemn, is_condemned, read_origin
from airflow.sdk.execution_time.teardown.orphans import end_orphans
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_mock import MockerFixture

MUTEX_BYTES = 64

STARTING = 120
"""Seconds that an interpreter which imports Airflow may take on a busy machine."""


@pytest.fixture(autouse=True)
def list_left(monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture) -> Iterator[Callable[[], list[int]]]:
    """End every process that a test has started, and no other; gives a function that lists those that live."""
    leave_others_alone(monkeypatch)
    look_at_own_processes(monkeypatch)
    mocker.patch.object(ActivitySubprocess, "_upload_logs", autospec=True)
    monkeypatch.setattr(sweep, "end_orphans", functools.partial(end_orphans, grace=PATIENCE))
    with ending_all() as list_left:
        yield list_left


def sweep_apart() -> dict[str, Any]:
    """Look for orphans once, in a process of its own; return what is logged."""

    def main() -> dict[str, Any]:
        with structlog.testing.capture_logs() as logs:
            sweep.sweep_once(conf)
        return {"logs": logs}

    [entry, *others] = run_in_fork(main)["logs"] or [{}]
    assert others == []
    return dict(entry)


def run(*arguments: str) -> tuple[int, list[str]]:
    """Run the command in a process of its own; return its status, and the lines that it has printed."""

    def main() -> dict[str, Any]:
        out = io.BytesIO()
        text = io.TextIOWrapper(out, write_through=True)
        # A logger may have kept a stream of an earlier test, which is closed, or want one for bytes.
        with structlog.testing.capture_logs(), contextlib.redirect_stdout(text):
            status = sweep.main(arguments)
        return {"status": status, "out": out.getvalue().decode().splitlines()}

    outcome = run_in_fork(main)
    return outcome["status"], outcome["out"]


def be_runner_in_c(tell: Callable[[], None]) -> None:
    """Wait in C for what never comes, a mutex that is locked already, and for no signal; ``tell`` runs once it waits."""
    mutex = ctypes.create_string_buffer(MUTEX_BYTES)
    threading.Thread(target=tell_when_waiting, args=(ctypes.addressof(mutex), tell), daemon=True).start()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def tell_when_waiting(mutex: int, tell: Callable[[], None]) -> None:
    """Run ``tell`` once the main thread waits for a mutex, whose address is the first argument of its futex(2)."""
    while not is_within(mutex, Path(f"/proc/self/task/{os.getpid()}/syscall").read_text().split()):
        os.sched_yield()
    tell()


def is_within(mutex: int, call: list[str]) -> bool:
    """Whether a system call's first argument is an address within a mutex; a thread that runs has none."""
    return len(call) > 1 and 0 <= int(call[1], 16) - mutex < MUTEX_BYTES


def leave(
    relay: Relay, daemon: Callable[[Relay], None] = be_polite, *, in_c: bool = False
) -> tuple[int, int]:
    """Have the supervisor die of a task whose runner cannot notice it; return the PIDs of runner and daemon."""

    def target() -> None:
        detach(lambda: daemon(relay))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        if in_c:
            be_runner_in_c(tell)
        tell()
        pause_for_ever()

    def tell() -> None:
        relay.tell(["runner", os.getpid()])

    with supervising(target) as dying:
        told = {type(pid): pid for pid in (relay.hear(), relay.hear())}
        runner = told[list][1]
        if not in_c:
            # It comes before the signal of the supervisor's end, whose number is higher.
            os.kill(runner, signal.SIGSTOP)
        kill_child(dying)
        if not in_c:
            os.waitid(os.P_PID, runner, os.WSTOPPED)
    return runner, told[int]


def was_condemned(pid: int) -> bool:
    origin = read_origin(pid)
    assert origin is not None
    return is_condemned(origin)


def name_shared(relay: Relay) -> None:
    set_name(b"shared")
    relay.tell(["shared", os.getpid()])


def name_and_tell(relay: Relay) -> None:
    set_name(b"shared")
    be_polite(relay)


class TestSweep:
    @pytest.mark.parametrize("in_c", [False, True], ids=["stopped", "in C"])
    @pytest.mark.parametrize("daemon", [be_polite, be_deaf], ids=lambda daemon: daemon.__name__)
    def test_nothing_is_left(
        self,
        relay: Relay,
        monkeypatch: pytest.MonkeyPatch,
        list_left: Callable[[], list[int]],
        daemon: Callable[[Relay], None],
        *,
        in_c: bool,
    ) -> None:
        """A task whose runner does not notice is ended with all that it has started, and the log says so."""
        monkeypatch.setattr(sweep, "end_orphans", functools.partial(end_orphans, grace=0.3))
        runner, _ = leave(relay, daemon, in_c=in_c)
        name = psutil.Process(runner).name()
        entry = sweep_apart()
        assert entry["runners"] == [{"pid": runner, "name": name}]
        assert (entry["processes"], entry["survivors"]) == (1, [])
        assert list_left() == []

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
        """What the deployment has chosen for leftovers is heeded; the runner ends in any case."""
        monkeypatch.setenv("AIRFLOW__WORKERS__LEFTOVER_POLICY", policy)
        runner, daemon = leave(relay)
        entry = sweep_apart()
        assert entry["event"] == "Ended tasks whose supervisors had died", entry
        assert entry["runners"][0]["pid"] == runner
        assert list_left() == [daemon] * stays

    def test_living_supervisors(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """A task whose supervisor lives is left alone, be it stopped, and so is what a success has left."""

        def succeed() -> None:
            # It does not hold the sockets, for which the supervisor would wait.
            detach(in_turn(lambda: keep_open(relay.writer), lambda: be_polite(relay)))

        def supervise_success() -> None:
            code = start_task(succeed).wait()
            relay.tell(["code", code])
            pause_for_ever()

        with supervising(in_turn(lambda: relay.tell(os.getpid()), pause_for_ever)) as living:
            stopped = relay.hear()
            os.kill(stopped, signal.SIGSTOP)
            with forked(supervise_success) as dying:
                told = [relay.hear(), relay.hear()]
                told.remove(["code", 0])
                kill_child(dying)
            assert sweep_apart() == {}
            assert sorted(list_left()) == sorted([living, stopped, *told])

    @pytest.mark.parametrize("way", ["conflict", "failed"])
    @pytest.mark.parametrize("runner_lives", [True, False])
    def test_teardown_that_is_cut_off(
        self,
        relay: Relay,
        monkeypatch: pytest.MonkeyPatch,
        mocker: MockerFixture,
        list_left: Callable[[], list[int]],
        way: str,
        *,
        runner_lives: bool,
    ) -> None:
        """What a supervisor has stopped that dies before it kills is killed, and who is spared is not."""
        monkeypatch.setenv("AIRFLOW__WORKERS__SPARED_LEFTOVERS", "shared")
        monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", 0.1)
        set_grace(monkeypatch, 0.3)

        def target() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            detach(lambda: be_deaf(relay))
            detach(in_turn(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: name_shared(relay)))
            relay.tell({"runner": os.getpid()})
            wait_to_end(relay)

        def die_before_it_kills(tree: ProcessTree, processes: Any, *signals: int, **kwargs: Any) -> None:
            if signal.SIGKILL in signals:
                os.kill(os.getpid(), signal.SIGKILL)
            send(tree, processes, *signals, **kwargs)

        def supervise() -> None:
            mocker.patch.object(ProcessTree, "signal", autospec=True, side_effect=die_before_it_kills)
            api = Api()
            # What the runner starts is to have its origin.
            process = start_task(in_turn(start.hear, target), api)
            start.tell("start")
            order.hear()
            end_task(way, process, api)

        send = ProcessTree.signal
        start, order = Relay(), Relay()
        with contextlib.closing(start), contextlib.closing(order), forked(supervise) as dying:
            told = {type(value): value for value in hear_ready(relay, 3)}
            runner, daemon, shared = told[dict]["runner"], told[int], told[list][1]
            order.tell("end it")
            os.waitpid(dying, 0)
        left = {runner, daemon} if way == "conflict" else {daemon}
        assert set(list_left()) == {shared, *left}
        assert {pid: was_condemned(pid) for pid in (shared, *left)} == {
            shared: False,
            **dict.fromkeys(left, True),
        }
        if way == "conflict" and not runner_lives:
            kill_child(runner)
        assert sweep_apart()["survivors"] == []
        assert list_left() == [shared]

    @pytest.mark.parametrize("limits", [None, "older", "younger"])
    def test_death_in_the_grace(
        self,
        relay: Relay,
        mocker: MockerFixture,
        list_left: Callable[[], list[int]],
        limits: str | None,
    ) -> None:
        """What a failed task has left, and was asked to end when the supervisor died, does not stay, whatever sets its limit."""

        def leave_two() -> None:
            for which in ("older", "younger"):
                limit = [limit_realtime] if which == limits else []
                detach(in_turn(*limit, lambda: be_deaf(relay)))

        def ask_and_die(tree: ProcessTree, processes: Any, *signals: int, **kwargs: Any) -> None:
            ask(tree, processes, *signals, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        def supervise() -> None:
            mocker.patch.object(ProcessTree, "signal", autospec=True, side_effect=ask_and_die)
            process = start_task(in_turn(leave_two, lambda: wait_to_end(relay)))
            order.hear()
            end_task("failed", process, Api())

        ask = ProcessTree.signal
        order = Relay()
        with contextlib.closing(order), forked(supervise) as dying:
            daemons = hear_ready(relay, 2)
            order.tell("end it")
            os.waitpid(dying, 0)
        assert sorted(list_left()) == sorted(daemons)
        assert sweep_apart()["survivors"] == []
        assert list_left() == []

    @pytest.mark.parametrize("sets_limit", [None, "runner", "supervisor"])
    @pytest.mark.parametrize(
        "leaves",
        [fork, lambda main: fork(in_turn(os.setsid, main)), detach],
        ids=["child", "session", "daemon"],
    )
    def test_tree_around(
        self,
        relay: Relay,
        list_left: Callable[[], list[int]],
        leaves: Callable[[Callable[[], None]], object],
        sets_limit: str | None,
    ) -> None:
        """A supervisor that is part of an orphaned tree, for it supervises a task within a task, leaves that alone."""

        def look() -> None:
            limit("supervisor")
            order.hear()
            sweep.sweep_once(conf)
            relay.tell("looked")
            pause_for_ever()

        def limit(who: str) -> None:
            if who == sets_limit:
                limit_realtime()

        def target() -> None:
            leaves(look)
            limit("runner")
            relay.tell(os.getpid())
            pause_for_ever()

        order = Relay()
        with contextlib.closing(order), supervising(target) as dying:
            runner = relay.hear()
            os.kill(runner, signal.SIGSTOP)
            kill_child(dying)
            os.waitid(os.P_PID, runner, os.WSTOPPED)
            order.tell("look")
            assert relay.hear() == "looked"
            assert runner in list_left()
            assert [entry["pid"] for entry in sweep_apart()["runners"]] == [runner]
            assert list_left() == []

    def test_hidden_ancestors(self, relay: Relay) -> None:
        """Where /proc hides those of the next supervisor, it ends orphans all the same."""

        def main() -> dict[str, Any]:
            mount_proc(b"hidepid=1")
            become_nobody()
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            assert processes.read_process(1) is None
            runner, _ = leave(relay)
            # Those of others are not for a test to end.
            orphans.list_pids = lambda: [each for each in processes.list_pids() if each[0] == runner]
            # Nobody sees that it is stopped.
            sweep.end_orphans = functools.partial(end_orphans, grace=0.1)
            with structlog.testing.capture_logs() as logs:
                sweep.sweep_once(conf)
            return {"events": [entry["event"] for entry in logs]}

        assert run_in_fork(main) == {"events": ["Ended tasks whose supervisors had died"]}

    def test_spared_program_that_is_condemned(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """What has become a program to be spared while it was ended is spared."""
        runner, daemon = leave(relay, name_and_tell)
        condemn(daemon)
        monkeypatch.setenv("AIRFLOW__WORKERS__SPARED_LEFTOVERS", "shared")
        kill_child(runner)
        assert sweep_apart() == {}
        assert list_left() == [daemon]


class TestSweepOnce:
    def test_first_start(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, list_left: Callable[[], list[int]]
    ) -> None:
        """What is an orphan when a process starts its first task is gone when that runs; the task is not."""
        monkeypatch.setattr(supervisor, "sweep_once", sweep.sweep_once)
        leave(relay)

        def start() -> dict[str, Any]:
            process = start_task(in_turn(lambda: relay.tell("runs"), pause_for_ever))
            assert relay.hear() == "runs"
            return {"left": [pid for pid in list_left() if pid != os.getpid()], "runner": process.pid}

        outcome = run_in_fork(start)
        assert outcome["left"] == [outcome["runner"]]

    def test_what_an_orphan_was_about_to_kill(self, mocker: MockerFixture) -> None:
        """It is an orphan only when that one has ended; but nobody is swept for ever, or again who survives."""
        own = processes.read_process(os.getpid())
        assert own
        one, other = (orphans.Orphan(own, (), origin) for origin in (1, 2))
        find = mocker.patch.object(sweep, "find_orphans", autospec=True)
        end = mocker.patch.object(sweep, "sweep", autospec=True, return_value=[])
        find.side_effect = [[one], [other], []]
        assert sweep.sweep_repeatedly(conf) == []
        assert [call.args[1] for call in end.mock_calls] == [[one], [other]]
        end.reset_mock()
        find.side_effect = itertools.repeat([one])
        sweep.sweep_repeatedly(conf)
        assert end.call_count == sweep.MAX_SWEEPS
        end.reset_mock()
        end.return_value = [one.process]
        assert sweep.sweep_repeatedly(conf) == [one.process]
        end.assert_called_once()

    def test_number_that_is_used_again(self) -> None:
        """The tree of an orphan is what its own marks tell, not those of whoever has got its number since."""
        own = processes.read_process(os.getpid())
        assert own
        mark, origin = marks.MARK_FLAG | 1, marks.MARK_FLAG | 2
        tree = sweep.make_tree(orphans.Orphan(own, (mark,), origin), conf)
        assert tree._mark == mark
        assert {mark, origin} <= tree._marks

    def test_once(self, mocker: MockerFixture) -> None:
        """A process looks once, and one that it forks looks for itself."""

        def note_look() -> list[Any]:
            looks.append(os.getpid())
            return []

        looks: list[int] = []
        mocker.patch.object(sweep, "find_orphans", autospec=True, side_effect=note_look)

        def look_twice() -> dict[str, Any]:
            sweep.sweep_once(conf)
            sweep.sweep_once(conf)
            return {"looks": len(looks), "own": looks[-1] == os.getpid()}

        def fork_between() -> dict[str, Any]:
            first = look_twice()
            looks.clear()
            return {"first": first, "second": run_in_fork(look_twice)}

        assert set(map(str, run_in_fork(fork_between).values())) == {"{'looks': 1, 'own': True}"}

    @pytest.mark.parametrize("forks", [False, True])
    def test_threads(self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, *, forks: bool) -> None:
        """The start of another thread waits until orphans are ended; that of a process which is forked meanwhile does not."""

        class TellingLock(contextlib.AbstractContextManager[None]):
            def __init__(self) -> None:
                self._lock = threading.Lock()

            def __enter__(self) -> None:
                if not self._lock.acquire(blocking=False):
                    events.put("waits")
                    self._lock.acquire()

            def __exit__(self, *_: object) -> None:
                self._lock.release()

        def look() -> list[Any]:
            if threading.current_thread() is not threading.main_thread():
                looking.set()
                first.append(events.get(timeout=PATIENCE))
            return []

        def sweep_here() -> dict[str, Any]:
            sweep.sweep_once(conf)
            return {}

        def start() -> dict[str, Any]:
            monkeypatch.setattr(sweep, "_sweeping", TellingLock())
            thread = threading.Thread(target=sweep.sweep_once, args=(conf,))
            thread.start()
            looking.wait()
            run_in_fork(sweep_here) if forks else sweep_here()
            events.put("returns")
            thread.join()
            return {"first": first}

        looking = threading.Event()
        events: queue.SimpleQueue[str] = queue.SimpleQueue()
        first: list[str] = []
        mocker.patch.object(sweep, "find_orphans", autospec=True, side_effect=look)
        assert run_in_fork(start)["first"] == ["returns" if forks else "waits"]

    def test_failure(self) -> None:
        """A task starts also where orphans cannot be looked for, which the log says."""

        def main() -> dict[str, Any]:
            # Those of others are not for a test to end.
            orphans.list_pids = lambda: [each for each in processes.list_pids() if each[0] == os.getpid()]
            misbehave("os.scandir", errno.EMFILE, times={1})
            looks = mock.create_autospec(sweep.find_orphans, side_effect=sweep.find_orphans)
            sweep.find_orphans = looks
            with structlog.testing.capture_logs() as logs:
                for _ in range(3):
                    sweep.sweep_once(conf)
            return {"events": [entry["event"] for entry in logs], "looks": looks.call_count}

        outcome = run_in_fork(main)
        assert outcome["events"] == ["Failed to look for tasks whose supervisors have died"]
        assert outcome["looks"] == 2, "the next start looks again, until one look has not failed"


class TestSweepCommand:
    def test_dry_run(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """It lists orphans, and ends none."""
        assert run("--dry-run") == (0, [])
        runner, daemon = leave(relay)
        name = psutil.Process(runner).name()
        condemn(daemon)
        assert was_condemned(daemon)
        status, lines = run("--dry-run")
        assert status == 0
        assert sorted(lines) == [
            f"process that was about to be killed without a supervisor: PID {daemon} ({name})",
            f"task runner without a supervisor: PID {runner} ({name})",
        ]
        assert sorted(list_left()) == sorted([runner, daemon])

    def test_end(self, relay: Relay, list_left: Callable[[], list[int]]) -> None:
        """It names, and ends, what it finds."""
        runner, _ = leave(relay)
        status, [line, *_] = run()
        assert status == 0
        assert f"PID {runner} " in line
        assert list_left() == []
        assert run() == (0, [])

    def test_survivors(self, relay: Relay, mocker: MockerFixture) -> None:
        """It fails if something could not be ended."""
        leave(relay)
        mocker.patch.object(
            sweep,
            "end_orphans",
            autospec=True,
            side_effect=lambda trees: [tree.leader for tree in trees if tree.leader],
        )
        assert run()[0] == 1

    def test_unknown_argument(self, mocker: MockerFixture) -> None:
        """It is refused, and nothing is looked for."""
        find = mocker.patch.object(sweep, "find_orphans", autospec=True, return_value=[])
        with pytest.raises(SystemExit) as refused:
            sweep.main(["--unknown"])
        assert refused.value.code == 2
        find.assert_not_called()

    def test_program(self, relay: Relay, tmp_path: Path) -> None:
        """It runs as a program, with no more than an Airflow home."""
        runner, _ = leave(relay)
        done = subprocess.run(
            [sys.executable, "-m", sweep.__name__, "--dry-run"],
            env={"PATH": os.environ["PATH"], "AIRFLOW_HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STARTING,
            check=True,
        )
        assert f"task runner without a supervisor: PID {runner} " in done.stdout
