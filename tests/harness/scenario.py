"""Supervise one task in this process, as a worker does: `python -m tests.harness.scenario COOKIE FOLDER`.

Run by the interpreter of an environment that has the SDK, with the PYTHONPATH of environments.py; everything else comes
from FOLDER/plan.json. The task starts the planned command, becomes the runner that is planned, and announces itself as
`runner PID` in the planned FIFO. When the planned pipe reaches its end, the task ends as planned: its heartbeats are
answered 409, or it exits. What came of it is written to FOLDER/result.json. Python 3.9 and the packages of the
environment.

The runner is a stand-in that knows nothing of Dags, but treats SIGTERM as the release's own does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NoReturn

from packaging.version import Version
from task_sdk.execution_time.teardown.supervised.supervised_task import Api, Log, in_turn, start_task

from tests.harness.pools import start_pool

try:
    # From 1.4 on, whoever starts a supervisor catches the signals for it.
    from airflow.sdk.execution_time.coordinator import _warm_shutdown_signals as catch_signals
except ImportError:
    catch_signals = nullcontext

try:
    from airflow.sdk.execution_time.teardown import ending, interruption, leftovers, sudo
except ImportError:  # stock
    interruption = None  # type: ignore[assignment]

CALLS_ON_KILL = Version(version("apache-airflow-task-sdk")) >= Version("1.0.4")
"""Whether the stock runner has a handler for SIGTERM, which calls on_kill() and returns; else SIGTERM ends it."""

PATIENCE = 10.0
"""Seconds."""
STARTUP_MESSAGE_MAX_BYTES = 1 << 16
EXITS = {"success": 0, "exit-1": 1}
BYSTANDER = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]


def be_patient() -> None:
    """Let whoever was killed, and sudo, take long; otherwise who gets no processor in time is named as left.

    How long they do take is for the bench to say.
    """
    for module in (ending, leftovers):
        assert "KILL_TIME" in vars(module)
        vars(module)["KILL_TIME"] = PATIENCE
    sudo.SUDO_TIMEOUT = PATIENCE


class PlannedApi(Api):
    """Answers a heartbeat 409 when the order to end has come, if that is how the task ends."""

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__()
        self.plan = plan
        self.conflict_at: float | None = None

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        if self.plan["ending"] == "409" and is_ordered_to_end(self.plan):
            self.conflict_at = self.conflict_at or time.monotonic()
            self.terminate = True
        super().heartbeat(*args, **kwargs)


def take_startup_message() -> None:
    """Be a task that begins: to end with unread bytes would show the supervisor a reset instead of an end of file."""
    os.read(0, STARTUP_MESSAGE_MAX_BYTES)


def is_ordered_to_end(plan: dict[str, Any]) -> bool:
    return bool(select.select([plan["order"]], [], [], 0)[0])


def start_tree(plan: dict[str, Any]) -> None:
    if plan["holds_sockets"]:
        for number in list_descriptors("self"):
            with suppress(OSError):  # the listing's own descriptor is gone
                os.set_inheritable(number, True)
    tree = subprocess.Popen(
        plan["argv"],
        stdout=subprocess.PIPE if plan["piped"] else None,
        start_new_session=plan["new_session"],
        close_fds=not plan["holds_sockets"],
    )
    if plan["holds_sockets"] and (missing := list_sockets("self") - list_sockets(tree.pid)):
        raise RuntimeError(f"{plan['argv']} does not hold {missing}")
    if plan["stops"]:
        os.waitid(os.P_PID, tree.pid, os.WSTOPPED)


def list_descriptors(pid: int | str) -> list[int]:
    return [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def list_sockets(pid: int | str) -> set[str]:
    targets = set()
    for number in list_descriptors(pid):
        with suppress(FileNotFoundError):  # see start_tree()
            targets.add(str(Path(f"/proc/{pid}/fd/{number}").readlink()))
    return {target for target in targets if target.startswith("socket:")}


def be_deaf(_plan: dict[str, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def have_pool(method: str, plan: dict[str, Any]) -> None:
    start_pool(method, plan["ready"])


RUNNERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "deaf": be_deaf,
    "pool-fork": partial(have_pool, "fork"),
    "pool-spawn": partial(have_pool, "spawn"),
    "pool-forkserver": partial(have_pool, "forkserver"),
}


def run_task(plan: dict[str, Any]) -> NoReturn:
    """Be the task, for which SIGTERM means what it does for one of the release's own runner; its on_kill does nothing."""
    if interruption is not None:
        interruption.interrupt_on_sigterm(SimpleNamespace(task=SimpleNamespace(on_kill=lambda: None)))
        try:
            interruption.run_interruptibly(lambda: execute(plan))
        except interruption.TaskInterrupted:
            sys.exit(EXITS["exit-1"])
    elif CALLS_ON_KILL:
        signal.signal(signal.SIGTERM, lambda *_: None)
    execute(plan)


def execute(plan: dict[str, Any]) -> NoReturn:
    """Start the tree, announce it, and end as planned."""
    if plan["argv"]:
        start_tree(plan)
    if plan["runner"]:
        RUNNERS[plan["runner"]](plan)
    with Path(plan["ready"]).open("a") as ready:
        ready.write(f"runner {os.getpid()}\n")
    if plan["ending"] in EXITS:
        os.read(plan["order"], 1)
        sys.exit(EXITS[plan["ending"]])
    while True:
        signal.pause()


def start_bystanders(cookie: str) -> None:
    """Start processes of the supervisor's, in its group and in a session of their own."""
    for new_session in (False, True):
        subprocess.Popen([*BYSTANDER, cookie], env={}, start_new_session=new_session)


def supervise(plan: dict[str, Any]) -> dict[str, Any]:
    if plan["bystanders"]:
        start_bystanders(plan["bystanders"])
    api, log = PlannedApi(plan), Log()
    process = start_task(in_turn(take_startup_message, lambda: run_task(plan)), api, logger=log.logger)
    result: dict[str, Any] = {"final_state": None, "exception": None, "traceback": None}
    try:
        process.wait()
        result["final_state"] = str(process.final_state)
    except Exception as error:  # noqa: BLE001  # whatever the supervisor dies of is the result
        result["exception"] = f"{type(error).__name__}: {error}"
        result["traceback"] = traceback.format_exc()
    return {
        **result,
        "returned_at": time.monotonic(),
        "conflict_at": api.conflict_at,
        "log": log.entries,
        "told": api.told,
    }


def run(folder: Path, **changes: Any) -> NoReturn:
    """Do what is planned, but for the changes, and exit."""
    plan = {**json.loads((folder / "plan.json").read_text()), **changes}
    if plan["patient"]:
        be_patient()
    with catch_signals():
        result = supervise(plan)
    (folder / "result.json").write_text(json.dumps(result, default=str))
    # Who counts what is left does so when this process is gone: the interpreter's own end would give it time to go.
    os._exit(0)


if __name__ == "__main__":
    run(Path(sys.argv[2]))
