"""A DAG run whose tasks start processes, followed from outside: who belongs to it, and who watches it."""

from __future__ import annotations

import os
import re
import select
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.servers import ServerFailedError
from tests.harness.processes import Process, find_marked, has_exited, read_name, read_strings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.e2e.deployment import Airflow

DAG = "starts_processes"
PROCESSES = {
    "bash": 3,
    "external_python": 2,
    "virtualenv": 2,
    "children": 4,
    "cleans_up": 1,
    "removes_its_work": 1,
    "sleeps": 0,
}
"""What each task of the DAG starts."""
ANNOUNCEMENTS = sum(PROCESSES.values()) + 1
"""Those of what is started, and of the task that starts nothing."""

ANNOUNCE_TIMEOUT = 180.0
"""Seconds in which all tasks must have started all that they start; two busy cores take 30."""
STATE_TIMEOUT = 60.0
"""Seconds that the scheduler has to take notice of what came of a task."""
POLL_INTERVAL = 0.05
ANNOUNCEMENTS_MAX_BYTES = 1 << 16

CELERY_FINISHED = re.compile(r"\[[0-9a-f-]{36}\] (?:succeeded in|raised unexpected|raised exception)")


@dataclass(frozen=True)
class Member:
    """A task's own process, and the supervisor above it, which is its parent. Descriptors outlive the numbers."""

    runner: int
    runner_pidfd: int
    supervisor: int
    supervisor_pidfd: int
    title: bytes
    """The supervisor's; a worker of a LocalExecutor has the task instance in it."""


@dataclass
class Run:
    """A run of the DAG whose tasks all have started what they start."""

    airflow: Airflow
    id: str
    cookie: str
    folder: Path
    announcements: int
    members: dict[str, Member] = field(default_factory=dict)
    due_signals: dict[int, str] = field(default_factory=dict)
    """What the supervisor of `children` has to end by itself, and with which signal; the others end with the task's group."""
    ends: dict[str, float] = field(default_factory=dict)
    """Seconds for which each task's own process lived on while the slots were waited for."""
    _finished_before: int = 0

    def wait_for_processes(self, number: int) -> None:
        """Wait until so many more processes have announced themselves."""
        announced = 0
        deadline = time.monotonic() + ANNOUNCE_TIMEOUT
        while announced < number:
            if select.select([self.announcements], [], [], 1)[0]:
                announced += os.read(self.announcements, ANNOUNCEMENTS_MAX_BYTES).count(b"\n")
                continue
            # The FIFO has no end while it is open here for writing, too: whoever should write to it has to be looked at.
            reason = self._find_reason_to_give_up()
            if time.monotonic() > deadline:
                reason = f"{ANNOUNCE_TIMEOUT:.0f} s have passed"
            if reason:
                raise ServerFailedError(
                    f"{announced} of {number} processes were started when {reason}: {self.states()}\n"
                    f"{self.airflow.tail_logs()}"
                )

    def _find_reason_to_give_up(self) -> str | None:
        for server in self.airflow.servers:
            if server.process.poll() is not None:
                return f"{server.name} ended"
        for task, state in self.states().items():
            if state in ("failed", "success", "up_for_retry"):
                return f"{task} ended"
        return None

    def instances(self) -> dict[str, dict[str, Any]]:
        return self.airflow.client.task_instances(DAG, self.id)

    def states(self) -> dict[str, str | None]:
        """Return the state of each task."""
        return {task: instance["state"] for task, instance in sorted(self.instances().items())}

    def wait_for_states(self, *states: str | None, tasks: Sequence[str] = tuple(PROCESSES)) -> None:
        """Wait until each of the tasks has one of the states, or STATE_TIMEOUT has passed."""
        deadline = time.monotonic() + STATE_TIMEOUT
        while time.monotonic() < deadline:
            now = self.states()
            if all(now[task] in states for task in tasks):
                return
            time.sleep(POLL_INTERVAL)

    def find_left(self, attempt: int = 1) -> dict[str, list[Process]]:
        """Return who is alive of each task's try, its own process among them; tasks without anybody are left out."""
        left = {task: find_marked(f"{self.cookie}.{task}.{attempt}") for task in PROCESSES}
        for task, member in self.members.items():
            if attempt == 1 and not has_exited(member.runner_pidfd):
                left[task].append(Process(member.runner, read_name(member.runner)))
        return {task: processes for task, processes in left.items() if processes}

    def list_left(self, attempt: int = 1) -> list[Process]:
        """Return the same, whatever the task."""
        return [process for processes in self.find_left(attempt).values() for process in processes]

    def signal_supervisors(self, sig: int) -> None:
        """Send a signal to the supervisors, once to each."""
        for supervisor in {member.supervisor for member in self.members.values()}:
            os.kill(supervisor, sig)

    def wait_for_slots(self, timeout: float) -> float | None:
        """Return after how many seconds all slots of the tasks were free, or their supervisors gone; None if never."""
        began = time.monotonic()
        while True:
            for task, member in self.members.items():
                if task not in self.ends and has_exited(member.runner_pidfd):
                    self.ends[task] = time.monotonic() - began
            if self.slots_free():
                return time.monotonic() - began
            if time.monotonic() - began > timeout:
                return None
            time.sleep(POLL_INTERVAL)

    def slots_free(self) -> bool:
        members = [member for member in self.members.values() if not has_exited(member.supervisor_pidfd)]
        if self.airflow.executor == "celery":
            # Not the sum: a worker that is being stopped has its processes end as their tasks finish.
            return not members or count_finished(self.airflow) - self._finished_before >= len(self.members)
        return not any(read_title(member.supervisor) == member.title for member in members)

    def read_on_kill(self, attempt: int = 1) -> list[str]:
        """Return what on_kill of the operator has written."""
        record = self.folder / f"on_kill.{attempt}"
        return record.read_text().split("\n")[:-1] if record.exists() else []


@contextmanager
def start_run(airflow: Airflow) -> Iterator[Run]:
    """Start a run, and yield it when every process of it has announced itself."""
    with open_announcements(airflow) as (conf, announcements):
        run = Run(airflow, "", conf["cookie"], Path(conf["folder"]), announcements)
        try:
            run.id = airflow.client.trigger(DAG, conf)
            run.wait_for_processes(ANNOUNCEMENTS)
            find_members(run)
            run.due_signals = find_due_signals(run)
            yield run
        finally:
            for member in run.members.values():
                os.close(member.runner_pidfd)
                os.close(member.supervisor_pidfd)


@contextmanager
def open_announcements(airflow: Airflow) -> Iterator[tuple[dict[str, str], int]]:
    """Yield the `conf` of a run, with a cookie and a folder of its own, and the FIFO that it names, open."""
    cookie = f"e2e-{uuid.uuid4().hex}"
    folder = airflow.folder / cookie
    folder.mkdir()
    ready = folder / "ready"
    os.mkfifo(ready)
    # For tasks of another user; nobody else may enter the folder above.
    folder.chmod(0o777)
    ready.chmod(0o666)
    announcements = os.open(ready, os.O_RDWR)
    try:
        yield {"cookie": cookie, "ready": str(ready), "folder": str(folder)}, announcements
    finally:
        os.close(announcements)


def find_members(run: Run) -> None:
    """Note the processes that run and watch the tasks."""
    for task, instance in run.instances().items():
        runner = instance["pid"]
        supervisor = read_parent(runner)
        pidfds = os.pidfd_open(runner), os.pidfd_open(supervisor)
        run.members[task] = Member(runner, pidfds[0], supervisor, pidfds[1], read_title(supervisor))
    if run.airflow.executor == "celery":
        run._finished_before = count_finished(run.airflow)


def find_due_signals(run: Run) -> dict[int, str]:
    """Return the PIDs of the deaf one of `children` and of the one in a session of its own, with the signals that end them."""
    children = [child.pid for child in find_marked(f"{run.cookie}.children.1")]
    (deaf,) = [pid for pid in children if b"deaf" in read_strings(pid, "cmdline")]
    (leader,) = [pid for pid in children if os.getsid(pid) == pid]
    return {deaf: "SIGKILL", leader: "SIGTERM"}


def count_finished(airflow: Airflow) -> int:
    """Return how many tasks a Celery worker has done with."""
    return len(CELERY_FINISHED.findall(airflow.worker.log.read_text(errors="replace")))


def read_parent(pid: int) -> int:
    # After the name, which may hold anything: the state, the parent.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def read_title(pid: int) -> bytes:
    """Return what ps(1) shows of a process; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
