"""Run tasks by Airflow's own task runner, end them, and tell what came of it: `python real_driver.py SOCKET FOLDER`.

Run by the interpreter of an environment that has a complete Airflow; real_runner.py is the other side, and real_dags/ has the
tasks. A request is a packet of JSON with a descriptor, which gets the answer. For each request the driver, which has
imported Airflow, forks a *scene*: it forks the supervisor, waits until the task is ready, ends it, looks at what is left, and
kills all of that. Orphans become children of the scene, not of the supervisor, for those in production are no subreapers. The
scene also ends when nobody waits for its answer any more. Python 3.9, and nothing of this repository.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import itertools
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, NoReturn

import psutil

from airflow.sdk.api import client as api_client
from airflow.sdk.api.datamodels import _generated as models
from airflow.sdk.execution_time import supervisor, task_runner

REQUEST_MAX_BYTES = 1 << 16
PR_SET_CHILD_SUBREAPER = 36
HEARTBEAT_INTERVAL = 0.1
SOCKET_CLEANUP_TIMEOUT = 1.0
READY_TIMEOUT = 60.0
"""Seconds until a task must be where it is to be ended, on a machine that is busy."""
BEATS = 2
"""Heartbeats after which a supervisor has noticed a signal that was sent before them."""
LOOP_LIMIT = 50
"""Signals after which a loop that answers each with another gives up."""
STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
DAG = "told.py"
# From 1.4 on the supervisor tells the server so that it has ended the task as the server said.
ACKNOWLEDGED = "server_terminated"
CHATTER = b'"line '
"""Begins what a task logs all the time."""

# httpx up to SDK 1.3, httpx2 from 1.4 on
http = sys.modules[api_client.Client.__mro__[1].__module__.partition(".")[0]]
run_supervisor: Callable[..., int] = getattr(supervisor, "supervise_task", supervisor.supervise)


class SoftTimeLimit(Exception):  # noqa: N818  # as Celery's is called
    """What a handler in a supervisor raises."""


class Gone(Exception):  # noqa: N818
    """Nobody waits for the answer."""


class Told:
    """Two FIFOs: what everybody in a scene has told, and the word that frees a task which waits for it."""

    def __init__(self, folder: Path, answer: int) -> None:
        self.path, self.freed_path = folder / "told", folder / "freed"
        for path in (self.path, self.freed_path):
            os.mkfifo(path)
        self.reader = os.open(self.path, os.O_RDWR)
        self.answer = answer
        self.events: list[dict[str, Any]] = []
        self._unread = b""

    def wait_for(self, event: str, *, until: float, pidfd: int, times: int = 1, after: int = 0) -> bool:
        """Return whether it was told so often, after the first events, by that time and before the end of the process."""
        sources = select.poll()
        sources.register(self.reader, select.POLLIN)
        sources.register(pidfd, select.POLLIN)
        sources.register(self.answer, 0)  # POLLERR: its reader has closed
        while sum(each["event"] == event for each in self.events[after:]) < times:
            if find(self.events, "returned", "at"):
                return False
            ready = dict(sources.poll(max(0, until - time.monotonic()) * 1000))
            if self.answer in ready:
                raise Gone
            if self.reader in ready:
                self.hear()
            elif not ready or pidfd in ready:
                return False
        return True

    def hear(self) -> None:
        *lines, self._unread = (self._unread + os.read(self.reader, 1 << 16)).split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def hear_rest(self) -> None:
        while select.select([self.reader], [], [], 0)[0]:
            self.hear()

    def free(self) -> None:
        """Let the task finish that waits for it."""
        # Left open: a word is lost with the last who has the FIFO open.
        os.write(os.open(self.freed_path, os.O_RDWR), b"\n")


def tell(event: str, **details: Any) -> None:
    line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **details}, default=str)
    descriptor = os.open(os.environ["TOLD"], os.O_WRONLY)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


# The server


class Server:
    """The Execution API for one task; `order` is a descriptor that becomes readable with the order to end."""

    def __init__(self, case: dict[str, Any], order: int) -> None:
        self.case = case
        self.order = order
        self.ended_by: int | None = None

    def answer(self, request: Any) -> Any:
        name = request.url.path.rstrip("/").rpartition("/")[2]
        handler = getattr(self, f"answer_{name.replace('-', '_')}", None)
        if request.url.path.startswith("/variables/"):
            return self.answer_variable(request, name)
        if handler is None:
            tell("unknown_request", method=request.method, path=request.url.path)
            return http.Response(404, json={"detail": "Not Found"})
        return handler(request)

    def answer_run(self, _request: Any) -> Any:
        return http.Response(200, json=build_run_context(self.case).model_dump(mode="json"))

    def answer_heartbeat(self, _request: Any) -> Any:
        status = self.case["end"]
        if status.isdigit() and select.select([self.order], [], [], 0)[0]:
            if self.ended_by is None:
                tell("conflict", status=status)
            self.ended_by = int(status)
            detail = {"reason": "not_running", "current_state": "failed"}
            return http.Response(self.ended_by, json={"detail": detail})
        if self.case["notice"]:
            tell("beat")
        return http.Response(204)

    def answer_state(self, request: Any) -> Any:
        state = json.loads(request.content)["state"]
        accepted = self.ended_by is None or state == ACKNOWLEDGED
        tell("state", state=state, accepted=accepted)
        return http.Response(204) if accepted else http.Response(409, json={"detail": {"reason": "invalid_state"}})

    def answer_variable(self, request: Any, key: str) -> Any:
        if key == "away":
            raise http.ConnectError("the API server is restarting", request=request)
        return http.Response(200, json={"key": key, "value": f"value of {key}"})

    def answer_rtif(self, _request: Any) -> Any:
        return http.Response(201, json={})

    def answer_return_value(self, _request: Any) -> Any:
        return http.Response(201, json={})

    def answer_start_date(self, _request: Any) -> Any:
        return http.Response(200, json=None)


def build(model: Any, **values: Any) -> Any:
    """Validate those values that this release's model knows."""
    return model.model_validate({name: value for name, value in values.items() if name in model.model_fields})


def build_run_context(case: dict[str, Any]) -> Any:
    now = datetime.now(tz=timezone.utc)
    times = dict.fromkeys(
        ("logical_date", "data_interval_start", "data_interval_end", "run_after", "start_date"), now
    )
    dag_run = build(
        models.DagRun,
        **times,
        dag_id="told",
        run_id="run",
        end_date=None,
        run_type="manual",
        state="running",
        consumed_asset_events=[],
        partition_key=None,
    )
    return build(
        models.TIRunContext, dag_run=dag_run, max_tries=int(case["retries"]), should_retry=case["retries"]
    )


def build_task_instance(case: dict[str, Any]) -> Any:
    return build(
        models.TaskInstance,
        id=uuid.uuid4(),
        task_id=case["task"],
        dag_id="told",
        run_id="run",
        try_number=1,
        dag_version_id=uuid.uuid4(),
        pool_slots=1,
        priority_weight=1,
        queue="default",
    )


# The supervisor


def supervise(case: dict[str, Any], order: int) -> None:
    """Supervise the task as an executor does, and tell how it ended."""
    processes = record_processes()
    server = Server(case, order)
    client = api_client.Client(
        base_url="http://127.0.0.1", token="", transport=http.MockTransport(server.answer)
    )
    arguments = {
        "ti": build_task_instance(case),
        "bundle_info": models.BundleInfo(name="real", version=None),
        "dag_rel_path": DAG,
        "token": "",
        "server": "http://127.0.0.1",
        "client": client,
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

    supervisor.ActivitySubprocess.start = classmethod(start_recorded)
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


# The scene


def run_scene(case: dict[str, Any], folder: Path, answer: int) -> None:
    """Run a case and write what came of it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder.mkdir()
    os.chdir(folder)
    os.environ.update(case["settings"])
    os.environ["AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME"] = str(case["grace"])
    os.environ["AIRFLOW__LOGGING__BASE_LOG_FOLDER"] = str(folder)
    try:
        result = play(case, folder, answer)
    except Gone:
        return
    except Exception:  # noqa: BLE001  # the other side raises it
        result = {"failed": traceback.format_exc()}
    finally:
        end_descendants()
    with open(answer, "wb") as file:
        file.write(json.dumps(result, default=str).encode())


def play(case: dict[str, Any], folder: Path, answer: int) -> dict[str, Any]:
    told = Told(folder, answer)
    os.environ.update(TOLD=str(told.path), FREED=str(told.freed_path))
    order_reader, order_writer = os.pipe()

    def be() -> None:
        os.close(answer)
        os.close(order_writer)
        be_host(case, folder, order_reader)
        signal.pause()  # while somebody looks at what is left

    host = fork(be)
    pidfd = os.pidfd_open(host)
    began = time.monotonic()
    ready = case["end"] == "" or told.wait_for(case["at"], until=began + READY_TIMEOUT, pidfd=pidfd)
    if not ready:
        raise RuntimeError(f"the task was not ready:\n{told.events}\n{(folder / 'supervisor.log').read_text()}")
    time.sleep(case["delay"])
    began = time.monotonic()
    end_task(case, told, order_writer, host)
    until = time.monotonic() + case["patience"]
    if case["notice"]:
        told.wait_for("beat", times=BEATS, after=len(told.events), until=until, pidfd=pidfd)
    if case["free"]:
        told.free()
    returned = told.wait_for("returned", until=until, pidfd=pidfd)
    ended = time.monotonic()
    left = list_left({host, find(told.events, "supervisor", "supervisor")})
    told.hear_rest()
    return {
        **describe(told.events, began),
        "hung": not returned and not select.select([pidfd], [], [], 0)[0],
        "killed_by": None if returned else read_signal(pidfd),
        "seconds_to_death": ended - began,
        "left": left,
        "log": read_log(folder / "task.log"),
        "output": (folder / "supervisor.log").read_text(),
    }


def end_task(case: dict[str, Any], told: Told, order: int, host: int) -> None:
    if case["end"].startswith("SIG"):
        pid = {"runner": find(told.events, "started", "runner"), "supervisor": host}[case["to"]]
        for number in range(case["count"]):
            time.sleep(case["gap"] if number else 0)
            os.kill(pid, getattr(signal, case["end"]))
    else:
        os.write(order, b".")


def find(events: list[dict[str, Any]], event: str, key: str) -> Any:
    return next((each.get(key) for each in events if each["event"] == event), None)


def describe(events: list[dict[str, Any]], began: float) -> dict[str, Any]:
    began = find(events, "conflict", "at") or began
    returned_at = find(events, "returned", "returned_at")
    return {
        "seconds": returned_at - began if returned_at else None,
        "states": list_states(events, accepted=True),
        "refused": list_states(events, accepted=False),
        "events": [each for each in events if each["event"] not in {"state", "beat"}],
        **{key: find(events, "returned", key) for key in ("exit_code", "exception", "final_state")},
    }


def list_states(events: list[dict[str, Any]], *, accepted: bool) -> list[str]:
    told = [each["state"] for each in events if each["event"] == "state" and each["accepted"] == accepted]
    return [state for state in told if state != ACKNOWLEDGED]


def list_left(hosts: set[int | None]) -> list[tuple[int, str]]:
    """Return PID and name of those alive; the supervisor is none of them, nor the loop that has forked it."""
    left = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid not in hosts and process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}:
                left.append((process.pid, process.name()))
        except psutil.NoSuchProcess:
            continue  # just gone
    return left


def read_signal(pidfd: int) -> int | None:
    """Return the signal that a child has died of, None if it lives or exited."""
    status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return status.si_status if status and status.si_code in {os.CLD_KILLED, os.CLD_DUMPED} else None


def read_log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if CHATTER not in line]


def end_descendants() -> None:
    """Kill and collect everything that a scene has started, and what that starts meanwhile."""
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # just gone
        try:
            os.wait()
        except ChildProcessError:
            return


# The driver


def serve(connection: socket.socket, folder: Path) -> None:
    connection.send(b"{}")  # everything has been imported
    for number in itertools.count():
        packet, descriptors, _, _ = socket.recv_fds(connection, REQUEST_MAX_BYTES, 1)
        if not packet:
            return
        case = json.loads(packet)
        fork(lambda: (connection.close(), run_scene(case, folder / str(number), *descriptors)))  # noqa: B023
        os.close(descriptors[0])


def main() -> None:
    connection, folder = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody collects the scenes
    preload()
    serve(connection, folder)
    try:
        os.wait()
    except ChildProcessError:
        return  # the last scene has ended


def preload() -> None:
    """Import what a task runner imports on its way."""
    for name in ("airflow.models.dagbag", "airflow.serialization.serialized_objects"):
        importlib.import_module(name)
    runpy.run_path(str(Path(__file__).parent / "real_dags" / DAG))


if __name__ == "__main__":
    main()
