"""Run a real supervisor over a task that starts processes, end the task, and see what is left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, get_args

from packaging.specifiers import SpecifierSet

from tests.harness.environments import clean_env, make_module_path
from tests.harness.processes import COOKIE_VARIABLE, Process, find_marked, make_cookie, wait_for_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.harness.environments import Environment
    from tests.harness.shapes import Shape

Ending = Literal["409", "sigterm", "runner-killed", "exit-1", "success"]
# From 1.4 on a supervisor that gets SIGTERM lets its task finish by default: nothing ends, and nothing is to be seen.
ENDS_TASK_ON_SIGTERM = SpecifierSet("<1.4.0a0", prereleases=True)

READY_TIMEOUT = 60.0
"""Seconds for importing the SDK and starting the tree; a cold disk and two busy cores take most of it."""
RETURN_TIMEOUT = 30.0
"""Seconds from the order to end until the supervisor must have returned."""
SETTLE_TIMEOUT = 1.0
"""Seconds that a process which was already told to end may take to do it after the supervisor's return."""

ANNOUNCEMENTS_MAX_BYTES = 1 << 16

HEARTBEAT_INTERVAL = 1
KILL_GRACE = 5
SOCKET_CLEANUP_TIMEOUT = 3
SETTINGS = {
    "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": str(KILL_GRACE),
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": str(HEARTBEAT_INTERVAL),
    "AIRFLOW__WORKERS__SOCKET_CLEANUP_TIMEOUT": str(SOCKET_CLEANUP_TIMEOUT),
}
"""Airflow's defaults are 60 (before 1.4 it is 5 for everybody), 5 and 60 seconds: the same happens, later."""


@dataclass(frozen=True)
class Outcome:
    """What came of one supervised task.

    `seconds` counts from the 409, or from the signal or exit that ended the task, to the supervisor's return or death.
    """

    seconds: float
    left: list[Process]
    """Alive when the supervisor was gone and SETTLE_TIMEOUT had passed, the runner included."""
    left_at_return: list[Process]
    """Alive at the very moment."""
    hung: bool = False
    """The supervisor did not return in time and was killed; nothing below is known."""
    killed_by: int | None = None
    """The signal that the supervisor died of; nothing below is known."""
    exception: str | None = None
    """Type and message of what `wait()` raised."""
    traceback: str | None = None
    final_state: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    """The events in the task's log."""
    told: list[str] = field(default_factory=list)
    """The states that the supervisor reported to the API."""

    @property
    def returned(self) -> bool:
        """Whether the supervisor did its work to the end."""
        return not self.hung and self.killed_by is None and self.exception is None

    @property
    def clean(self) -> bool:
        """Whether, besides, nothing is left."""
        return self.returned and not self.left


class SupervisorProcess(Protocol):
    """A child of this process, or of somebody who collects it for us."""

    pid: int

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """What a supervised task does."""

    shape: Shape
    ending: Ending
    bystanders: str | None = None
    """The cookie of two processes that the supervisor starts before the task, none without."""
    patient: bool = False
    """The patched supervisor lets killed processes take long to end (see scenario.py)."""

    def dump(self, cookie: str, ready: Path, order: int) -> str:
        """Return what scenario.py takes."""
        return json.dumps(
            {
                "argv": self.shape.argv(cookie, ready),
                "bystanders": self.bystanders,
                "ending": self.ending,
                "holds_sockets": self.shape.holds_sockets,
                "new_session": self.shape.new_session,
                "order": order,
                "patient": self.patient,
                "piped": self.shape.piped,
                "ready": str(ready),
                "runner": self.shape.runner,
                "stops": self.shape.stops,
            }
        )


@dataclass
class Supervisor:
    """A running supervisor."""

    process: SupervisorProcess
    pidfd: int
    order: IO[bytes]
    """Its end is the task's order to end."""
    announcements: IO[bytes]
    cookie: str
    folder: Path
    announced: list[int] = field(default_factory=list)
    """The PIDs of the tree, once `wait_for_tree` has seen it."""

    def read_output(self) -> str:
        return (self.folder / "supervisor.log").read_text(errors="replace")


_running: set[SupervisorProcess] = set()


class SupervisorFailedError(Exception):
    """The scenario itself went wrong: nothing can be said about the release."""


def run_supervised(
    environment: Environment,
    shape: Shape,
    ending: Ending = "409",
    *,
    timeout: float = RETURN_TIMEOUT,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Start `shape` as a task under the environment's supervisor, end the task, and return what came of it.

    Whatever happens, none of the processes outlives the call. Raises SupervisorFailedError when the scenario does not get as far
    as its end.
    """
    if ending not in get_args(Ending):
        raise ValueError(f"an ending is one of {', '.join(get_args(Ending))}, not {ending!r}")
    with start_supervised(environment, shape, ending, env=env) as (supervisor, runner):
        return observe(supervisor, end_task(supervisor, runner, ending), timeout)


def kill_supervisors() -> None:
    """Have every `run_supervised` of other threads come to its end soon, without a meaningful result."""
    for process in tuple(_running):
        process.kill()


@contextmanager
def start_supervised(
    environment: Environment, shape: Shape, ending: Ending, *, env: Mapping[str, str] | None = None
) -> Iterator[tuple[Supervisor, int]]:
    """Start `shape` as a task under a supervisor in a session of its own; yield the supervisor and its runner's PID.

    None of the processes outlives the context. Raises SupervisorFailedError when some do not come up.
    """
    with tempfile.TemporaryDirectory(prefix="supervised-") as name, make_cookie() as cookie:
        folder = Path(name)
        variables = {
            **clean_env(folder, python=environment.python),
            **SETTINGS,
            **(env or {}),
            "PYTHONPATH": make_module_path(),
            COOKIE_VARIABLE: cookie,
        }

        def launch(order: int) -> subprocess.Popen[bytes]:
            return launch_scenario(environment, cookie, folder, order, env=variables)

        with watch_supervisor(launch, Plan(shape, ending), cookie=cookie, folder=folder) as supervisor:
            yield supervisor, wait_for_tree(supervisor, shape.processes)


def launch_scenario(
    environment: Environment, cookie: str, folder: Path, order: int, **options: Any
) -> subprocess.Popen[bytes]:
    """Start scenario.py in a session of its own, with what it says in the folder; `options` are Popen's."""
    with (folder / "supervisor.log").open("wb") as output:
        return subprocess.Popen(
            [environment.python, "-m", "tests.harness.scenario", cookie, folder],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[order],
            start_new_session=True,
            **options,
        )


@contextmanager
def watch_supervisor(
    launch: Callable[[int], SupervisorProcess], plan: Plan, *, cookie: str, folder: Path
) -> Iterator[Supervisor]:
    """Have a supervisor launched that gets the descriptor of its order; kill it in the end if it still runs."""
    ready = folder / "ready"
    os.mkfifo(ready)
    order_read, order_write = os.pipe()
    with ExitStack() as stack:
        # A runaway ends when it is gone.
        stack.callback(ready.unlink)
        far_end = stack.enter_context(open(order_read, "rb"))  # noqa: PTH123  # a descriptor has no path
        order = stack.enter_context(open(order_write, "wb"))  # noqa: PTH123
        # Held open at both ends: no writer waits for a reader, and the first to close is not the end of the file.
        announcements = stack.enter_context(ready.open("rb+", buffering=0))
        (folder / "plan.json").write_text(plan.dump(cookie, ready, order_read))
        process = launch(order_read)
        stack.callback(end_process, process)
        _running.add(process)
        far_end.close()
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        yield Supervisor(process, pidfd, order, announcements, cookie, folder)


def end_process(process: SupervisorProcess) -> None:
    _running.discard(process)
    process.kill()
    process.wait()


def wait_for_tree(supervisor: Supervisor, processes: int) -> int:
    """Return the runner's PID once it and `processes` others have announced themselves."""
    deadline = time.monotonic() + READY_TIMEOUT
    text = b""
    while text.count(b"\n") < processes + 1:
        sources: list[IO[bytes] | int] = [supervisor.announcements, supervisor.pidfd]
        readable, _, _ = select.select(sources, [], [], max(0, deadline - time.monotonic()))
        if supervisor.announcements not in readable:
            reason = "the supervisor ended early" if readable else f"no task after {READY_TIMEOUT:.0f} s"
            raise SupervisorFailedError(f"{reason}; its output:\n{supervisor.read_output()}")
        text += supervisor.announcements.read(ANNOUNCEMENTS_MAX_BYTES)
    runner = next(int(line.split()[1]) for line in text.splitlines() if line.startswith(b"runner "))
    supervisor.announced = [int(line.split()[-1]) for line in text.splitlines()]
    return runner


def end_task(supervisor: Supervisor, runner: int, ending: Ending) -> float:
    """Bring about the ending; return the monotonic time."""
    began = time.monotonic()
    if ending == "sigterm":
        supervisor.process.terminate()
    elif ending == "runner-killed":
        os.kill(runner, signal.SIGKILL)
    else:
        supervisor.order.close()
    return began


def observe(supervisor: Supervisor, began: float, timeout: float) -> Outcome:
    """Wait for the supervisor and describe what it leaves."""
    hung = not select.select([supervisor.pidfd], [], [], timeout)[0]
    ended = time.monotonic()
    alive = find_others(supervisor)
    wait_for_exit(alive, SETTLE_TIMEOUT)
    left = find_others(supervisor)
    if hung:
        return Outcome(ended - began, left, alive, hung=True)
    status = supervisor.process.wait()
    if status < 0:
        return Outcome(ended - began, left, alive, killed_by=-status)
    if status > 0:
        raise SupervisorFailedError(
            f"the supervisor exited {status}; its output:\n{supervisor.read_output()}"
        )
    result = json.loads((supervisor.folder / "result.json").read_text())
    conflict_at, returned_at = result.pop("conflict_at"), result.pop("returned_at")
    return Outcome(returned_at - (conflict_at or began), left, alive, **result)


def find_others(supervisor: Supervisor) -> list[Process]:
    """Return who is alive of a supervisor's task."""
    return [process for process in find_marked(supervisor.cookie) if process.pid != supervisor.process.pid]
