"""Supervise a real task as executors do, in a process, a thread, or below another process; Python 3.9."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import itertools
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, NoReturn

from task_sdk.execution_time.teardown.supervised.supervised_task import fork

from airflow.sdk.api.datamodels import _generated as models
from airflow.sdk.execution_time import supervisor
from tests.harness.real import memory
from tests.harness.real.api import URL, Server, build_task_instance, make_client
from tests.harness.real.telling import tell

HEARTBEAT_INTERVAL = 0.1
KILL_TIME = 10.0
"""Seconds that killed processes have to die, or else who gets no processor in time counts as left."""
LOW_LIMIT = 1_000_000_000
"""Microseconds, of which nothing here uses any."""
PACKAGE = "airflow.sdk.execution_time.teardown"
TIMES = (
    ("stop_request", "HEARTBEAT_INTERVAL", HEARTBEAT_INTERVAL),
    ("leftovers", "KILL_TIME", KILL_TIME),
    ("ending", "KILL_TIME", KILL_TIME),
)
"""Of the package's modules."""
SOCKET_CLEANUP_TIMEOUT = 1.0
LOOP_LIMIT = 50
"""Signals after which a loop that answers each with another gives up."""
STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
PR_SET_PDEATHSIG = 1
BYSTANDER = "stands_by"
TICK = 0.01
CGROUP_VARIABLE = "SCENE_CGROUP"

run_supervisor: Callable[..., int] = getattr(supervisor, "supervise_task", supervisor.supervise)


class SoftTimeLimit(Exception):  # noqa: N818  # as Celery's is called
    """What a handler in a supervisor raises."""


def supervise(case: dict[str, Any], order: int) -> None:
    """Supervise the task as an executor does, and tell how it ended."""
    processes = record_processes(case["task"])
    end: dict[str, Any] = {"exit_code": None, "exception": None}
    try:
        end["exit_code"] = run_task(case, order)
    except Exception as error:  # noqa: BLE001  # whatever the supervisor raises is the result
        traceback.print_exc()
        end["exception"] = type(error).__name__
    returned_at = time.monotonic()
    if processes and end["exception"] is None:
        end["final_state"] = str(getattr(processes[0].final_state, "value", processes[0].final_state)).lower()
    tell("returned", returned_at=returned_at, **end)


def run_task(case: dict[str, Any], order: int) -> int:
    arguments = {
        "ti": build_task_instance(case),
        "bundle_info": models.BundleInfo(name="real", version=None),
        "dag_rel_path": f"{case['dag']}.py",
        "token": "",
        "server": URL,
        "client": make_client(Server(case, order)),
        "log_path": name_log(case),
    }
    known = inspect.signature(run_supervisor).parameters
    return run_supervisor(**{name: arguments[name] for name in arguments if name in known})


def name_log(case: dict[str, Any]) -> str:
    """Return where the task's log is, in the folder of logs."""
    return f"{case['task']}.log"


def record_processes(task: str) -> list[Any]:
    """Have every process that is started for that task appended to the list that is returned."""
    processes: list[Any] = []
    start = supervisor.ActivitySubprocess.start.__func__

    def start_recorded(cls: Any, **arguments: Any) -> Any:
        process = start(cls, **arguments)
        if arguments["what"].task_id == task:
            processes.append(process)
            tell("started", runner=process.pid)
        return process

    supervisor.ActivitySubprocess.start = classmethod(start_recorded)  # type: ignore[arg-type]
    return processes


def supervise_in_thread(case: dict[str, Any], order: int) -> None:
    thread = threading.Thread(target=supervise, args=(case, order))
    thread.start()
    thread.join()


def supervise_below_loop(case: dict[str, Any], order: int) -> None:
    """Fork the supervisor in a loop that passes SIGTERM on to it, as the Edge worker does.

    The supervisor inherits the descriptor that wakes the loop: what Python writes to it there is heard in the loop.
    """

    async def run_loop() -> None:
        loop = asyncio.get_running_loop()
        passed_on = itertools.count(1)
        ended = loop.create_future()

        def pass_on() -> None:
            if next(passed_on) <= LOOP_LIMIT:
                tell("passed_on")
                os.kill(pid, signal.SIGTERM)
            else:
                os.kill(pid, signal.SIGKILL)

        loop.add_signal_handler(signal.SIGTERM, pass_on)
        pid = fork(lambda: supervise(case, order))
        loop.add_reader(os.pidfd_open(pid), ended.set_result, None)
        tell("supervisor", supervisor=pid)
        await ended

    asyncio.run(run_loop())


def supervise_below_parent(case: dict[str, Any], order: int) -> None:
    """Fork the supervisor in a process that it dies with, as those of Celery's pool do."""

    def be_supervisor() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        supervise(case, order)

    pid = fork(be_supervisor)
    tell("supervisor", supervisor=pid)
    os.waitpid(pid, 0)


def supervise_from_ended_thread(case: dict[str, Any], order: int) -> None:
    """Have the thread end that has forked the runner, which the kernel tells the runner as an end of its parent."""
    start = supervisor.ActivitySubprocess.start.__func__

    def start_in_thread(cls: Any, **arguments: Any) -> Any:
        processes: list[Any] = []
        thread = threading.Thread(target=lambda: processes.append(start(cls, **arguments)))
        thread.start()
        thread.join()
        while Path(
            f"/proc/self/task/{thread.native_id}"
        ).exists():  # Python's thread ends before the kernel's
            time.sleep(TICK)
        return processes[0]

    supervisor.ActivitySubprocess.start = classmethod(start_in_thread)  # type: ignore[arg-type]
    supervise(case, order)


def supervise_beside_another(case: dict[str, Any], order: int) -> None:
    """Supervise the task in one thread, and a bystander in another."""
    bystander = threading.Thread(target=stand_by, args=(case, order))
    bystander.start()
    supervise_in_thread(case, order)
    bystander.join()


def stand_by(case: dict[str, Any], order: int) -> None:
    """Supervise the bystander, whom nobody ends."""
    exit_code = run_task({**case, "dag": "told", "task": BYSTANDER, "end": ""}, order)
    tell("bystander_returned", exit_code=exit_code)


HOSTS = {
    "process": supervise,
    "thread": supervise_in_thread,
    "loop": supervise_below_loop,
    "parent": supervise_below_parent,
    "ended thread": supervise_from_ended_thread,
    "two threads": supervise_beside_another,
    "bystander": stand_by,
}


def be_host(case: dict[str, Any], folder: Path, order: int) -> None:
    """Be the process that an executor has for a supervisor, in a session of its own."""
    os.setsid()
    # Of many signals the last may come when the supervisor has returned already, and would end its host.
    former: Any = signal.SIG_DFL if case["count"] == 1 else take_no_notice
    for name in STOPPING:
        signal.signal(getattr(signal, name), former)
    signal.signal(signal.SIGUSR1, raise_limit)
    if cgroup := os.environ.get(CGROUP_VARIABLE):
        memory.enter(Path(cgroup))
    output = os.open(folder / "supervisor.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    supervisor.MIN_HEARTBEAT_INTERVAL = HEARTBEAT_INTERVAL
    for module, name, seconds in TIMES:
        if loaded := sys.modules.get(f"{PACKAGE}.{module}"):  # of a patched one
            assert hasattr(loaded, name)
            setattr(loaded, name, seconds)
    if case["orphan_grace"]:
        vars(sys.modules[f"{PACKAGE}.lifeline"])["ORPHAN_GRACE"] = case["orphan_grace"]
    supervisor.SOCKET_CLEANUP_TIMEOUT = SOCKET_CLEANUP_TIMEOUT
    if hasattr(supervisor, "KILLED_TASK_CLEANUP_TIME"):
        supervisor.KILLED_TASK_CLEANUP_TIME = float(case["grace"])
    misbehave(case)
    HOSTS[case["host"]](case, order)


def misbehave(case: dict[str, Any]) -> None:
    """Have this process, a supervisor, run into what the case has in store for it."""
    if case["carries_no_mark"]:
        resource.setrlimit(resource.RLIMIT_RTTIME, (LOW_LIMIT, LOW_LIMIT))
    if case["dies_after_fork"] is not None:
        die_after_fork(case["dies_after_fork"])
    if case["slow_fork"]:
        delay_runner(case["slow_fork"])
    if case["dies_at_stop"]:
        die_at_stop(case["dies_at_stop"])


def die_after_fork(delay: float) -> None:
    """Have this process die some seconds after it has forked a runner."""
    host = os.getpid()

    def die() -> None:
        if os.getpid() == host:
            threading.Timer(delay, os.kill, (host, signal.SIGKILL)).start()

    os.register_at_fork(after_in_parent=die)


def delay_runner(seconds: float) -> None:
    """Have what this process forks take so many seconds to begin."""
    host = os.getpid()
    os.register_at_fork(after_in_child=lambda: time.sleep(seconds if os.getppid() == host else 0))


def die_at_stop(count: int) -> None:
    """Have this process die when it has sent so many SIGSTOPs, before it can send one SIGKILL."""
    send, sent = signal.pidfd_send_signal, itertools.count(1)

    def send_and_die(pidfd: int, signum: int, *rest: Any) -> None:
        send(pidfd, signum, *rest)
        if signum == signal.SIGSTOP and next(sent) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    signal.pidfd_send_signal = send_and_die


def take_no_notice(_signum: int, _frame: object) -> None:
    """Handle a signal, unlike SIG_IGN, which a supervisor leaves in place."""


def raise_limit(_signum: int, _frame: object) -> NoReturn:
    raise SoftTimeLimit
