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
End a task whose supervisor has died. This is a separate program, which the task's runner executes.

Its argument is a JSON object: ``limits``, the marks of the runner; ``leader``, its PID and start; ``origin``;
``grace``, in seconds; ``ends`` and ``spared``, the choices of the deployment; ``path``, the folder of psutil.

A forked copy of the runner would be as big as the runner, and would be killed with it when memory runs out.
This program loads neither site-packages nor Airflow (``python -I -S``), and needs a twentieth of the runner's memory.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk.execution_time.teardown.process_tree import ProcessTree

PACKAGE = "airflow.sdk.execution_time.teardown"

IGNORED: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
"""A service manager may signal all processes of a service at once. The watchdog must first end the task."""


def main(argument: str) -> None:
    """End the task that the argument describes."""
    leave_task()
    order = json.loads(argument)
    sys.path.append(order["path"])
    stand_in_for_package()
    end_task(order)


def leave_task() -> None:
    """Make this process survive the end of the task: ignore signals, and lead a session of its own."""
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    # The runner has blocked these signals until here.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(OSError):
        os.setsid()


def end_task(order: dict[str, Any]) -> None:
    """End the described task; to be called in a process of its own, which has inherited the task's marks."""
    load("marks").lift_marks()
    load("orphans").end_orphans([make_tree(order)], order["grace"])


def load(name: str) -> types.ModuleType:
    """Return a module of the package."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def stand_in_for_package() -> None:
    """Make the modules beside this one importable by name, without loading the packages that contain them."""
    names = PACKAGE.split(".")
    for depth in range(1, len(names) + 1):
        package = types.ModuleType(".".join(names[:depth]))
        package.__path__ = [str(Path(__file__).parents[len(names) - depth])]
        sys.modules[package.__name__] = package


def make_tree(order: dict[str, Any]) -> ProcessTree:
    """Return the tree of the task."""
    pid, start = order["leader"]
    if os.getppid() == pid and (runner := load("processes").look_at(pid)):
        start = runner.start
    tree: ProcessTree = load("process_tree").ProcessTree()
    tree.spared = frozenset(order["spared"])
    tree.ends_leftovers = order["ends"]
    tree.set_orphaned_leader(pid, start, order["limits"], order["origin"])
    return tree


if __name__ == "__main__":
    main(sys.argv[1])
