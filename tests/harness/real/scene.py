"""A scene: a supervisor and its task, the end of the task, and what is left then; Python 3.9.

Orphans become children of the scene, not of the supervisor, for those in production are no subreapers. A scene also ends when
nobody waits for its answer any more.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import time
import traceback
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from task_sdk.execution_time.teardown.supervised.supervised_task import ending_all, fork

from tests.harness.processes import DEAD, has_exited, read_state
from tests.harness.real import memory
from tests.harness.real.api import ACKNOWLEDGED
from tests.harness.real.supervising import BYSTANDER, CGROUP_VARIABLE, PACKAGE, be_host, name_log
from tests.harness.real.telling import Gone, Told, find

if TYPE_CHECKING:
    from collections.abc import Iterable

LOOK_INTERVAL = 0.02
NEXT = Path("next")
RAISES = "SIGUSR1"
"""Has a handler in the supervisor raise an exception."""
IDLE_LOOKS, IDLE_INTERVAL = 5, 0.05
READY_TIMEOUT = 60.0
"""Seconds until a task must be where it is to be ended, on a machine that is busy."""
BEATS = 2
"""Heartbeats after which a supervisor has noticed a signal that was sent before them."""
NO_END = {
    "dag": "told",
    "end": "",
    "at": "ready",
    "dies_at_stop": 0,
    "dies_after_fork": None,
    "slow_fork": 0,
}
"""Of a task that runs beside the one that is ended, or after it."""
CHATTER = b'"line '
"""Begins what a task logs all the time."""


def run_scene(case: dict[str, Any], folder: Path, answer: int) -> None:
    """Run a case and write what came of it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder.mkdir()
    os.chdir(folder)
    os.environ.update(case["settings"])
    os.environ["AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME"] = str(case["grace"])
    os.environ["AIRFLOW__LOGGING__BASE_LOG_FOLDER"] = str(folder)
    keep_sweeps_to_scene()
    try:
        with memory.make_cgroup(case["memory"]) if case["memory"] else nullcontext() as cgroup, ending_all():
            os.environ[CGROUP_VARIABLE] = str(cgroup or "")
            result = play(case, folder, answer)
    except Gone:
        return
    except Exception:  # noqa: BLE001  # the other side raises it
        result = {"failed": traceback.format_exc()}
    with open(answer, "wb") as file:
        file.write(json.dumps(result, default=str).encode())


def keep_sweeps_to_scene() -> None:
    """Have the supervisors of this scene find its own orphans alone: they would end those of others, which run meanwhile."""
    if importlib.util.find_spec(PACKAGE) is None:  # a stock one
        return
    sweep: Any = importlib.import_module(f"{PACKAGE}.sweep")
    find_orphans, scene = sweep.find_orphans, os.getpid()

    def find_own_orphans() -> list[Any]:
        return [orphan for orphan in find_orphans() if is_below(orphan.process.pid, scene)]

    sweep.find_orphans = find_own_orphans


def is_below(pid: int, ancestor: int) -> bool:
    try:
        return any(parent.pid == ancestor for parent in psutil.Process(pid).parents())
    except psutil.NoSuchProcess:
        return False


def play(case: dict[str, Any], folder: Path, answer: int) -> dict[str, Any]:
    told = Told(folder, answer)
    before = set(psutil.pids()) if case["everything"] else None
    os.environ.update(TOLD=str(told.path), FREED=str(told.freed_path))
    order_reader, order_writer = os.pipe()
    begin = partial(fork_host, order_reader, not_theirs=(answer, order_writer))
    host = bystander = begin(case, folder)
    if case["bystander"] == "supervisor":
        bystander = begin({**case, **NO_END, "host": "bystander"}, folder / "bystander")
    pidfd = os.pidfd_open(host)
    began = time.monotonic()
    if case["bystander"]:
        told.wait_for(BYSTANDER, until=time.monotonic() + READY_TIMEOUT, pidfd=pidfd)
    if wait_until_ready(case, told, pidfd):
        time.sleep(case["delay"])
        if case["end"] == RAISES:
            wait_until_idle(host)
        began = time.monotonic()
        end_task(case, told, order_writer, host)
    until = time.monotonic() + case["patience"]
    if case["notice"]:
        told.wait_for("beat", times=BEATS, after=len(told.events), until=until, pidfd=pidfd)
    if case["free"]:
        told.free()
    result = observe(case, told, host, pidfd, until=until, bystander=bystander, before=before)
    if case["bystander"]:
        free_bystander(told, bystander)
    return {**describe(told.events, began), **result}


def wait_until_idle(pid: int) -> None:
    """Wait until a process waits: a supervisor in its loop, where it stays until its next heartbeat, a task in its sleep.

    What a supervisor's handler raises while it logs does not come through: upstream's masking of secrets catches every exception.
    And a signal that comes after Python has looked for one, but before the system call that waits, is heeded only when that returns.
    """
    deadline, looks = time.monotonic() + READY_TIMEOUT, 0
    while looks < IDLE_LOOKS and time.monotonic() < deadline:
        time.sleep(IDLE_INTERVAL)
        looks = looks + 1 if read_state(pid) == "S" else 0


def fork_host(order: int, case: dict[str, Any], folder: Path, *, not_theirs: Iterable[int] = ()) -> int:
    def be() -> None:
        for descriptor in not_theirs:
            os.close(descriptor)
        folder.mkdir(exist_ok=True)
        be_host(case, folder, order)
        signal.pause()  # while somebody looks at what is left

    return fork(be)


def free_bystander(told: Told, host: int) -> None:
    """Let the bystander end, and wait until its supervisor returns, if it lives."""
    told.free()
    pidfd, until = os.pidfd_open(host), time.monotonic() + READY_TIMEOUT
    told.wait_for("bystander_returned", until=until, pidfd=pidfd, past_return=True)


def wait_until_ready(case: dict[str, Any], told: Told, pidfd: int) -> bool:
    """Return whether the task waits to be ended; it does not if its supervisor has failed."""
    if case["end"] == "":
        return False
    if told.wait_for(case["at"], until=time.monotonic() + READY_TIMEOUT, pidfd=pidfd):
        return True
    if find(told.events, "returned", "at"):
        return False
    output = Path("supervisor.log").read_text()
    raise RuntimeError(f"the task was not ready:\n{told.events}\n{output}")


def observe(
    case: dict[str, Any],
    told: Told,
    host: int,
    pidfd: int,
    *,
    until: float,
    bystander: int,
    before: set[int] | None,
) -> dict[str, Any]:
    """Wait for the supervisor's return, or its death, and describe what has come of it at that moment."""
    returned = told.wait_for("returned", until=until, pidfd=pidfd)
    ended = time.monotonic()
    hung = not returned and not has_exited(pidfd)
    killed_by = None if returned else read_signal(pidfd)
    others = {host, find(told.events, "supervisor", "supervisor")}
    if bystander != host or returned:
        others |= {bystander, find(told.events, BYSTANDER, "pid")}
    left = wait_until_nothing_left(others, ended + case["left_for"], before)
    if case["sweep"]:
        os.kill(host, signal.SIGKILL)
        run_next_supervisor(case)
        left = wait_until_nothing_left(others, time.monotonic(), before)
    told.hear_rest()
    return {
        "hung": hung,
        "killed_by": killed_by,
        "left": left,
        "seconds_to_nothing": None if left else time.monotonic() - ended,
        "log": read_log(Path(name_log(case))),
        "output": "".join(
            path.read_text() for path in (Path("supervisor.log"), NEXT / "supervisor.log") if path.exists()
        ),
    }


def end_task(case: dict[str, Any], told: Told, order: int, host: int) -> None:
    if case["stopped"] or (case["to"], case["end"]) == ("runner", "SIGTERM"):
        wait_until_idle(find_runner(told, host))
    if case["stopped"]:
        stop(find_runner(told, host))
    if case["end"].startswith("SIG"):
        pid = find_runner(told, host) if case["to"] == "runner" else host
        pid = -pid if case["to"] == "group" else pid
        for number in range(case["count"]):
            time.sleep(case["gap"] if number else 0)
            os.kill(pid, getattr(signal, case["end"]))
    elif case["end"] == "OOM":
        memory.make_first_victim(host)
        told.free()  # what the task has started takes all that there is
    else:
        os.write(order, b".")


def find_runner(told: Told, host: int) -> int:
    """Return the runner's PID, which the supervisor may tell after the runner has told something."""
    told.wait_for("started", until=time.monotonic() + READY_TIMEOUT, pidfd=os.pidfd_open(host))
    return int(find(told.events, "started", "runner"))


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while read_state(pid) != "T":
        time.sleep(LOOK_INTERVAL)


def describe(events: list[dict[str, Any]], began: float) -> dict[str, Any]:
    began = find(events, "conflict", "at") or began
    returned_at = find(events, "returned", "returned_at")
    return {
        "seconds": returned_at - began if returned_at else None,
        "states": list_states(events),
        "events": [each for each in events if each["event"] not in {"state", "beat"}],
        **{key: find(events, "returned", key) for key in ("exit_code", "exception", "final_state")},
    }


def list_states(events: list[dict[str, Any]]) -> list[str]:
    told = [each["state"] for each in events if each["event"] == "state" and each["accepted"]]
    return [state for state in told if state != ACKNOWLEDGED]


def wait_until_nothing_left(
    hosts: set[int | None], until: float, before: set[int] | None = None
) -> list[tuple[int, str]]:
    """Return what is left, at the latest when the time is up."""
    while (left := list_left(hosts, before)) and time.monotonic() < until:
        # It belongs to nobody who could be waited for: those that are looked for have yet to be adopted.
        time.sleep(LOOK_INTERVAL)
    return left


def run_next_supervisor(case: dict[str, Any]) -> None:
    """Run another task, which is none of the result, to its end; before it starts there is a look for orphans."""

    def be() -> None:
        os.environ["TOLD"] = os.devnull
        NEXT.mkdir()
        be_host(
            {**case, **NO_END, "task": "returns", "host": "process"}, NEXT, os.open(os.devnull, os.O_RDONLY)
        )

    os.waitpid(fork(be), 0)


def list_left(hosts: set[int | None], before: set[int] | None) -> list[tuple[int, str]]:
    """Return PID and name of those alive; the supervisor is none of them, nor the loop that has forked it.

    They are the descendants of the scene, or all that were not there before.
    """
    left = []
    for process in psutil.Process().children(recursive=True) if before is None else list_new(before):
        with suppress(psutil.NoSuchProcess):  # just gone
            if process.pid not in hosts and read_state(process.pid) not in DEAD:
                left.append((process.pid, process.name()))
    return left


def list_new(before: set[int]) -> list[psutil.Process]:
    """Return the processes that are new. A number comes back only when all others were given, which no scene gets to."""
    return [process for process in psutil.process_iter() if process.pid not in before]


def read_signal(pidfd: int) -> int | None:
    """Return the signal that a child has died of, None if it lives or exited."""
    status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return status.si_status if status and status.si_code in {os.CLD_KILLED, os.CLD_DUMPED} else None


def read_log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if CHATTER not in line]
