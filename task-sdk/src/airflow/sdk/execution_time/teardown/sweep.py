# Licensed to the Apache Software Foundation (ASF) under one
# or more contributor license agreements.  See the NOTICE file
# distributed with this work for additional information
# regarding copyright ownership.  The ASF licenses this file
# to you under the Apache License, Version 2.0 (the
# "License"); you may not use this file except in compliance
# with the License.  You may obtain a copy of the License at
#
#   http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing,
# software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied.  See the License for the
# specific language governing permissions and limitations
# under the License.
"""
End the tasks whose supervisors have died, and whose runners could not notice it (see ``lifeline``).

A supervisor does this before the first task that its process starts. So does the command
``python -m airflow.sdk.execution_time.teardown.sweep``, for example in ``ExecStartPre=`` of systemd, or in cron.
``--dry-run`` only lists the tasks. The exit status is 0; 1 if a task could not be ended, or ``/proc`` not be
read; 2 when an argument is wrong.

The sweep looks for trees of tasks whose runner is there and whose supervisor is not. It leaves alone the
tasks of other users and of other PID namespaces, and the leftovers of a task that has succeeded.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from typing import TYPE_CHECKING

import structlog

from airflow.sdk.execution_time.teardown.leftovers import configure_tree
from airflow.sdk.execution_time.teardown.marks import read_limits
from airflow.sdk.execution_time.teardown.orphans import end_orphans, find_orphans, kill_condemned
from airflow.sdk.execution_time.teardown.policy import find_spared_names
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.processes import look_at, shorten_name

try:
    from airflow.sdk.configuration import conf as airflow_conf
except ImportError:  # before 1.2
    from airflow.configuration import conf as airflow_conf

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from configparser import ConfigParser

    from airflow.sdk.execution_time.teardown.orphans import Orphan
    from airflow.sdk.execution_time.teardown.processes import Process


log = structlog.get_logger(logger_name="supervisor")

MAX_SWEEPS = 3
"""At most this many sweeps in a row, because some orphans are not ours to end."""

_swept_by: int | None = None
"""The PID of the process that has looked for orphans. A forked copy of it looks again."""

_sweeping = threading.Lock()
"""Held while orphans are ended: the task of another thread may be the retry of an orphan."""


def sweep_once(conf: ConfigParser) -> None:
    """
    End orphans, unless this process has done so before; never raises.

    :param conf: Airflow's configuration.
    """
    global _swept_by
    with _sweeping:
        if _swept_by == os.getpid():
            return
        try:
            sweep_repeatedly(conf)
            _swept_by = os.getpid()
        except Exception:
            # Go on: the task that is about to start is not at fault.
            log.exception("Failed to look for tasks whose supervisors have died")


def sweep_repeatedly(conf: ConfigParser) -> list[Process]:
    """
    End orphans until none is found; return the processes that are still there.

    A task that supervises tasks may have been about to kill what these have started, and is ended itself first. The
    processes that it has stopped are orphans only then.
    """
    survivors: list[Process] = []
    for _ in range(MAX_SWEEPS):
        orphans = find_orphans()
        if not orphans:
            break
        survivors = sweep(conf, orphans)
        if survivors:
            break
    return survivors


def renew_lock() -> None:
    """Give a forked child a free lock: the thread that held it exists only in the parent."""
    global _sweeping
    _sweeping = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_lock)


def sweep(conf: ConfigParser, orphans: Sequence[Orphan]) -> list[Process]:
    """End orphans, and log it; return the processes that are still there."""
    orphans = [orphan for orphan in orphans if not is_around(orphan)]
    runners = [orphan for orphan in orphans if not orphan.condemned]
    spared = {shorten_name(name) for name in find_spared_names(conf)}
    condemned = pick_oldest(
        orphan for orphan in orphans if orphan.condemned and shorten_name(orphan.process.name) not in spared
    )
    survivors: list[Process] = []
    for group, end in ((condemned, kill_condemned), (runners, end_orphans)):
        if group:
            trees = [make_tree(orphan, conf) for orphan in group]
            left = end(trees)
            report(group, trees, left)
            survivors += left
    return survivors


def is_around(orphan: Orphan) -> bool:
    """Whether this process is in the orphan's tree itself, like the supervisor of a task within a task."""
    pid = orphan.process.pid
    return (
        os.getsid(0) == pid
        or not orphan.given_marks.isdisjoint(read_limits(os.getpid()))
        or pid in list_ancestors()
    )


def list_ancestors() -> list[int]:
    """Return the PIDs of this process's parent, its parent, and so on, as far as we may see them."""
    ancestors = [os.getppid()]
    while (process := look_at(ancestors[-1])) and process.parent not in (0, *ancestors):
        ancestors.append(process.parent)
    return ancestors


def pick_oldest(orphans: Iterable[Orphan]) -> list[Orphan]:
    """
    Return the oldest orphan of each tree, which finds all others, because no member is older than it.

    A process that has set the limit of its mark for itself shows its origin instead, and finds only its like. So of each
    tree there may be two.
    """
    by_age = sorted(orphans, key=lambda orphan: (orphan.process.start, orphan.process.pid), reverse=True)
    return list({(orphan.origin, *orphan.marks[:1]): orphan for orphan in by_age}.values())


def make_tree(orphan: Orphan, conf: ConfigParser) -> ProcessTree:
    """Return the tree that an orphan leads, or is part of."""
    tree = ProcessTree()
    tree.set_orphaned_leader(orphan.process.pid, orphan.process.start, orphan.marks, orphan.origin)
    configure_tree(tree, conf)
    tree.ends_leftovers = orphan.condemned or tree.ends_leftovers
    return tree


def report(orphans: Sequence[Orphan], trees: Sequence[ProcessTree], survivors: Sequence[Process]) -> None:
    """Say in the supervisor's log what was ended."""
    log.warning(
        "Ended tasks whose supervisors had died",
        runners=[{"pid": orphan.process.pid, "name": orphan.process.name} for orphan in orphans],
        processes=sum(len(tree.end_signals) for tree in trees),
        survivors=[{"pid": process.pid, "name": process.name} for process in survivors],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """End orphans, or list them; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m airflow.sdk.execution_time.teardown.sweep",
        description="End the tasks of this user whose supervisors have died.",
    )
    parser.add_argument("--dry-run", action="store_true", help="list them, and end none")
    options = parser.parse_args(arguments)
    try:
        orphans = find_orphans()
        for orphan in orphans:
            print(describe(orphan))
        survivors = [] if options.dry_run or not orphans else sweep_repeatedly(airflow_conf)
    except OSError as error:
        parser.exit(
            1, f"Tasks without a supervisor could not be looked for: {error.strerror}. Run it again.\n"
        )
    return 1 if survivors else 0


def describe(orphan: Orphan) -> str:
    """Return a line of text about an orphan."""
    kind = "process that was about to be killed" if orphan.condemned else "task runner"
    return f"{kind} without a supervisor: PID {orphan.process.pid} ({orphan.process.name})"


if __name__ == "__main__":
    sys.exit(main())
