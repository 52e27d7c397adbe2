"""Run tasks by Airflow's own task runner in the environment of a release, end them, and see what came of it."""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import psutil

from patches.errors import PatchError
from tests.harness.environments import LOG, start_program
from tests.harness.namespaces import UNSHARE_NETWORK

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping

    from tests.harness.environments import Environment

DAGS = Path(__file__).parent / "dags"
PATIENCE = 90.0
"""Seconds from the order to end after which a supervisor hangs; far more than any grace that is set here."""
SCENE_TIMEOUT = 300.0
"""Seconds from the request to the answer: the driver gives up earlier by itself."""
IMPORT_TIMEOUT = 120.0
GRACE = 30
"""Seconds of [core] killed_task_cleanup_time, far more than a task with nothing to wait for needs."""

SETTINGS = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(
        [
            {
                "name": "real",
                "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
                "kwargs": {"path": str(DAGS)},
            }
        ]
    ),
    "AIRFLOW__WORKERS__EXECUTION_API_RETRIES": "2",
    "AIRFLOW__WORKERS__EXECUTION_API_RETRY_WAIT_MIN": "0.05",
    "AIRFLOW__WORKERS__EXECUTION_API_RETRY_WAIT_MAX": "0.1",
}


class DriverFailedError(PatchError):
    """Nothing can be said about the case."""


@dataclass(frozen=True)
class Case:
    """A task of a Dag file in dags/, and how it is ended when it is ready."""

    task: str
    end: str = "SIGTERM"
    """A signal, the status of the answer to a heartbeat, or nothing: the task ends by itself. With another word nobody asks it to
    end, but it may be freed when it is ready."""
    at: str = "ready"
    """The event that shows that it is time."""
    to: str = "supervisor"
    """Who gets the signal: the supervisor (or what has forked it), its process group, or the runner."""
    count: int = 1
    gap: float = 0
    """Seconds between signals."""
    delay: float = 0
    """Seconds from ready to the end, for ends at moments that nobody has chosen."""
    retries: bool = False
    grace: int = GRACE
    orphan_grace: float = 0
    """Seconds that a forked runner has when its supervisor has died, if not those of the release."""
    host: str = "process"
    """What runs the supervisor: a process, a thread, a process forked by an asyncio loop that passes SIGTERM on, or others of
    supervising.py."""
    free: bool = False
    """Free a task that waits for it, once its end was asked for."""
    notice: bool = False
    """Do so when the supervisor has noticed the signal."""
    patience: float = PATIENCE
    left_for: float = 0
    """Seconds that what is left has to end by itself; what there is then counts."""
    sweep: bool = False
    """Have the next supervisor start after that, when this one is dead."""
    stopped: bool = False
    """Stop the runner before."""
    dies_after_fork: float | None = None
    """Kill the supervisor so many seconds after it has forked the runner, whatever `end` says."""
    slow_fork: float = 0
    """Seconds that the runner takes to begin."""
    dies_at_stop: int = 0
    """Kill the supervisor when it has sent so many SIGSTOPs."""
    bystander: str = ""
    """Where another task runs meanwhile: below another `supervisor`, or in another `thread` of the host."""
    dag: str = "told"
    """The Dag, and the stem of its file."""
    everything: bool = False
    """Whatever is new in the PID namespace counts as left, descendant or not: the driver must have one of its own."""
    carries_no_mark: bool = False
    """Have a hard limit that is below every mark, so that a task carries it in a variable alone."""
    memory: int = 0
    """Megabytes that the host, and all that it starts, may have."""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    seconds: float | None
    """From the refused heartbeat or the signal to the supervisor's return; None if it has not returned."""
    seconds_to_nothing: float | None
    """From the supervisor's return or death until nothing was left; None if something was at the end."""
    hung: bool = False
    killed_by: int | None = None
    """The signal that the supervisor died of."""
    exit_code: int | None = None
    exception: str | None = None
    final_state: str | None = None
    states: list[str] = field(default_factory=list)
    """Told to the API and accepted, in order."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What the task, the supervisor and the API have told of themselves."""
    left: list[tuple[int, str]] = field(default_factory=list)
    """PID and name of those alive when the supervisor returned or died, the runner included; see Case.left_for."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """The task's log."""
    output: str = ""
    """What the supervisor has printed."""

    def count(self, event: str) -> int:
        return sum(each["event"] == event for each in self.events)


class Driver:
    """A running driver; any number of threads may run cases at a time."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self._connection = connection
        self._log = log
        self._lock = Lock()

    def run(self, case: Case) -> Result:
        """Run a case; nothing of it outlives the call."""
        reader, writer = os.pipe()
        with open(reader, "rb") as answer:  # noqa: PTH123  # a descriptor has no path
            try:
                with self._lock:
                    socket.send_fds(self._connection, [json.dumps(asdict(case)).encode()], [writer])
            finally:
                os.close(writer)
            deadline = time.monotonic() + SCENE_TIMEOUT
            text = b""
            while select.select([answer], [], [], max(0, deadline - time.monotonic()))[0]:
                part = answer.read1()
                text += part
                if not part:
                    break
        result = json.loads(text) if text else {"failed": "no answer"}
        if "failed" in result:
            raise DriverFailedError(f"{case}: {result['failed']}\n{self._log.read_text()}")
        return Result(**result)


@contextmanager
def start_driver(environment: Environment, *, own_namespace: bool = False) -> Iterator[Driver]:
    """Start a driver with what an environment has; nothing of it outlives the context.

    With `own_namespace` it is the first process of a PID namespace, and all of that ends with the context, at once. Of networks
    there is loopback alone.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tempfile.TemporaryDirectory(prefix="real-runner-") as name, ours:
        folder = Path(name)
        log = folder / LOG
        with theirs:
            process = start_program(
                environment,
                folder,
                "tests.harness.real.driver",
                str(theirs.fileno()),
                folder,
                before=UNSHARE_NETWORK if own_namespace else (),
                env=SETTINGS,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            ours.settimeout(IMPORT_TIMEOUT)
            if not ours.recv(1 << 10):
                raise DriverFailedError(f"the driver has ended:\n{log.read_text()}")
            yield Driver(ours, log)
        finally:
            ours.close()
            if own_namespace:
                end_namespace(process)
            process.wait()


def end_namespace(unshare: subprocess.Popen[bytes]) -> None:
    """Kill the first process of a namespace: unshare returns when the kernel has ended all others there."""
    for first in psutil.Process(unshare.pid).children():
        with suppress(psutil.NoSuchProcess):
            first.kill()
