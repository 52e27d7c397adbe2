"""Ways to end the tree of a task, a third of it in sessions of their own: its supervisor's, and others."""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.bench.trees import describe_tree, start_task
from tests.harness.supervised import run_supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.setup import Setup
    from tests.bench.trees import Tree
    from tests.harness.environments import Environment

    Way = Callable[[int], "tuple[float, int]"]

END_TIMEOUT = 10.0
"""Seconds after the last signal after which what is not ended counts as left."""
NOT_ENDED_TIMEOUT = 1.0
"""The same for killpg, which is known to leave some."""


def name_ways(setup: Setup) -> dict[str, Way]:
    """Return, by name, what ends a tree of a size and says how many seconds that took and how many are left."""
    ways: dict[str, Way] = {
        "psutil's recipe": lambda size: end_tree(setup.patched, size, end_with_psutil),
        "killpg": lambda size: end_tree(setup.patched, size, end_with_killpg, timeout=NOT_ENDED_TIMEOUT),
        "patched": lambda size: end_as_task(setup, size),
    }
    parent = find_cgroup()
    if parent is None:
        return ways
    return {"cgroup.kill": lambda size: end_cgroup(setup.patched, parent, size), **ways}


def end_tree(
    environment: Environment, size: int, end: Callable[[Tree], None], *, timeout: float = END_TIMEOUT
) -> tuple[float, int]:
    with start_task(environment, size) as tree:
        return time_end(tree, end, timeout)


def time_end(tree: Tree, end: Callable[[Tree], None], timeout: float = END_TIMEOUT) -> tuple[float, int]:
    """Measure to the last death, reaped or not."""
    began = time.monotonic()
    end(tree)
    last_death, left = tree.wait(timeout)
    return last_death - began, left


def end_with_psutil(tree: Tree) -> None:
    """End a tree as the psutil documentation recommends: all descendants and itself.

    Without the recipe's wait, which is for init to reap them, too.
    """
    root = psutil.Process(tree.root)
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


def end_with_killpg(tree: Tree) -> None:
    """End the group alone."""
    os.killpg(tree.root, signal.SIGTERM)


def end_cgroup(environment: Environment, parent: Path, size: int) -> tuple[float, int]:
    """Have the kernel end a tree in a cgroup."""
    with new_cgroup(parent) as group, start_task(environment, size) as tree:
        for pid in tree.pids:
            (group / "cgroup.procs").write_text(str(pid))
        return time_end(tree, lambda _tree: write_kill(group))


def write_kill(group: Path) -> None:
    (group / "cgroup.kill").write_text("1")


@contextmanager
def new_cgroup(parent: Path) -> Iterator[Path]:
    group = parent / f"bench-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def find_cgroup() -> Path | None:
    """Return the cgroup that this process is in, if it is of version 2, knows cgroup.kill and takes children."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    memberships = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in memberships if line.startswith("0::")), None)
    if own is None:
        return None
    groups = [Path(mount[1]) / own for mount in mounts if mount[2] == "cgroup2"]
    return next((group for group in groups if takes_children(group)), None)


def takes_children(group: Path) -> bool:
    try:
        with new_cgroup(group) as child:
            return (child / "cgroup.kill").exists()
    except OSError:
        return False


def end_as_task(setup: Setup, size: int) -> tuple[float, int]:
    """Have a supervisor end the tree as its task, from the 409 to the return of wait()."""
    outcome = run_supervised(setup.patched, describe_tree(size), env=setup.settings)
    return outcome.seconds, len(outcome.left)
