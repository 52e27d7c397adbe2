"""Supervise a real task as executors do, in a process, a thread, or below an event loop; Python 3.9."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from airflow.sdk.api.datamodels import _generated as models
from airflow.sdk.execution_time import supervisor
from tests.harness.real.api import URL, Server, build_task_instance, make_client
from tests.harness.real.telling import tell

if TYPE_CHECKING:
    from pathlib import Path

HEARTBEAT_INTERVAL = 0.1
SOCKET_CLEANUP_TIMEOUT = 1.0
LOOP_LIMIT = 50
"""Signals after which a loop that answers each with another gives up."""
STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
DAG = "told.py"

run_supervisor: Callable[..., int] = getattr(supervisor, "supervise_task", supervisor.supervise)


class SoftTimeLimit(Exception):  # noqa: N818  # as Celery's is called
    """What a handler in a supervisor raises."""


def supervise(case: dict[str, Any], order: int) -> None:
    """Supervise the task as an executor does, and tell how it ended."""
    processes = record_processes()
    arguments = {
        "ti": build_task_instance(case),
        "bundle_info": models.BundleInfo(name="real", version=None),
        "dag_rel_path": DAG,
        "token": "",
        "server": URL,
        "client": make_client(Server(case, order)),
        "log_path": "task.log",
    }
    end: dict[str, Any] = {"exit_code": None, "exception": None}
    try:
        known = inspect.signature(run_supervisor).parameters
        end["exit_code"] = run_supervisor(**{name: arguments[name] for name in arguments if name in known})
    except Exception as error:  # noqa: BLE001  # whatever the supervisor raises is the result
        traceback.print_exc()
        end["exception"] = type(error).__name__
    returned_at = time.monotonic()
    if processes and end["exception"] is None:
        end["final_state"] = str(getattr(processes[0].final_state, "value", processes[0].final_state)).lower()
    tell("returned", returned_at=returned_at, **end)


def record_processes() -> list[Any]:
    """Have every process that is started appended to the list that is returned."""
    processes: list[Any] = []
    start = supervisor.ActivitySubprocess.start.__func__

    def start_recorded(cls: Any, **arguments: Any) -> Any:
        process = start(cls, **arguments)
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


HOSTS = {"process": supervise, "thread": supervise_in_thread, "loop": supervise_below_loop}


def be_host(case: dict[str, Any], folder: Path, order: int) -> None:
    """Be the process that an executor has for a supervisor, in a session of its own."""
    os.setsid()
    for name in STOPPING:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, raise_limit)
    output = os.open(folder / "supervisor.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    supervisor.MIN_HEARTBEAT_INTERVAL = HEARTBEAT_INTERVAL
    supervisor.SOCKET_CLEANUP_TIMEOUT = SOCKET_CLEANUP_TIMEOUT
    if hasattr(supervisor, "KILLED_TASK_CLEANUP_TIME"):
        supervisor.KILLED_TASK_CLEANUP_TIME = float(case["grace"])
    HOSTS[case["host"]](case, order)


def raise_limit(_signum: int, _frame: object) -> NoReturn:
    raise SoftTimeLimit


def fork(be: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            be()
        except BaseException:  # noqa: BLE001  # a forked copy must not go on with what its parent does
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid
