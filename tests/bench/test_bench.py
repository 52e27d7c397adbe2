"""The bench measures, reports and leaves nothing; how fast things are is no test."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from patches.releases import find_release
from tests.bench import __main__ as bench
from tests.bench.figures import FIGURES
from tests.bench.load import busy_cores
from tests.bench.series import Series
from tests.bench.trees import start_processes
from tests.bench.ways import end_tree, end_with_killpg
from tests.bench.workers import WorkerFailedError, start_worker
from tests.harness.environments import Environment, create_environment
from tests.harness.processes import DEAD, find_lack_of_processes, read_state, set_subreaper
from tests.harness.wheels import build_patched_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LACK = find_lack_of_processes()

POLITE_TIMEOUT = 5.0
"""Seconds in which what SIGTERM ends has ended, also on a busy machine."""


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """Adopt what a test orphans; end it, and fail."""
    set_subreaper(wanted=True)
    yield
    left = list_living()
    while living := list_living():
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(living, timeout=1)
    set_subreaper(wanted=False)
    collect_zombies()
    assert left == []


def list_living() -> list[psutil.Process]:
    """Return the descendants of this process that have not ended."""
    return [child for child in psutil.Process().children(recursive=True) if read_state(child.pid) not in DEAD]


def collect_zombies() -> None:
    for child in psutil.Process().children():
        with suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)


@pytest.mark.everything
@pytest.mark.skipif(LACK is not None, reason=f"not run: {LACK}")
def test_quick_run_measures_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A quick run has positive samples in every figure, prints and draws them."""
    monkeypatch.setattr(bench, "DIST", tmp_path)

    assert bench.main(["--quick", "3.1.8"]) == 0

    printed = capfd.readouterr().out
    for name in FIGURES:
        (file,) = tmp_path.glob(f"*/{name}.json")
        measured = [Series.from_json(entry) for entry in json.loads(file.read_text())["series"]]
        assert {series.figure in printed for series in measured} == {True}
        assert {min(series.samples) > 0 for series in measured} == {True}
    for name in ("scale", "timeline"):
        (file,) = tmp_path.glob(f"*/{name}.svg")
        assert "patched" in file.read_text()


def test_percentiles() -> None:
    """The median, 99th percentile and maximum are those of the samples, however few there are."""
    series = Series("figure", "case", "contender", [float(number) for number in range(101)])
    single = Series("figure", "case", "contender", [7.0])
    assert (series.median, series.p99, series.maximum) == (50, 99, 100)
    assert (single.median, single.p99, single.maximum) == (7, 7, 7)


def test_cores_are_left_idle() -> None:
    """The load consists of one process for each core, and ends with its context."""
    with busy_cores():
        assert len(psutil.Process().children()) == psutil.cpu_count()
    assert psutil.Process().children() == []


def test_trees_are_counted_and_ended(tmp_path: Path) -> None:
    """What leaves every third process of a tree is told so."""
    release = find_release("3.1.8")
    environment = create_environment(release, wheel=build_patched_wheel(release, tmp_path))
    # The task's process and the root of its tree are in no session of their own; of their 12 children 4 are.
    assert end_tree(environment, 14, end_with_killpg, timeout=POLITE_TIMEOUT)[1] == 4
    with start_processes(10):
        assert len(list_living()) == 10


def test_failed_worker_says_why(tmp_path: Path) -> None:
    """A worker without an SDK ends the bench with the worker's own output."""
    bare = Environment(find_release("3.1.8"), tmp_path, tmp_path / "python")
    bare.python.symlink_to(sys.executable)
    with start_worker(bare, {}) as worker, pytest.raises(WorkerFailedError, match="ModuleNotFoundError"):
        worker.run(1)
