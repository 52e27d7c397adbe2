"""Pools of multiprocessing, which a task starts; apart from scenario.py, for spawned workers import what they are to do.

Python 3.9, with the standard library alone.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from multiprocessing.pool import Pool

WORKERS = 8

# A pool that is forgotten ends its workers.
_pools: list[Pool] = []


def start_pool(method: str, ready: str) -> None:
    """Start a pool by "fork", "spawn" or "forkserver" whose workers announce themselves in the FIFO `ready`, and stay busy."""
    # Spawned processes would otherwise import the main module, and the SDK with it.
    vars(sys.modules["__main__"]).update(__file__=None, __spec__=None)
    # Or a runner that exits by itself would end its workers; one that is killed has no time to.
    atexit.unregister(multiprocessing.util._exit_function)  # type: ignore[attr-defined]
    pool = multiprocessing.get_context(method).Pool(WORKERS)
    _pools.append(pool)
    pool.map_async(be_busy, [ready] * WORKERS, chunksize=1)


def be_busy(ready: str) -> NoReturn:
    with Path(ready).open("a") as announcements:
        announcements.write(f"{os.getpid()}\n")
    while True:
        signal.pause()
