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
Signal the processes of other users: a task may run as another user than its supervisor (``run_as_user``).

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.teardown.processes import is_alive

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from airflow.sdk.execution_time.teardown.processes import Process


SUDO_TIMEOUT = 1.0
"""Seconds. ``sudo -n`` asks for no password, but may look up its rules over the network."""

SUDO_TIMED_OUT = "sudo did not answer in time"


def send_by_sudo(
    by_owner: Mapping[int, Sequence[Process]], sig: int, deadline: float = math.inf
) -> dict[int, str | None]:
    """
    Signal processes of other users, as that user or as root, whichever the sudoers permit; all users at once.

    :param by_owner: the processes by the uids of their owners.
    :param deadline: when to give up waiting, by time.monotonic().
    :returns: by uid, why sudo failed, None if it did not.
    """
    sudo = shutil.which("sudo")
    if sudo is None:
        return dict.fromkeys(by_owner, "there is no sudo")
    kills = {
        uid: ["kill", f"-{int(sig)}", *(str(process.pid) for process in owned)]
        for uid, owned in by_owner.items()
    }
    failures = run_all({uid: [sudo, "-n", "-u", f"#{uid}", *kill] for uid, kill in kills.items()}, deadline)
    refused = [uid for uid, failure in failures.items() if uid and failure not in (None, SUDO_TIMED_OUT)]
    failures.update(run_all({uid: [sudo, "-n", *kills[uid]] for uid in refused}, deadline))
    return {
        uid: failure if failure and not is_harmless(failure, by_owner[uid]) else None
        for uid, failure in failures.items()
    }


def is_harmless(failure: str, processes: Sequence[Process]) -> bool:
    """Whether sudo has run kill, which fails if one process has ended meanwhile, but signals the others."""
    ended = [not is_alive(process) for process in processes]
    return any(ended) if failure.startswith("kill: ") else all(ended)


def group_by_owner(processes: Iterable[Process]) -> dict[int, list[Process]]:
    """Return the processes that still run, by the uid that they run as."""
    groups: dict[int, list[Process]] = {}
    for process in filter(is_alive, processes):
        # psutil does not wrap the OSError for a lack of file descriptors.
        with contextlib.suppress(psutil.Error, OSError):
            groups.setdefault(psutil.Process(process.pid).uids().effective, []).append(process)
    return groups


def run_all(commands: Mapping[int, list[str]], deadline: float = math.inf) -> dict[int, str | None]:
    """
    Run one sudo for each user, at the same time; return why they failed, None where one did not.

    :param deadline: by time.monotonic(); each has SUDO_TIMEOUT at most.
    """
    deadline = min(deadline, time.monotonic() + SUDO_TIMEOUT)
    running = {uid: start_sudo(command) for uid, command in commands.items()}
    return {
        uid: started if isinstance(started, str) else wait_for_sudo(started, deadline)
        for uid, started in running.items()
    }


def start_sudo(command: list[str]) -> subprocess.Popen[str] | str:
    """Start sudo; return why it could not be started, if so."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return str(error)


def wait_for_sudo(process: subprocess.Popen[str], deadline: float) -> str | None:
    """Wait until sudo has ended; return why it failed, None if it did not."""
    try:
        _, complaint = process.communicate(timeout=max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        # subprocess.run() would wait for ever here: sudo has become root, so that we may not be allowed to
        # kill it.
        with contextlib.suppress(PermissionError):
            process.kill()
            process.wait()
        return SUDO_TIMED_OUT
    return (complaint.strip() or f"sudo ended with {process.returncode}") if process.returncode else None
