"""Processes that a task has started as another user, with a real sudo; under the patched supervisor of one release."""

from __future__ import annotations

import os
import pwd
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patches.environments import NoInterpreterError
from patches.releases import find_release
from tests.harness.environments import HELPERS, clean_env, create_environment, make_module_path
from tests.harness.processes import find_marked, wait_for_exit
from tests.harness.shapes import NOT_ENDED_EVENT, Shape
from tests.harness.supervised import (
    RETURN_TIMEOUT,
    Plan,
    end_task,
    launch_scenario,
    observe,
    start_supervisor,
)
from tests.harness.users import (
    OTHER,
    PYTHON,
    WORKER,
    UnsuitableSystemError,
    check_users,
    find_admin_tool,
    make_place,
    permit,
)
from tests.harness.wheels import build_patched_wheel

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.harness.environments import Environment
    from tests.harness.processes import Process
    from tests.harness.supervised import Ending, Outcome

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="not run: only root may become other users"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not run: the system is not Linux"),
]

VERSION = "1.1.8"
MODULES = (
    "tests",
    "tests/harness",
    f"{HELPERS}/task_sdk",
    f"{HELPERS}/task_sdk/execution_time",
    f"{HELPERS}/task_sdk/execution_time/teardown",
    f"{HELPERS}/task_sdk/execution_time/teardown/supervised",
)
"""Folders with what a supervisor of ours imports."""
GRACE = 1
# The contract says one second more than the grace period; the rest is for a busy machine.
MARGIN = 1 + 15
# More than both together: who waits for sockets that the task's processes hold is late.
SOCKET_CLEANUP_TIMEOUT = 30
PATIENCE = 60


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return a folder that everybody may read, with as much of the repository as a supervisor needs."""
    with make_place(MODULES) as place:
        yield place


@pytest.fixture(scope="module")
def environment(place: Path) -> Environment:
    """Return an environment that others may use, wherever the repository is."""
    try:
        check_users()
        release = find_release(VERSION)
        wheel = build_patched_wheel(release, place)
        return create_environment(release, wheel=wheel, python=PYTHON, cache=place)
    except (UnsuitableSystemError, NoInterpreterError) as error:
        pytest.skip(f"not run: {error}")


def make_shape(environment: Environment, place: Path, role: str, *, processes: int = 1) -> Shape:
    """Return a shape that the task starts as the other user."""
    sudo = (find_admin_tool("sudo"), "-n", "-u", OTHER)
    actor = (str(environment.python), "-I", "-S", str(place / "tests" / "harness" / "actor.py"), role)
    return Shape(f"sudo-{role}", "a process of another user", (*sudo, *actor), processes)


def run_as(
    user: str,
    environment: Environment,
    place: Path,
    shape: Shape,
    ending: Ending,
    *,
    orphaned: bool = False,
    patient: bool = True,
) -> Outcome:
    """Do what `run_supervised` does, with the supervisor as a user; `orphaned`: when nobody but the announced is left."""
    launch = partial(launch_as, environment, place, user=user)
    with start_supervisor(launch, Plan(shape, ending, patient=patient)) as supervisor:
        if orphaned:
            staying = {supervisor.process.pid, *supervisor.announced}
            ancestors = [process for process in find_marked(supervisor.cookie) if process.pid not in staying]
            assert wait_for_exit(ancestors, PATIENCE)
        return observe(supervisor, end_task(supervisor), RETURN_TIMEOUT)


def kill_supervisor_as(
    user: str, environment: Environment, place: Path, shape: Shape, *, until: str | None = None
) -> list[str | None]:
    """Kill a user's supervisor, wait until nothing is left but what belongs to `until`, and return whose is left."""
    with start_supervisor(
        partial(launch_as, environment, place, user=user), Plan(shape, "409")
    ) as supervisor:
        supervisor.process.kill()
        deadline = time.monotonic() + PATIENCE
        # What ends them comes later, and goes last.
        while ending := [
            process for process in find_marked(supervisor.cookie) if find_owner(process) != until
        ]:
            if not wait_for_exit(ending, deadline - time.monotonic()):
                break
        return [find_owner(process) for process in find_marked(supervisor.cookie)]


def find_owner(process: Process) -> str | None:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process.pid}").owner()
    return None


def launch_as(
    environment: Environment, place: Path, cookie: str, folder: Path, order: int, *, user: str
) -> subprocess.Popen[bytes]:
    account = pwd.getpwnam(user)
    variables = {
        **clean_env(folder, python=environment.python),
        "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": str(GRACE),
        "AIRFLOW__WORKERS__SOCKET_CLEANUP_TIMEOUT": str(SOCKET_CLEANUP_TIMEOUT),
        "PYTHONPATH": make_module_path(place),
    }
    for path in (folder, *folder.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid)
    folder.chmod(0o755)
    (folder / "ready").chmod(0o666)
    identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return launch_scenario(environment, cookie, folder, order, env=variables, **identity)


@pytest.mark.parametrize(
    ("role", "ending"),
    [("sleeper", "409"), ("deaf", "409"), ("deaf", "sigterm"), ("deaf", "runner-killed"), ("deaf", "exit-1")],
)
def test_permitted_by_sudoers(environment: Environment, place: Path, role: str, ending: Ending) -> None:
    """An unprivileged supervisor ends what its task has started through sudo, if the sudoers let it."""
    with permit("ALL"):
        outcome = run_as(WORKER, environment, place, make_shape(environment, place, role), ending)
    assert outcome.traceback is None
    assert outcome.left_at_return == []
    assert outcome.seconds < GRACE + MARGIN


def test_root_needs_no_sudo(environment: Environment, place: Path) -> None:
    """A supervisor that runs as root signals everybody itself."""
    outcome = run_as("root", environment, place, make_shape(environment, place, "deaf"), "409")
    assert outcome.traceback is None
    assert outcome.left_at_return == []


@pytest.mark.parametrize("ending", ["409", "runner-killed"])
def test_forbidden_by_sudoers(environment: Environment, place: Path, ending: Ending) -> None:
    """What it may not end is named in one error of the task's log, with what sudo said, and it returns in time."""
    with permit(str(environment.python)):
        shape = make_shape(environment, place, "deaf")
        outcome = run_as(WORKER, environment, place, shape, ending, patient=False)
    assert outcome.traceback is None
    assert outcome.seconds < GRACE + MARGIN
    left = {process.pid for process in outcome.left}
    [error] = [event for event in outcome.log if event["event"] == NOT_ENDED_EVENT]
    assert error["log_level"] == "error"
    assert {process["pid"] for process in error["processes"]} == left != set()
    assert "sudoers must permit `sudo -n kill`" in error["reason"]


def test_supervisor_dies(environment: Environment, place: Path) -> None:
    """What runs as another user ends with the supervisor, too, if the sudoers permit it."""
    with permit("ALL"):
        assert kill_supervisor_as(WORKER, environment, place, make_shape(environment, place, "deaf")) == []


def test_supervisor_dies_and_sudoers_forbid(environment: Environment, place: Path) -> None:
    """The README's limit: what runs as another user, and may not be signalled, outlives the supervisor."""
    with permit(str(environment.python)):
        shape = make_shape(environment, place, "deaf")
        assert kill_supervisor_as(WORKER, environment, place, shape, until=OTHER) == [OTHER]


@pytest.mark.parametrize("ending", ["409", "runner-killed"])
def test_daemon_with_fresh_limits_is_not_found(environment: Environment, place: Path, ending: Ending) -> None:
    """The README's limit: what PAM gave fresh limits, and has left both session and parent, is nobody's any more."""
    with permit("ALL"):
        shape = make_shape(environment, place, "daemon")
        outcome = run_as(WORKER, environment, place, shape, ending, orphaned=True)
    assert outcome.returned
    assert len(outcome.left) == 1
