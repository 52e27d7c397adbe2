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
A task ends with its process group, at once, and without a traceback: real forks, real sockets, real signals.

Nothing here needs what the fix added, so that each test shows on an unfixed supervisor what goes wrong there.
The tests of :class:`TestUnchanged` pass on both. :class:`TestForwarding` is for releases before 1.4; from there on a
supervisor that is told to stop sends nothing, and lets the task finish. :class:`TestRuntimes` is for releases from
1.4 on, which run tasks in other languages, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import select
import selectors
import signal
import stat
import subprocess
import sys
import traceback
from functools import partialmethod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psutil
import pytest
import structlog

from airflow.sdk.api.client import ServerResponseError
from airflow.sdk.api.datamodels._generated import TaskInstance, TIRunContext
from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess, WatchedSubprocess

try:
    from airflow.sdk.coordinators._subprocess import _PopenActivitySubprocess
except ImportError:  # before 1.4
    _PopenActivitySubprocess = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 5
"""Seconds after which an event that should come has not come."""

NEVER = 3600
"""Seconds to wait for what must not be waited for."""

PR_SET_CHILD_SUBREAPER = 36

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


class Relay:
    """A pipe over which any process of a test's tree tells the test something, one JSON value a line."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._unread = b""

    def tell(self, value: Any) -> None:
        os.write(self.writer, json.dumps(value).encode() + b"\n")

    def hear(self) -> Any:
        while b"\n" not in self._unread:
            assert select.select([self.reader], [], [], PATIENCE)[0], "nothing was told"
            self._unread += os.read(self.reader, 4096)
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Tree:
    """The processes of a test, held by pidfd so that it can wait for them."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}

    def add(self, pid: int) -> int:
        self._pidfds[pid] = os.pidfd_open(pid)
        return pid

    def gone(self, pid: int, timeout: float = PATIENCE) -> bool:
        """Wait until ``pid`` has ended; False if it still runs after ``timeout`` seconds."""
        return bool(select.select([self._pidfds[pid]], [], [], timeout)[0])

    def runs(self, pid: int) -> bool:
        return not self.gone(pid, timeout=0)

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay()
    yield relay
    relay.close()


@pytest.fixture
def tree() -> Iterator[Tree]:
    tree = Tree()
    yield tree
    tree.close()


@pytest.fixture(scope="module", autouse=True)
def adopt_orphans() -> Iterator[None]:
    """Become the parent of whatever a test leaves behind, so that :func:`leave_nothing` finds it (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def leave_nothing(adopt_orphans: None) -> Iterator[None]:
    """End every process that a test has started, however the test ends."""
    before = psutil.Process().children(recursive=True)
    yield
    while left := set(psutil.Process().children(recursive=True)).difference(before):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


@pytest.fixture(autouse=True)
def limit_time(leave_nothing: None) -> Iterator[None]:
    """Turn a wait without an end, which is what some of these tests are about, into a failure."""

    def fail(signum: int, frame: Any) -> None:
        raise TimeoutError("the supervisor waits for ever")

    former = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture(autouse=True)
def quick_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivitySubprocess, "_upload_logs", lambda self: None)
    monkeypatch.setattr(supervisor, "SOCKET_CLEANUP_TIMEOUT", 0.1)
    monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", 0.1)


class Log(structlog.testing.LogCapture):
    """A task log that keeps its events."""

    def __init__(self) -> None:
        super().__init__()
        level = structlog.make_filtering_bound_logger(logging.NOTSET)
        self.logger = structlog.wrap_logger(None, processors=[self], wrapper_class=level).bind()

    def find(self, text: str) -> list[str]:
        return [entry["event"] for entry in self.entries if text in entry["event"]]


class Api:
    """The part of the Execution API that a task's life touches."""

    def __init__(self, *, should_retry: bool = False) -> None:
        self.task_instances = self
        self.finished: list[str] = []
        self.terminate = False
        self._context = TIRunContext.model_construct(should_retry=should_retry, max_tries=0, start_date=None)

    def start(self, *args: Any, **kwargs: Any) -> TIRunContext:
        return self._context

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        if self.terminate:
            raise conflict()

    def finish(self, *, state: str, **kwargs: Any) -> None:
        self.finished.append(str(getattr(state, "value", state)))


def conflict() -> ServerResponseError:
    """Return what the client raises when the server says that the task should not be running any more."""
    http = sys.modules[ServerResponseError.__base__.__module__.partition(".")[0]]
    request = http.Request("PUT", "http://127.0.0.1/")
    error = ServerResponseError("conflict", request=request, response=http.Response(409, request=request))
    error.detail = {"reason": "not_running"}
    return error


def start_task(target: Callable[[], None], client: Any = None, **kwargs: Any) -> ActivitySubprocess:
    """Start a supervised task that runs ``target`` instead of a Dag."""
    return ActivitySubprocess.start(target=target, **describe_task(client, **kwargs))


def describe_task(client: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments that every way to start a task takes."""
    fields = {
        "id": uuid4(),
        "task_id": "t",
        "dag_id": "d",
        "run_id": "r",
        "try_number": 1,
        "map_index": -1,
        "dag_version_id": uuid4(),
        "queue": "default",
        "pool_slots": 1,
        "priority_weight": 1,
    }
    what = TaskInstance.model_construct(**{k: v for k, v in fields.items() if k in TaskInstance.model_fields})
    return {
        "what": what,
        "dag_rel_path": "d.py",
        "bundle_info": SimpleNamespace(name="b", version=None),
        "client": client or Api(),
        "logger": Log().logger,
        **kwargs,
    }


@contextlib.contextmanager
def ending(process: WatchedSubprocess) -> Iterator[WatchedSubprocess]:
    """End ``process`` by its PID when the test is over, however it ends."""
    pidfd = os.pidfd_open(process.pid)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        os.close(pidfd)


def pause_for_ever() -> None:
    while True:
        signal.pause()


HOLDERS = ["stdin", "stdout", "stderr", "logs"]


def leave_holder(relay: Relay, held: str) -> None:
    """Start a process out of reach that holds one socket of the task; on stdin are its requests. Then wait."""

    def hold() -> None:
        resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sockets = {"stdin": [0], "stdout": [1], "stderr": [2], "logs": list_sockets()}[held]
        keep_open(relay.writer, *sockets)
        relay.tell(os.getpid())

    detach(hold)
    pause_for_ever()


def detach(prepare: Callable[[], Any]) -> None:
    """Start a daemon that runs ``prepare`` and then waits for signals: in its own session, its parent gone."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    os.setsid()
    if os.fork() == 0:
        prepare()
        pause_for_ever()
    os._exit(0)


def list_sockets() -> list[int]:
    """Return the sockets of this process other than its standard streams."""
    return [fd for fd in list_descriptors() if fd > 2 and stat.S_ISSOCK(os.fstat(fd).st_mode)]


def list_descriptors() -> list[int]:
    with os.scandir("/proc/self/fd") as entries:
        listed = [int(entry.name) for entry in entries]
    return [fd for fd in listed if os.access(f"/proc/self/fd/{fd}", os.F_OK, follow_symlinks=False)]


def keep_open(*kept: int) -> None:
    for fd in set(list_descriptors()) - set(kept):
        os.close(fd)


class TestGroup:
    def test_task_leads_a_session(self, relay: Relay) -> None:
        """A task runner is the leader of a session and a process group of its own, which no terminal stops."""

        def target() -> None:
            relay.tell([os.getpid(), os.getsid(0), os.getpgid(0)])
            pause_for_ever()

        with ending(start_task(target)) as process:
            assert relay.hear() == [process.pid] * 3

    def test_kill_takes_the_group_along(self, relay: Relay, tree: Tree) -> None:
        """What the task has started, and left in its group, ends with it: apache/airflow issue 65505."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            pause_for_ever()

        with ending(start_task(target)) as process:
            child = tree.add(relay.hear())
            process.kill(signal.SIGTERM, escalation_delay=0.1, force=True)
            assert tree.gone(child)

    def test_heartbeat_conflict_takes_the_group_along(self, relay: Relay, tree: Tree) -> None:
        """A task that the server does not want any more ends with its children, as "server terminated"."""
        api = Api()

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            pause_for_ever()

        with ending(start_task(target, api)) as process:
            child = tree.add(relay.hear())
            api.terminate = True
            process.wait()
            assert tree.gone(child)
            assert process.final_state.upper() == "SERVER_TERMINATED"

    @pytest.mark.parametrize("setsid", ["refused", "pending"])
    def test_own_group_is_never_signalled(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, setsid: str
    ) -> None:
        """A task without a session, or before it has one, is killed alone: its supervisor's group lives on."""
        asked = Relay()

        def refuse(*args: Any) -> None:
            asked.tell("setsid")
            if setsid == "pending":
                pause_for_ever()
            raise PermissionError

        def supervise() -> None:
            # In a group of its own, so that a mistake ends these processes and not the test runner.
            os.setpgid(0, 0)
            monkeypatch.setattr(os, "setsid", refuse)
            relay.tell(subprocess.Popen(SLEEPER).pid)
            process = start_task(pause_for_ever)
            assert asked.hear() == "setsid"
            runner = os.pidfd_open(process.pid)
            process.kill(signal.SIGKILL, escalation_delay=0.1)
            relay.tell(["killed", bool(select.select([runner], [], [], PATIENCE)[0])])
            pause_for_ever()

        with forked(supervise):
            neighbour = tree.add(relay.hear())
            assert relay.hear() == ["killed", True]
            assert tree.runs(neighbour)
        asked.close()


def list_left() -> list[int]:
    """Return what is left of all trees; :func:`adopt_orphans` makes them all ours."""
    children = psutil.Process().children(recursive=True)
    return [process.pid for process in children if process.status() != psutil.STATUS_ZOMBIE]


def wait_to_end(relay: Relay) -> None:
    """Be a runner that can be told to fail."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(1))
    relay.tell("ready")
    pause_for_ever()


def hear_ready(relay: Relay, processes: int = 1) -> list[int]:
    """Wait until a runner is ready, and as many of its processes have told their PID; return these."""
    told = [relay.hear() for _ in range(processes + 1)]
    told.remove("ready")
    return told


def end_task(way: str, process: ActivitySubprocess, api: Api) -> None:
    if way == "conflict":
        api.terminate = True
    else:
        os.kill(process.pid, {"killed": signal.SIGKILL, "failed": signal.SIGUSR1}[way])
    process.wait()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are deaf to SIGTERM be killed soon."""
    set_grace(monkeypatch, 0.3)


def set_grace(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME", str(seconds))
    # From 1.4 on it is read at import.
    monkeypatch.setattr(supervisor, "KILLED_TASK_CLEANUP_TIME", seconds, raising=False)


def be_polite(relay: Relay) -> None:
    relay.tell(os.getpid())


def be_exec(relay: Relay) -> None:
    """Drop the environment, as ``env -i`` does."""
    tell = f"import os, time; os.write({relay.writer}, b'%d\\n' % os.getpid()); time.sleep(600)"
    os.set_inheritable(relay.writer, True)
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", tell], {})  # noqa: S606


def be_stopped(relay: Relay) -> None:
    relay.tell(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def be_deaf(relay: Relay) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    relay.tell(os.getpid())


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


DAEMONS = [be_polite, be_exec, be_stopped, be_deaf, be_phoenix, be_forker, be_pool]


@pytest.mark.usefixtures("short_grace")
class TestLeftovers:
    """What has left the task's group, its session, or lost its parent, ends with the task."""

    @pytest.mark.parametrize("way", ["conflict", "killed", "failed"])
    @pytest.mark.parametrize("daemon", DAEMONS, ids=lambda daemon: daemon.__name__)
    def test_nothing_is_left(self, relay: Relay, daemon: Callable[[Relay], None], way: str) -> None:
        """Whatever the daemon does, and however the task ends but well."""
        api = Api()
        process = start_task(lambda: (detach(lambda: daemon(relay)), wait_to_end(relay)), api)
        hear_ready(relay)
        end_task(way, process, api)
        assert list_left() == []

    def test_child_in_the_group_of_a_failed_task_ends(self, relay: Relay) -> None:
        """A runner that fails, or that the kernel kills, takes its group along."""
        process = start_task(lambda: (relay.tell(subprocess.Popen(SLEEPER).pid), wait_to_end(relay)))
        hear_ready(relay)
        end_task("failed", process, Api())
        assert list_left() == []

    def test_task_that_does_not_start_leaves_nothing(self, relay: Relay) -> None:
        """A task that the server refuses is killed with all that it has started already."""

        class Refusing(Api):
            def start(self, *args: Any, **kwargs: Any) -> TIRunContext:
                relay.hear()
                raise conflict()

        with pytest.raises(ServerResponseError):
            start_task(lambda: (detach(lambda: be_polite(relay)), wait_to_end(relay)), Refusing())
        assert list_left() == []

    def test_runner_goes_first(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """The runner has the grace for its on_kill, in which its daemons are left alone."""
        set_grace(monkeypatch, PATIENCE)
        api = Api()

        def target() -> None:
            def on_kill(*_: Any) -> None:
                relay.tell("on_kill")
                select.select([], [], [], 0.5)
                relay.tell(tree.runs(daemon))
                os._exit(1)

            started = Relay()
            detach(lambda: be_polite(started))
            daemon = tree.add(started.hear())
            signal.signal(signal.SIGTERM, on_kill)
            relay.tell("ready")
            pause_for_ever()

        process = start_task(target, api)
        assert relay.hear() == "ready"
        end_task("conflict", process, api)
        assert [relay.hear(), relay.hear()] == ["on_kill", True]
        assert list_left() == []

    def test_last_words_arrive(self, relay: Relay) -> None:
        """What a leftover writes when it is told to end is in the task's log."""

        def speak(*_: Any) -> None:
            os.write(1, b"last words\n")
            os._exit(0)

        def be_talkative() -> None:
            signal.signal(signal.SIGTERM, speak)
            relay.tell(os.getpid())

        log = Log()
        process = start_task(lambda: (detach(be_talkative), wait_to_end(relay)), logger=log.logger)
        hear_ready(relay)
        end_task("killed", process, Api())
        assert log.find("last words") == ["last words"]

    def test_held_socket_does_not_outlast_leftovers(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once they have ended, nobody waits for a heartbeat to find that somebody out of reach holds a socket."""
        for interval in ("SOCKET_CLEANUP_TIMEOUT", "MIN_HEARTBEAT_INTERVAL", "HEARTBEAT_TIMEOUT"):
            monkeypatch.setattr(supervisor, interval, NEVER)
        process = start_task(lambda: (detach(lambda: be_polite(relay)), leave_holder(relay, "stdout")))
        relay.hear(), relay.hear()
        end_task("killed", process, Api())
        assert len(list_left()) == 1

    def test_log_names_what_was_ended(self, relay: Relay) -> None:
        """One event with number, PID, name and signal, and no command line, which may hold a secret."""
        log = Log()
        process = start_task(lambda: (detach(lambda: be_deaf(relay)), wait_to_end(relay)), logger=log.logger)
        [pid] = hear_ready(relay)
        name = psutil.Process(pid).name()
        end_task("failed", process, Api())
        [event] = [entry for entry in log.entries if "left running" in entry["event"]]
        assert event["processes"] == [{"pid": pid, "name": name, "signal": "SIGKILL"}]
        assert event["count"] == 1

    def test_log_is_silent_when_nothing_was_left(self) -> None:
        log = Log()
        start_task(lambda: os._exit(1), logger=log.logger).wait()
        assert log.find("exited abnormally")
        assert not log.find("left running")

    def test_bystanders_live(self, relay: Relay, tree: Tree) -> None:
        """Another task with the same tree, and processes of the supervisor, are not the task's."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            detach(lambda: be_polite(relay))
            wait_to_end(relay)

        neighbours = [
            tree.add(subprocess.Popen(SLEEPER, start_new_session=session).pid) for session in (False, True)
        ]
        other = start_task(target)
        neighbours += [tree.add(pid) for pid in (other.pid, *hear_ready(relay, 2))]
        process = start_task(target)
        hear_ready(relay, 2)
        end_task("killed", process, Api())
        assert sorted(list_left()) == sorted(neighbours)


class TestForwarding:
    """Before 1.4."""

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_signal_reaches_the_group(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
    ) -> None:
        """A supervisor that is told to stop passes that on to the task's group, and restores its handlers."""

        def supervise() -> None:
            tell_when_monitoring(relay, monkeypatch)
            process = start_task(lambda: (relay.tell(subprocess.Popen(SLEEPER).pid), pause_for_ever()))
            former = signal.signal(signum, signal.SIG_IGN)
            code = process.wait()
            relay.tell([code, signal.getsignal(signum) == signal.SIG_IGN])
            signal.signal(signum, former)

        with forked(supervise) as supervising:
            told = [relay.hear(), relay.hear()]
            child = tree.add(next(pid for pid in told if pid != "monitoring"))
            os.kill(supervising, signum)
            assert relay.hear() == [-signum, True]
            assert tree.gone(child)

    def test_leftovers_end(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """They do so although the runner, told to stop, ends with 0."""

        def target() -> None:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            detach(lambda: be_polite(relay))
            pause_for_ever()

        def supervise() -> None:
            tell_when_monitoring(relay, monkeypatch)
            relay.tell(["ended", start_task(target).wait()])

        with forked(supervise) as supervising:
            told = [relay.hear(), relay.hear()]
            daemon = tree.add(next(pid for pid in told if pid != "monitoring"))
            os.kill(supervising, signal.SIGTERM)
            assert relay.hear() == ["ended", 0]
            assert tree.gone(daemon, timeout=0)


# Does step by step what its arguments say, tells its PID, and stays.
RUNTIME = """
import os, signal, socket, sys

told, steps, *addresses = sys.argv[1:]
connections = []

def tell():
    with open(told, "a") as relay:
        relay.write(f"{os.getpid()}\\n")

def start_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            tell()
            signal.pause()
        os._exit(0)
    os.wait()

def connect():
    for address in addresses:
        host, port = address.partition("=")[2].split(":")
        connections.append(socket.create_connection((host, int(port))))

for step in steps.split():
    {"daemon": start_daemon, "connect": connect}[step]()
tell()
signal.pause()
"""


def start_runtime(relay: Relay, steps: str, client: Any = None, **kwargs: Any) -> ActivitySubprocess:
    """Start a task in a runtime of another language, as far as its supervisor can tell."""
    told = f"/proc/{os.getpid()}/fd/{relay.writer}"
    command = [sys.executable, "-I", "-S", "-c", RUNTIME, told, steps]
    return _PopenActivitySubprocess.start(command=command, **describe_task(client, **kwargs))


@pytest.mark.usefixtures("short_grace")
class TestRuntimes:
    """From 1.4 on: a runtime is spawned, connects to its supervisor, and is ended like any other task."""

    def test_session(self, relay: Relay) -> None:
        """It leads a session, and it and what it starts carry the mark of the task."""
        with ending(start_runtime(relay, "connect daemon")) as process:
            pids = [relay.hear(), relay.hear()]
            assert process.pid in pids
            assert os.getsid(process.pid) == process.pid
            [mark] = {resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] for pid in pids}
            assert mark != resource.getrlimit(resource.RLIMIT_RTTIME)[0]

    @pytest.mark.parametrize("steps", ["connect daemon", "daemon connect"])
    @pytest.mark.parametrize("way", ["conflict", "killed"])
    def test_nothing_is_left(self, relay: Relay, steps: str, way: str) -> None:
        """What it has started is ended with it, also what it had started before it connected."""
        api = Api()
        process = start_runtime(relay, steps, api)
        relay.hear(), relay.hear()
        end_task(way, process, api)
        assert list_left() == []

    def test_runtime_that_does_not_connect_leaves_nothing(self, relay: Relay) -> None:
        """It is ended with all that it has started."""
        with pytest.raises(TimeoutError):
            start_runtime(relay, "daemon", startup_timeout=0.5)
        assert list_left() == []


class TestExit:
    def test_exit_after_the_sockets_closed(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """The exit itself wakes the supervisor; no socket does when all of them had closed before."""
        monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", NEVER)
        monkeypatch.setattr(supervisor, "HEARTBEAT_TIMEOUT", NEVER)
        reader, writer = os.pipe()

        def target() -> None:
            keep_open(reader)
            os.read(reader, 1)
            os._exit(3)

        process = start_task(target)
        while len(process._open_sockets):
            process._service_subprocess(max_wait_time=0.05)
        os.write(writer, b".")
        os.close(reader)
        os.close(writer)
        assert process.wait() == 3

    @pytest.mark.parametrize("held", HOLDERS)
    def test_kill_while_a_socket_is_held(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch, held: str
    ) -> None:
        """A killed task ends with its grace period, although somebody out of reach holds one of its sockets."""
        monkeypatch.setattr(supervisor, "SOCKET_CLEANUP_TIMEOUT", NEVER)
        set_grace(monkeypatch, 0.2)
        # Without the patches it is a default argument.
        kill = partialmethod(ActivitySubprocess.kill, escalation_delay=0.2)
        monkeypatch.setattr(ActivitySubprocess, "kill", kill)
        api = Api()
        process = start_task(lambda: leave_holder(relay, held), api)
        relay.hear()
        api.terminate = True
        assert process.wait() == -signal.SIGTERM


class TestSockets:
    @pytest.mark.parametrize("held", HOLDERS)
    def test_overdue_sockets_are_closed(self, relay: Relay, held: str) -> None:
        """A socket that somebody holds longer than [workers] socket_cleanup_timeout is closed without a crash."""
        process = start_task(lambda: leave_holder(relay, held))
        relay.hear()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not process._open_sockets

    def test_last_lines_arrive(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the task wrote before it died is in its log, also when its sockets have to be closed."""
        monkeypatch.setattr(supervisor, "SOCKET_CLEANUP_TIMEOUT", 0)
        lines = [f"line {number:4} {'.' * 40}" for number in range(1000)]

        def target() -> None:
            # The last line is unfinished, as that of a task that dies in the middle of a traceback.
            os.write(1, "\n".join(lines).encode())
            leave_holder(relay, "stdout")

        log = Log()
        process = start_task(target, logger=log.logger)
        relay.hear()
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        process.wait()
        assert log.find("line") == lines

    def test_shared_selector_survives(self, relay: Relay) -> None:
        """Closing the sockets of one child leaves the selector to the others that share it, as a Dag processor's do."""

        def target() -> None:
            relay.tell(os.getpid())
            pause_for_ever()

        with selectors.DefaultSelector() as shared:
            first, second = (
                WatchedSubprocess.start(id=uuid4(), target=target, logger=Log().logger, selector=shared)
                for _ in "ab"
            )
            relay.hear(), relay.hear()
            first._cleanup_open_sockets()
            assert {key.fileobj for key in shared.get_map().values()} == set(second._open_sockets)
            assert second._service_subprocess(max_wait_time=0) is None

    def test_closed_selector_is_not_selected_on(self, relay: Relay) -> None:
        """A supervisor whose selector was closed under it collects the exit all the same."""
        process = start_task(pause_for_ever)
        process.selector.close()
        assert process._service_subprocess(max_wait_time=0) is None
        process.kill(signal.SIGKILL)
        assert process._exit_code == -signal.SIGKILL


def end_without_status(*, reported: str | None = None, should_retry: bool = False) -> tuple[str, int]:
    """Run a task whose exit status is collected behind its supervisor's back; return its state and warnings."""
    log = Log()
    process = start_task(lambda: os._exit(0), Api(should_retry=should_retry), logger=log.logger)
    process._terminal_state = reported
    os.waitpid(process.pid, 0)
    process.wait()
    return name_state(process), len(log.find("exit status"))


def name_state(process: ActivitySubprocess) -> str:
    return str(getattr(process.final_state, "value", process.final_state))


class TestStolenStatus:
    """The exit status was collected by somebody else in the supervisor's process: apache/airflow issue 70117."""

    @pytest.mark.parametrize("reported", ["success", "deferred", "up_for_reschedule"])
    def test_reported_state_stands(self, relay: Relay, reported: str) -> None:
        """The state that the task had reported before is its final one."""
        with forked(lambda: relay.tell(end_without_status(reported=reported))):
            assert relay.hear() == [reported, 1]

    @pytest.mark.parametrize("should_retry", [False, True])
    def test_unknown_is_not_success(self, relay: Relay, *, should_retry: bool) -> None:
        """A task that had reported nothing ends as one that exits with 1: it failed, or is up for a retry."""
        process = start_task(lambda: os._exit(1), Api(should_retry=should_retry))
        process.wait()
        with forked(lambda: relay.tell(end_without_status(should_retry=should_retry))):
            assert relay.hear() == [name_state(process), 1]

    def test_child_signal_ignored(self, relay: Relay) -> None:
        """With SIGCHLD ignored, as some libraries leave it, the kernel itself discards the status (waitpid(2))."""

        def supervise() -> None:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            relay.tell(start_task(lambda: os._exit(0)).wait())

        with forked(supervise):
            assert relay.hear() == 1


class TestUnchanged:
    def test_opt_out(self, relay: Relay, tree: Tree) -> None:
        """A daemon that has lifted its limit lives on when the task is killed."""

        def lift() -> None:
            resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            keep_open(relay.writer)
            relay.tell(os.getpid())

        process = start_task(lambda: (detach(lift), wait_to_end(relay)))
        daemon = tree.add(hear_ready(relay)[0])
        end_task("killed", process, Api())
        assert tree.runs(daemon)

    def test_other_types_stay_in_the_group(self, relay: Relay) -> None:
        """A subprocess type that does not opt in shares the session and the group of its supervisor."""

        def target() -> None:
            relay.tell([os.getsid(0), os.getpgid(0)])
            pause_for_ever()

        with ending(WatchedSubprocess.start(id=uuid4(), target=target, logger=Log().logger)):
            assert relay.hear() == [os.getsid(0), os.getpgid(0)]

    def test_other_types_are_killed_alone(self, relay: Relay, tree: Tree) -> None:
        """kill() signals the PID alone for a subprocess type that does not opt in."""

        def target() -> None:
            relay.tell(subprocess.Popen(SLEEPER).pid)
            pause_for_ever()

        with ending(WatchedSubprocess.start(id=uuid4(), target=target, logger=Log().logger)) as process:
            child = tree.add(relay.hear())
            runner = tree.add(process.pid)
            process.kill(signal.SIGKILL, escalation_delay=0.1)
            assert tree.gone(runner)
            assert tree.runs(child)

    def test_success_leaves_processes_alone(self, relay: Relay, tree: Tree) -> None:
        """What a task that succeeds has left running on purpose goes on running."""

        def target() -> None:
            null = subprocess.DEVNULL
            relay.tell(subprocess.Popen(SLEEPER, stdin=null, stdout=null, stderr=null).pid)

        with ending(start_task(target)) as process:
            child = tree.add(relay.hear())
            assert process.wait() == 0
            assert tree.runs(child)


@contextlib.contextmanager
def forked(main: Callable[[], None]) -> Iterator[int]:
    """Run ``main`` in a process of its own, for it may be signalled; yields its PID, and ends it."""
    pid = os.fork()
    if pid == 0:
        try:
            main()
        except BaseException:  # noqa: BLE001 - a forked copy of the test runner must not go on running tests
            traceback.print_exc()
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)


def tell_when_monitoring(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the supervisor tell once that it looks for events, by when its signal handlers are installed."""
    service = ActivitySubprocess._service_subprocess

    def tell_and_service(process: ActivitySubprocess, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(ActivitySubprocess, "_service_subprocess", service)
        relay.tell("monitoring")
        return service(process, *args, **kwargs)

    monkeypatch.setattr(ActivitySubprocess, "_service_subprocess", tell_and_service)
