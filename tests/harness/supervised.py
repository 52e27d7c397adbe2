"""Run a real supervisor over a task that starts processes, end the task, and see what is left."""

from __future__ import annotations

import json
import os
import select
import signal
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, get_args

from packaging.specifiers import SpecifierSet

from tests.harness.environments import LOG, start_program
from tests.harness.processes import COOKIE_VARIABLE, Process, find_marked, make_cookie, wait_for_exit

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from tests.harness.environments import Environment
    from tests.harness.shapes import Shape

    Launch = Callable[[str, Path, int], "SupervisorProcess"]
    """Starts a supervisor with a cookie, a folder that has its plan, and the descriptor of its order to end."""

Ending = Literal["409", "sigterm", "runner-killed", "exit-1", "success"]
# From 1.4 on a supervisor that gets SIGTERM lets its task finish by default: nothing ends, and nothing is to be seen.
ENDS_TASK_ON_SIGTERM = SpecifierSet("<1.4.0a0", prereleases=True)

READY_TIMEOUT = 300.0
"""Seconds for importing the SDK and starting the tree; half a minute has been seen where ten others wanted each core."""
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
        what_is_new = {"argv": self.shape.argv(cookie, ready), "ready": str(ready), "order": order}
        return json.dumps({**asdict(self), **asdict(self.shape), **what_is_new})


@dataclass
class Supervisor:
    """A running supervisor, whose task does what is planned."""

    plan: Plan
    process: SupervisorProcess
    pidfd: int
    order: IO[bytes]
    """Its end is the task's order to end."""
    announcements: IO[bytes]
    cookie: str
    folder: Path
    runner: int = 0
    """The task's own PID, once `wait_for_tree` has seen it."""
    announced: list[int] = field(default_factory=list)
    """The PIDs of the tree, that of the runner included."""

    def read_output(self) -> str:
        return (self.folder / LOG).read_text(errors="replace")


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
    with start_supervised(environment, shape, ending, env=env) as supervisor:
        return observe(supervisor, end_task(supervisor), timeout)


def kill_supervisors() -> None:
    """Have every `run_supervised` of other threads come to its end soon, without a meaningful result."""
    for process in tuple(_running):
        process.kill()


def start_supervised(
    environment: Environment, shape: Shape, ending: Ending, *, env: Mapping[str, str] | None = None
) -> AbstractContextManager[Supervisor]:
    """Start `shape` as a task under a supervisor in a session of its own, as `start_supervisor` does."""
    return start_supervisor(partial(launch_scenario, environment, env=env), Plan(shape, ending))


def launch_scenario(
    environment: Environment,
    cookie: str,
    folder: Path,
    order: int,
    *,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start scenario.py in a session of its own, with the variables of `env` besides SETTINGS; `options` are Popen's."""
    return start_program(
        environment,
        folder,
        "tests.harness.scenario",
        cookie,
        folder,
        env={**SETTINGS, **(env or {}), COOKIE_VARIABLE: cookie},
        pass_fds=[order],
        start_new_session=True,
        **options,
    )


@contextmanager
def start_supervisor(launch: Launch, plan: Plan) -> Iterator[Supervisor]:
    """Have a supervisor launched, and yield it when all of its task is there.

    None of the processes outlives the context. Raises SupervisorFailedError when some do not come up.
    """
    order_read, order_write = os.pipe()
    with ExitStack() as stack:
        far_end = stack.enter_context(open(order_read, "rb"))  # noqa: PTH123  # a descriptor has no path
        order = stack.enter_context(open(order_write, "wb"))  # noqa: PTH123
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="supervised-")))
        cookie = stack.enter_context(make_cookie())
        ready = folder / "ready"
        os.mkfifo(ready)
        # A runaway ends when it is gone.
        stack.callback(ready.unlink)
        # Held open at both ends: no writer waits for a reader, and the first to close is not the end of the file.
        announcements = stack.enter_context(ready.open("rb+", buffering=0))
        (folder / "plan.json").write_text(plan.dump(cookie, ready, order_read))
        process = launch(cookie, folder, order_read)
        stack.callback(end_process, process)
        _running.add(process)
        far_end.close()
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        supervisor = Supervisor(plan, process, pidfd, order, announcements, cookie, folder)
        wait_for_tree(supervisor)
        yield supervisor


def end_process(process: SupervisorProcess) -> None:
    _running.discard(process)
    process.kill()
    process.wait()


def wait_for_tree(supervisor: Supervisor) -> None:
    """Wait until the runner and all of its processes have announced themselves."""
    deadline = time.monotonic() + READY_TIMEOUT
    text = b""
    while text.count(b"\n") < supervisor.plan.shape.processes + 1:
        sources: list[IO[bytes] | int] = [supervisor.announcements, supervisor.pidfd]
        readable, _, _ = select.select(sources, [], [], max(0, deadline - time.monotonic()))
        if supervisor.announcements not in readable:
            reason = "the supervisor ended early" if readable else f"no task after {READY_TIMEOUT:.0f} s"
            raise SupervisorFailedError(f"{reason}; its output:\n{supervisor.read_output()}")
        text += supervisor.announcements.read(ANNOUNCEMENTS_MAX_BYTES)
    supervisor.runner = next(
        int(line.split()[1]) for line in text.splitlines() if line.startswith(b"runner ")
    )
    supervisor.announced = [int(line.split()[-1]) for line in text.splitlines()]


def end_task(supervisor: Supervisor) -> float:
    """Bring about the planned ending; return the monotonic time."""
    began = time.monotonic()
    if supervisor.plan.ending == "sigterm":
        supervisor.process.terminate()
    elif supervisor.plan.ending == "runner-killed":
        os.kill(supervisor.runner, signal.SIGKILL)
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
