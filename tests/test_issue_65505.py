"""apache/airflow issue 65505: a task set to failed leaves its virtualenv's processes, and its supervisor crashes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patches.releases import find_release
from tests.harness.environments import create_environment
from tests.harness.lines import mark_other_versions
from tests.harness.shapes import BY_NAME
from tests.harness.supervised import run_supervised
from tests.harness.wheels import build_patched_wheel

if TYPE_CHECKING:
    from patches.releases import Release
    from tests.harness.supervised import Outcome

VIRTUALENV = BY_NAME["virtualenv"]
# Whatever the patched supervisor could wait for in vain takes this long.
LONG = {"AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": "30", "AIRFLOW__WORKERS__SOCKET_CLEANUP_TIMEOUT": "30"}
AT_ONCE = 15
"""Seconds on a busy machine; elsewhere it is a tenth of one."""
TIMEOUT = 60


@pytest.fixture(scope="module", params=mark_other_versions(["1.0.6", "1.1.8"]))
def release(request: pytest.FixtureRequest) -> Release:
    return find_release(request.param)


@pytest.fixture(scope="module")
def stock(release: Release) -> Outcome:
    return run_supervised(create_environment(release), VIRTUALENV, "409")


@pytest.fixture(scope="module")
def patched(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    wheel = build_patched_wheel(release, tmp_path_factory.mktemp("dist"))
    return run_supervised(
        create_environment(release, wheel=wheel), VIRTUALENV, "409", timeout=TIMEOUT, env=LONG
    )


def test_stock_supervisor_crashes(stock: Outcome) -> None:
    """The stock supervisor selects on the selector that it has closed, and dies of it."""
    assert stock.exception == "ValueError: I/O operation on closed epoll object"


def test_stock_supervisor_leaves_the_processes_of_the_task(stock: Outcome) -> None:
    """The stock supervisor says that the task was killed, and both the child and the grandchild live on."""
    assert "Task killed!" in [event["event"] for event in stock.log]
    assert len(stock.left) == VIRTUALENV.processes


def test_harness_ends_what_stock_leaves(stock: Outcome) -> None:
    """No process outlives a supervised run, whatever the supervisor did."""
    assert stock.left
    assert [process for process in stock.left if Path(f"/proc/{process.pid}/exe").exists()] == []


def test_patched_supervisor_returns_at_once(patched: Outcome) -> None:
    """The patched supervisor ends its work without waiting for anything to time out."""
    assert patched.exception is None
    assert patched.seconds < AT_ONCE
    assert patched.final_state is not None
    assert patched.final_state.lower() == "server_terminated"


def test_patched_supervisor_leaves_nothing(patched: Outcome) -> None:
    """The child and the grandchild end with the task."""
    assert patched.left == []
