"""A scene: a supervisor and its task, the end of the task, and what is left then; Python 3.9.

Orphans become children of the scene, not of the supervisor, for those in production are no subreapers. A scene also ends when
nobody waits for its answer any more.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from airflow.sdk.execution_time.supervisor import conf
from tests.harness.processes import set_subreaper
from tests.harness.real.api import ACKNOWLEDGED
from tests.harness.real.supervising import be_host, fork
from tests.harness.real.telling import Gone, Told, find

LOOK_INTERVAL = 0.02
READY_TIMEOUT = 60.0
"""Seconds until a task must be where it is to be ended, on a machine that is busy."""
BEATS = 2
"""Heartbeats after which a supervisor has noticed a signal that was sent before them."""
CHATTER = b'"line '
"""Begins what a task logs all the time."""


def run_scene(case: dict[str, Any], folder: Path, answer: int) -> None:
    """Run a case and write what came of it."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    set_subreaper(wanted=True)
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
    if wait_until_ready(case, told, pidfd):
        time.sleep(case["delay"])
        began = time.monotonic()
        end_task(case, told, order_writer, host)
    until = time.monotonic() + case["patience"]
    if case["notice"]:
        told.wait_for("beat", times=BEATS, after=len(told.events), until=until, pidfd=pidfd)
    if case["free"]:
        told.free()
    return observe(case, told, host, pidfd, began=began, until=until)


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
    case: dict[str, Any], told: Told, host: int, pidfd: int, *, began: float, until: float
) -> dict[str, Any]:
    """Wait for the supervisor's return, or its death, and describe what has come of it at that moment."""
    returned = told.wait_for("returned", until=until, pidfd=pidfd)
    ended = time.monotonic()
    hosts = {host, find(told.events, "supervisor", "supervisor")}
    left = wait_until_nothing_left(hosts, ended + case["left_for"])
    if case["sweep"]:
        sweep()
        left = wait_until_nothing_left(hosts, time.monotonic())
    told.hear_rest()
    return {
        **describe(told.events, began),
        "hung": not returned and not select.select([pidfd], [], [], 0)[0],
        "killed_by": None if returned else read_signal(pidfd),
        "seconds_to_death": ended - began,
        "left": left,
        "seconds_to_nothing": None if left else time.monotonic() - ended,
        "log": read_log(Path("task.log")),
        "output": Path("supervisor.log").read_text(),
    }


def end_task(case: dict[str, Any], told: Told, order: int, host: int) -> None:
    if case["end"].startswith("SIG"):
        pid = {"runner": find(told.events, "started", "runner"), "supervisor": host}[case["to"]]
        for number in range(case["count"]):
            time.sleep(case["gap"] if number else 0)
            os.kill(pid, getattr(signal, case["end"]))
    else:
        os.write(order, b".")


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


def wait_until_nothing_left(hosts: set[int | None], until: float) -> list[tuple[int, str]]:
    """Return what is left, at the latest when the time is up."""
    while (left := list_left(hosts)) and time.monotonic() < until:
        # It belongs to nobody who could be waited for: those that are looked for have yet to be adopted.
        time.sleep(LOOK_INTERVAL)
    return left


def sweep() -> None:
    """Do what the next supervisor does before its first task."""
    # An unfixed one does not have it.
    child_sweep = importlib.import_module("airflow.sdk.execution_time.child_sweep")
    pid = fork(lambda: child_sweep.sweep_once(conf))
    os.waitpid(pid, 0)


def list_left(hosts: set[int | None]) -> list[tuple[int, str]]:
    """Return PID and name of those alive; the supervisor is none of them, nor the loop that has forked it."""
    left = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid not in hosts and process.status() not in {
                psutil.STATUS_ZOMBIE,
                psutil.STATUS_DEAD,
            }:
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
