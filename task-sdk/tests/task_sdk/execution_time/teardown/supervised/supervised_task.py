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
Real forks, real sockets, real signals: a supervised task, its processes, and ways to end it.

Nothing here needs what the fix added, so that every test but those of faults shows on an unfixed supervisor what goes
wrong there. Those of ``TestUnchanged`` pass on both, and some others pass where the release has mended their part
already, or is spared by chance.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import json
import logging
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from unittest import mock
from uuid import uuid4

import psutil
import structlog

from airflow.sdk import exceptions
from airflow.sdk.api.client import Client, ServerResponseError, TaskInstanceOperations
from airflow.sdk.api.datamodels._generated import BundleInfo, TaskInstance, TIRunContext
from airflow.sdk.execution_time import comms, supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess, WatchedSubprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pytest

Supervised = TypeVar("Supervised", bound=WatchedSubprocess)

PATIENCE = int(os.environ.get("TEARDOWN_TESTS_PATIENCE", "30"))
"""Seconds after which an event that should come has not come; fewer are of use on an unfixed supervisor alone."""

SLICE = 0.1
"""
Seconds for which a process waits at a time.

Python handles a signal that comes just before such a call only after it.
"""

GRACE_WITH_FAULTS = 0.1
"""Seconds between SIGTERM and SIGKILL where a fault delays the supervisor."""

NEVER = 3600
"""Seconds to wait for what must not be waited for."""

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]

PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36


class Relay:
    """A pipe over which any process of a test's tree tells the test something, one JSON value a line."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._unread = b""

    def tell(self, value: Any) -> None:
        os.write(self.writer, json.dumps(value, default=str).encode() + b"\n")

    def hear(self) -> Any:
        until = time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            if select.select([self.reader], [], [], SLICE)[0]:
                self._unread += os.read(self.reader, 4096)
            else:
                assert time.monotonic() < until, "nothing was told"
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)
        # A thread that still listens would read from the next file of that number.
        self.reader = self.writer = -1


def hear_in_popen(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have Popen return only when something was told over ``relay``; return the list of what is told to each."""
    heard: list[Any] = []

    class HearingPopen(subprocess.Popen[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            heard.append(relay.hear())

    monkeypatch.setattr(subprocess, "Popen", HearingPopen)
    return heard


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


class Log(structlog.testing.LogCapture):
    """A task log that keeps its events."""

    def __init__(self) -> None:
        super().__init__()
        level = structlog.make_filtering_bound_logger(logging.NOTSET)
        self.logger = structlog.wrap_logger(None, processors=[self], wrapper_class=level).bind()

    def find(self, text: str) -> list[str]:
        return [entry["event"] for entry in self.entries if text in entry["event"]]


class Api:
    """The part of the Execution API that a task's life touches; ``told`` are the states that it was told, in turn."""

    def __init__(self, *, should_retry: bool = False) -> None:
        self.task_instances = self.variables = self
        self.terminate = self.terminated = False
        self.told: list[str] = []
        self._context = TIRunContext.model_construct(should_retry=should_retry, max_tries=0, start_date=None)

    def start(self, *args: Any, **kwargs: Any) -> TIRunContext:
        return self._context

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        if self.terminate:
            self.terminated = True
            raise conflict()

    def finish(self, *args: Any, state: Any, **kwargs: Any) -> None:
        self.tell(state)

    def succeed(self, *args: Any, **kwargs: Any) -> None:
        self.tell("success")

    def retry(self, *args: Any, **kwargs: Any) -> None:
        self.tell("up_for_retry")

    def tell(self, state: Any) -> None:
        if self.terminated:
            raise conflict()
        self.told.append(name_state(state))


class SteppingApi(Api):
    """Has each heartbeat do one thing, which the supervisor has heeded when the next one comes."""

    def __init__(self, *steps: Callable[[], object], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps = list(steps)

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        if self.steps:
            self.steps.pop(0)()
        super().heartbeat(*args, **kwargs)


def stop_supervisor() -> None:
    """Have SIGTERM come to the supervisor, which this process is, here and now."""
    signal.raise_signal(signal.SIGTERM)


def conflict(status: int = 409) -> ServerResponseError:
    """Return what the client raises when the server says that the task should not be running any more."""
    http = find_http_library()
    request = http.Request("PUT", "http://127.0.0.1/")
    error = ServerResponseError("conflict", request=request, response=http.Response(status, request=request))
    error.detail = {"reason": "not_running", "current_state": "failed"}
    return error


def start_task(target: Callable[[], object], client: Any = None, **kwargs: Any) -> ActivitySubprocess:
    """Start a supervised task that runs ``target`` instead of a Dag."""
    return ActivitySubprocess.start(target=in_turn(target), **describe_task(client, **kwargs))


def in_turn(*steps: Callable[[], object]) -> Callable[[], None]:
    """Return a function that takes steps, one after the other."""

    def take_steps() -> None:
        for step in steps:
            step()

    return take_steps


def describe_task(client: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments that every way to start a task takes."""
    fields: dict[str, Any] = {
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
    return {
        "what": TaskInstance.model_construct(**keep_known_fields(fields)),
        "dag_rel_path": "d.py",
        "bundle_info": BundleInfo(name="b"),
        "client": client or Api(),
        "logger": Log().logger,
        **kwargs,
    }


def make_up_process() -> dict[str, Any]:
    """Return what the supervisor's class is made from for a process that was not started."""
    return {
        "id": uuid4(),
        "pid": 4711,
        "stdin": mock.NonCallableMock(spec=socket.socket),
        "process": mock.NonCallableMock(spec=psutil.Process),
        "process_log": structlog.testing.CapturingLogger(),
        **make_up_descriptors(),
    }


class MadeUpTask(ActivitySubprocess):
    """A supervised task that was not started, with a client that reaches no server, and some attributes of our choice."""

    def __init__(self, **attributes: Any) -> None:
        operations = mock.create_autospec(TaskInstanceOperations, instance=True)
        client = mock.NonCallableMock(spec=Client, task_instances=operations)
        super().__init__(**make_up_process(), client=client)
        for name, value in attributes.items():
            assert hasattr(self, name), f"a supervised task has no {name}"
            setattr(self, name, value)


@contextlib.contextmanager
def ending(process: Supervised) -> Iterator[Supervised]:
    """End ``process`` by its PID when the test is over, however it ends."""
    with ending_child(process.pid):
        yield process


@contextlib.contextmanager
def ending_child(pid: int) -> Iterator[None]:
    """End a child, and collect it, unless that has happened."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(pidfd)


def set_name(name: bytes) -> None:
    """Give the calling process another name (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name)


def pause_for_ever() -> NoReturn:
    while True:
        select.select([], [], [], SLICE)


def wait_for_interruption() -> None:
    """Wait for a signal whose handler raises; return if none has come when it should have."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        select.select([], [], [], SLICE)


HOLDERS = ["stdin", "stdout", "stderr", "logs"]


def leave_holder(relay: Relay, held: str) -> None:
    """Start a process out of reach that holds one socket of the task; on stdin are its requests. Then wait."""

    def hold() -> None:
        lift_limit()
        sockets = {"stdin": [0], "stdout": [1], "stderr": [2], "logs": list_sockets()}[held]
        keep_open(relay.writer, *sockets)
        relay.tell(os.getpid())

    detach(hold)
    pause_for_ever()


def lift_limit() -> None:
    """Give up the limit that is the mark of a task, which opts out of being ended with it."""
    resource.setrlimit(resource.RLIMIT_RTTIME, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def limit_realtime() -> None:
    """Limit what is scheduled in real time, as PipeWire does in all of its clients, and lose the mark by that."""
    resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, resource.RLIM_INFINITY))


def detach(prepare: Callable[[], Any]) -> None:
    """Start a daemon that runs ``prepare`` and then waits for signals: in its own session, its parent gone."""
    orphaned = Relay()

    def be_daemon() -> None:
        # As long as its parent is there it is a descendant of ours, whatever its mark.
        orphaned.hear()
        orphaned.close()
        prepare()
        pause_for_ever()

    with contextlib.closing(orphaned):
        os.waitpid(fork(in_turn(os.setsid, lambda: fork(be_daemon))), 0)
        orphaned.tell("orphaned")


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


def list_living() -> list[int]:
    """Return the descendants of this process that are no zombies."""
    return [process.pid for process in psutil.Process().children(recursive=True) if is_living(process)]


def is_living(process: psutil.Process) -> bool:
    """Whether a process is there, and no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def list_pending(pid: int) -> int:
    """Return the signals that wait for a process that blocks them, as proc_pid_status(5) has them."""
    with open(f"/proc/{pid}/status") as status:
        [pending] = [int(line.split()[1], 16) for line in status if line.startswith("ShdPnd:")]
    return pending


def wait_to_end(relay: Relay) -> None:
    """Be a runner that can be told to fail."""
    # Not a handler and a pause(): a signal that comes just before it would be missed.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    relay.tell("ready")
    signal.sigwaitinfo({signal.SIGUSR1})
    os._exit(1)


def hear_ready(relay: Relay, processes: int = 1, ready: str = "ready") -> list[Any]:
    """
    Wait until a runner is ready, and as many of its processes have told their PID or more; return what they told.

    :param ready: what tells that; "monitoring" where the supervisor does so, and not the runner.
    """
    told = [relay.hear() for _ in range(processes + 1)]
    told.remove(ready)
    return told


def end_task(way: str, process: ActivitySubprocess, api: Api) -> None:
    order_end(way, process, api)
    process.wait()


def order_end(way: str, process: ActivitySubprocess, api: Api) -> None:
    if way == "conflict":
        api.terminate = True
    elif way != "signalled":
        os.kill(process.pid, {"killed": signal.SIGKILL, "failed": signal.SIGUSR1}[way])


def set_stop_policy(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """Choose what a signal to a supervisor means; an unfixed one does not ask."""
    monkeypatch.setenv("AIRFLOW__WORKERS__STOP_SIGNAL_POLICY", policy)


def be_polite(relay: Relay) -> None:
    relay.tell(os.getpid())


def be_deaf(relay: Relay) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    relay.tell(os.getpid())


def exec_sleeper(relay: Relay, env: dict[str, str] | None = None) -> None:
    """Be a daemon that runs another program, in the environment that it has got unless another is given."""
    tell = f"import os, time; os.write({relay.writer}, b'%d\\n' % os.getpid()); time.sleep(600)"
    command = [sys.executable, "-I", "-S", "-c", tell]
    os.set_inheritable(relay.writer, True)
    os.execve(sys.executable, command, os.environ if env is None else env)  # noqa: S606


def fork(main: Callable[[], Any]) -> int:
    """Run ``main`` in a child; return its PID."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        main()
        status = 0
    except BaseException:  # noqa: BLE001 - a forked copy of the test runner must not go on running tests
        traceback.print_exc()
    finally:
        os._exit(status)


@contextlib.contextmanager
def forked(main: Callable[[], Any]) -> Iterator[int]:
    """Run ``main`` in a process of its own, for it may be signalled; yields its PID, and ends it."""
    pid = fork(main)
    with ending_child(pid):
        yield pid


@contextlib.contextmanager
def supervising(target: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> Iterator[int]:
    """
    Supervise a task in a process of its own; yields its PID. It runs ``prepare`` before, and ends only if killed.

    The task begins when its supervisor has done all that it does at its start.
    """
    started = Relay()

    def supervise() -> None:
        prepare()
        start_task(in_turn(started.hear, target))
        started.tell("started")
        pause_for_ever()

    with contextlib.closing(started), forked(supervise) as pid:
        yield pid


def make_zombie(pid: int) -> None:
    """End a child, which nobody has collected by then."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def kill_child(pid: int, signum: int = signal.SIGKILL) -> None:
    """End a child alone, and collect it: what it has supervised is told of its end by then."""
    os.kill(pid, signum)
    os.waitpid(pid, 0)


def wait_until_left(list_left: Callable[[], list[int]], expected: Iterable[int] = ()) -> None:
    """Wait until nothing else is left than what is expected to be."""
    with contextlib.closing(Tree()) as tree:
        while others := set(list_left()).difference(expected):
            with contextlib.suppress(ProcessLookupError):
                assert tree.gone(tree.add(min(others))), f"{others} are left"


def look_at_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find no orphans but what this process has started: those of others are not for a test to end."""
    test = psutil.Process()

    def list_own() -> list[tuple[int, None]]:
        return [(process.pid, None) for process in test.children(recursive=True)]

    orphans = importlib.import_module("airflow.sdk.execution_time.teardown.orphans")
    monkeypatch.setattr(orphans, "list_pids", mock.create_autospec(orphans.list_pids, side_effect=list_own))


@contextlib.contextmanager
def waiting(prepare: Callable[[], Any]) -> Iterator[int]:
    """Fork a child that runs ``prepare`` and then waits for signals; yields its PID when it waits, and ends it."""
    ready = Relay()

    def main() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)  # whatever other tests have installed
        prepare()
        ready.tell("ready")
        pause_for_ever()

    with contextlib.closing(ready), forked(main) as pid:
        assert ready.hear() == "ready"
        yield pid


def ended_by(pid: int) -> int:
    """Collect a child, and return the number of the signal that ended it."""
    with contextlib.closing(Tree()) as tree:
        assert tree.gone(tree.add(pid)), "no signal has ended it"
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def ending_all() -> Iterator[Callable[[], list[int]]]:
    """
    Adopt what is orphaned from here on (prctl(2)), and end every process that was started, however the test ends.

    Yields a function that lists the PIDs of those that live.
    """
    before = psutil.Process().children(recursive=True)

    def list_started() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)).difference(before)

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield lambda: [process.pid for process in list_started() if is_living(process)]
    finally:
        while left := list_started():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def tell_when_monitoring(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the supervisor tell once that it looks for events, by when its signal handlers are installed."""
    service = ActivitySubprocess._service_subprocess

    def tell_and_service(process: ActivitySubprocess, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(ActivitySubprocess, "_service_subprocess", service)
        relay.tell("monitoring")
        return service(process, *args, **kwargs)

    monkeypatch.setattr(ActivitySubprocess, "_service_subprocess", tell_and_service)


# What differs between releases of the SDK, and between a supervisor that is fixed and one that is not.


def set_grace(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME", str(seconds))
    # From 1.4 on it is read at import.
    monkeypatch.setattr(supervisor, "KILLED_TASK_CLEANUP_TIME", seconds, raising=False)


def leave_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no supervisor look for what others on this machine have left, which is not for a test to end."""
    # An unfixed one does not.
    if sweep := getattr(supervisor, "sweep_once", None):
        monkeypatch.setattr(supervisor, "sweep_once", mock.create_autospec(sweep))


def set_of_teardown(monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: object) -> None:
    """Set an attribute of a module of the teardown, which an unfixed supervisor has not imported."""
    if imported := sys.modules.get(f"airflow.sdk.execution_time.teardown.{module}"):
        monkeypatch.setattr(imported, name, value)


def keep_known_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return those of the fields of a task instance that it has."""
    return {name: value for name, value in fields.items() if name in TaskInstance.model_fields}


def make_up_descriptors() -> dict[str, int]:
    """Return the file descriptors that the supervisor's class is made from: one before 1.0.3, which is nobody's here."""
    return {"requests_fd": -1} if "requests_fd" in inspect.signature(WatchedSubprocess).parameters else {}


def find_http_library() -> Any:
    """Return the library whose exceptions the client's are."""
    return sys.modules[ServerResponseError.__base__.__module__.partition(".")[0]]


def name_state(state: object) -> str:
    """Return the name of a state, which is a string or a member of one of several enumerations."""
    return str(getattr(state, "value", state))


def name_failure(*, should_retry: bool) -> str:
    """Return the state of a task that fails by itself; before 1.1 its supervisor knows of no retries."""
    knows_retries = hasattr(ActivitySubprocess, "_should_retry")
    return "up_for_retry" if should_retry and knows_retries else "failed"


def tells_again() -> bool:
    """Whether a supervisor tells a state again that the server could not be told; before 1.2 none does."""
    return "_pending_terminal_state_msg" in ActivitySubprocess.__annotations__


def find_entry_point() -> Callable[..., int]:
    """Return what executors call to supervise a task; older releases have it by the shorter name alone."""
    entry: Callable[..., int] = getattr(supervisor, "supervise_task", None) or supervisor.supervise
    return entry


def find_exception(name: str) -> type[BaseException]:
    """Return an exception of the SDK; before 1.2 some are those of Airflow."""
    module = exceptions if hasattr(exceptions, name) else importlib.import_module("airflow.exceptions")
    found: type[BaseException] = getattr(module, name)
    return found


def list_request_methods() -> list[str]:
    """Return the methods that send a request and read its answer; before 1.0.3 no single one does."""
    decoder = getattr(comms, "CommsDecoder", None)
    if decoder is None:
        return []
    return ["send", "asend"] if "_async_lock" in decoder.__annotations__ else ["send"]
