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
Faults for a supervisor that ends a task: what a kernel, or other code in its process, may do to it.

The supervisor runs in a process of its own, in a process group that it shares with a bystander.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import itertools
import os
import pkgutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    Api,
    Log,
    Relay,
    be_deaf,
    detach,
    fork,
    forked,
    hear_ready,
    list_living,
    order_end,
    pause_for_ever,
    start_task,
    wait_to_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from airflow.sdk.execution_time.supervisor import ActivitySubprocess

NOISE = 10
"""Seconds that a busy machine may take longer."""

WAYS = ["conflict", "killed", "failed"]

PR_SET_DUMPABLE = 4
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """What came of a supervisor."""

    code: int
    log: list[dict[str, Any]]
    left: list[int]
    seconds: float = 0
    """From the order to end until wait() returned."""
    daemon: int = 0
    """The PID of what the task had started."""
    number: int = 0
    """That somebody else has got since."""

    def find(self, level: str, text: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["log_level"] == level and text in entry["event"]]

    def name_survivors(self) -> list[int]:
        """Return the PIDs of what the task's log says could not be ended."""
        errors = self.find("error", "could not be ended")
        return [process["pid"] for error in errors for process in error["processes"]]


class RefusedError(Exception):
    """The kernel does not allow what a test needs."""


def supervise(main: Callable[[], dict[str, Any]], setting: Callable[[], Any] = lambda: None) -> Outcome:
    """
    Run ``main``, which supervises a task, in a process of its own, whose group it shares with a bystander.

    :param main: returns the fields of :class:`Outcome` other than ``left``.
    :param setting: called before anything else.
    """
    told = Relay()

    def supervise_beside_bystander() -> dict[str, Any]:
        os.setpgid(0, 0)
        setting()
        bystander = fork(pause_for_ever)
        return {**main(), "bystander": bystander}

    with contextlib.closing(told), forked(lambda: report(told, supervise_beside_bystander)) as pid:
        outcome = hear_report(told)
        left = [other for other in list_living() if other != pid]
        bystander = outcome.pop("bystander")
        assert bystander in left, "the bystander was ended"
        assert psutil.Process(bystander).status() != psutil.STATUS_STOPPED, "the bystander was stopped"
        left.remove(bystander)
    return Outcome(left=left, **outcome)


def supervise_in_namespace(main: Callable[[], dict[str, Any]]) -> Outcome:
    """
    Run ``main``, which supervises a task, in a PID namespace.

    :param main: returns the fields of :class:`Outcome`, with the numbers of the namespace.
    """
    return Outcome(**run_in_namespace(main))


def run_in_namespace(main: Callable[[], dict[str, Any]], *, own_proc: bool = True) -> dict[str, Any]:
    """Run ``main`` as the first process of a PID namespace (pid_namespaces(7)), and return what it does."""
    told = Relay()

    def be_first() -> None:
        report(told, run_main)

    def run_main() -> dict[str, Any]:
        if own_proc:
            mount_proc()
        return main()

    def enter() -> dict[str, Any]:
        unshare(CLONE_NEWPID)
        fork(be_first)
        pause_for_ever()

    with contextlib.closing(told), forked(lambda: report(told, enter)):
        return hear_report(told)


def run_in_fork(main: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``main`` in a process of its own, and return what it does."""
    told = Relay()
    with contextlib.closing(told), forked(lambda: report(told, main)):
        return hear_report(told)


def report(told: Relay, main: Callable[[], dict[str, Any]]) -> None:
    """Tell what ``main`` returns, or why it does not, and stay."""
    outcome: dict[str, Any] = {"refused": None, "error": None}
    try:
        outcome.update(main())
    except RefusedError as refused:
        outcome["refused"] = str(refused)
    except BaseException:  # noqa: BLE001 - it is the result
        outcome["error"] = traceback.format_exc()
    told.tell(outcome)
    pause_for_ever()


def hear_report(told: Relay) -> dict[str, Any]:
    outcome: dict[str, Any] = told.hear()
    if reason := outcome.pop("refused"):
        pytest.skip(reason)
    error = outcome.pop("error")
    assert error is None, error
    return outcome


def end_supervised(
    relay: Relay,
    way: str,
    daemon: Callable[[Relay], Any] = be_deaf,
    *,
    setting: Callable[[], Any] = lambda: None,
    before: Callable[[], Any] = lambda: None,
    runner: Callable[[], Any] = lambda: None,
    after: Callable[[ActivitySubprocess, int], Any] = lambda _process, _daemon: None,
    api: Api | None = None,
) -> Outcome:
    """
    Supervise a task that has started a daemon, and end it.

    :param setting: called in the supervisor before anything else, ``before`` just before it starts the task.
    :param runner: called in the task's own process when it has started the daemon.
    :param after: called in the supervisor when the task has been told to end, with the task and its daemon's PID.
    """

    def target() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        detach(lambda: daemon(relay))
        runner()
        wait_to_end(relay)

    def main() -> dict[str, Any]:
        before()
        log, client = Log(), api or Api()
        process = start_task(target, client, logger=log.logger)
        [pid] = hear_ready(relay)
        began = time.monotonic()
        order_end(way, process, client)
        after(process, pid)
        code = process.wait()
        return {"code": code, "seconds": time.monotonic() - began, "log": log.entries, "daemon": pid}

    return supervise(main, setting)


def misbehave(
    call: str,
    error: int,
    *,
    times: Collection[int] | None = None,
    spares_children: bool = True,
    concerns: Callable[..., bool] = lambda *_args: True,
) -> None:
    """
    Have a call fail from now on, in this process.

    :param call: such as "os.kill" or "socket.socket.shutdown".
    :param times: which calls fail, counted from 1; None for all of them.
    :param spares_children: False if it fails in what this process forks, too.
    :param concerns: tells by its arguments whether a call counts.
    """
    owner, name = find_owner(call)
    original = getattr(owner, name)
    pid, count = os.getpid(), itertools.count(1)

    def answer(*args: Any, **kwargs: Any) -> Any:
        if (
            (os.getpid() == pid or not spares_children)
            and concerns(*args)
            and (times is None or next(count) in times)
        ):
            raise OSError(error, os.strerror(error))
        return original(*args, **kwargs)

    setattr(owner, name, mock.create_autospec(original, side_effect=answer))


def refuse_sigterm(error: int) -> None:
    for call in ("os.kill", "os.killpg", "signal.pidfd_send_signal"):
        misbehave(call, error, concerns=lambda _who, sig, *_: sig == signal.SIGTERM)


def lack(call: str) -> None:
    """Be a Python that does not have a call."""
    delattr(*find_owner(call))


def find_owner(call: str) -> tuple[Any, str]:
    """Return the module or class that has a call, and the name that it has there."""
    owner, _, name = call.rpartition(".")
    return pkgutil.resolve_name(owner), name


def forbid_pidfd(how: str) -> None:
    """Be on a kernel, or in a sandbox, that fails with an error, or a Python that knows of no pidfd: "absent"."""
    # psutil has one of its own, and remembers whether it works.
    if can_use_pidfd := getattr(psutil._psposix, "can_use_pidfd_open", None):
        can_use_pidfd.cache_clear()
    if how == "absent":
        lack("os.pidfd_open")
        lack("signal.pidfd_send_signal")
    else:
        misbehave("os.pidfd_open", getattr(errno, how))


def be_deaf_runner() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_sudo(folder: Path, script: str) -> None:
    """Write a sudo of our own into a folder, which is for the caller to put on the PATH."""
    sudo = folder / "sudo"
    sudo.write_text(f"#!/bin/sh\n{script}\n")
    sudo.chmod(0o755)


def unshare(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(namespace):
        raise RefusedError(f"no namespace: {os.strerror(ctypes.get_errno())}")


def mount_proc(options: bytes = b"") -> None:
    """Give this process, and what it starts, a /proc of its own (mount_namespaces(7))."""
    unshare(CLONE_NEWNS)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) or libc.mount(
        b"proc", b"/proc", b"proc", 0, options
    ):
        raise RefusedError(f"no /proc of its own: {os.strerror(ctypes.get_errno())}")


def become_nobody() -> None:
    """Give up all privileges, if there are any; whoever does is not dumpable any more (prctl(2))."""
    if os.geteuid() == 0:
        import_what_tasks_import()
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def import_what_tasks_import() -> None:
    """Have all of it in this process, for nobody may be forbidden to read it."""

    def tell_imported() -> None:
        told.tell(sorted(set(sys.modules) - known))
        os._exit(1)

    known = set(sys.modules)
    with contextlib.closing(Relay()) as told:
        process = start_task(tell_imported)
        for name in told.hear():
            # Not everything there can be imported by its name.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        process.wait()


def fork_as(pid: int, then: Callable[[], Any] = pause_for_ever) -> int:
    """
    Start a process that has a number of our choice, and leads a session, in a namespace of ours.

    :param then: what it does before it ends. SIGTERM ends it, whatever this process does at one.
    """

    def be_stranger() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        leads.tell(os.getpid())
        then()

    leads = Relay()
    choose_next_pid(pid)
    stranger = fork(be_stranger)
    with contextlib.closing(leads):
        assert leads.hear() == stranger == pid
    return stranger


def choose_next_pid(pid: int) -> None:
    """Have the next process of this PID namespace, which is ours, get a number (proc_sys_kernel(5))."""
    try:
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(pid - 1))
    except OSError as error:  # a container's /proc/sys may be read-only
        raise RefusedError(f"no process number of our choice: {error}") from error
