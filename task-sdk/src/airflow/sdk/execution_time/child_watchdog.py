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
End a task whose supervisor has died; a program of its own, which the task's runner executes.

It reads what it has to know from its argument, a JSON object: ``limits``, the marks of the runner; ``leader``, its PID
and start; ``origin``; ``grace``, in seconds; ``ends`` and ``spared``, what the deployment has chosen; ``path``, where
psutil is.

A copy of the runner would be as big as the runner, and be killed with it for want of memory. This is executed with
neither site-packages nor Airflow (``python -I -S``), and takes a twentieth of that.
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
from typing import Any

PACKAGE = "airflow.sdk.execution_time"

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Whoever ends all processes of a service at once would end this before it has ended the task."""


def main(argument: str) -> None:
    """End the task that the argument describes."""
    leave_task()
    order = json.loads(argument)
    sys.path.append(order["path"])
    stand_in_for_package()
    end_task(order)


def leave_task() -> None:
    """Take no part in a task's end."""
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    # Whoever has started this has blocked them until here.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(OSError):
        os.setsid()


def end_task(order: dict[str, Any]) -> None:
    """End the task that is described; to be called by a process of its own, which has inherited the task's marks."""
    tree = importlib.import_module(f"{PACKAGE}.child_tree")
    orphan = importlib.import_module(f"{PACKAGE}.child_orphan")
    tree.lift_marks()
    orphan.end_orphans([make_tree(tree, order)], order["grace"])


def stand_in_for_package() -> None:
    """Have the modules beside this one imported by their names, without those of the packages that they are in."""
    names = PACKAGE.split(".")
    for depth in range(1, len(names) + 1):
        package = types.ModuleType(".".join(names[:depth]))
        package.__path__ = [str(Path(__file__).parents[len(names) - depth])]
        sys.modules[package.__name__] = package


def make_tree(module: Any, order: dict[str, Any]) -> Any:
    """Return the tree of the task."""
    pid, start = order["leader"]
    if os.getppid() == pid and (runner := module.look_at(pid)):
        start = runner.start
    tree = module.ProcessTree()
    tree.spared = frozenset(order["spared"])
    tree.ends = order["ends"]
    tree.adopt_orphan(pid, start, order["limits"], order["origin"])
    return tree


if __name__ == "__main__":
    main(sys.argv[1])
