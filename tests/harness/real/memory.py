"""A memory cgroup, whose processes have little memory together; Python 3.9."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS = (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory.max"))
"""Where a cgroup has its limit, if it is directly below the first one: cgroups(7), version 1 and 2."""

FIRST_VICTIM = 1000
"""The highest oom_score_adj of proc_pid_oom_score_adj(5)."""


class NoMemoryCgroupError(Exception):
    """Nobody here may limit the memory of processes."""


@contextmanager
def make_cgroup(megabytes: int) -> Iterator[Path]:
    """Yield a cgroup of so much memory, which is empty in the end; raise NoMemoryCgroupError where none can be had."""
    name = f"task-sdk-teardown-{uuid.uuid4().hex}"
    for limit in LIMITS:
        folder = limit.parent / name
        try:
            folder.mkdir()
        except OSError:
            continue  # not mounted, or not for this user
        try:
            if (folder / limit.name).exists():
                (folder / limit.name).write_text(str(megabytes << 20))
                yield folder
                return
        finally:
            folder.rmdir()
    raise NoMemoryCgroupError("not run: no memory cgroup can be made here")


def enter(folder: Path) -> None:
    """Have this process, and what it starts from now on, count there."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def make_first_victim(pid: int) -> None:
    """Have the kernel kill this process first when memory is short."""
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(FIRST_VICTIM))
