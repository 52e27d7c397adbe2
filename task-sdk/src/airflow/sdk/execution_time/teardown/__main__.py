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
Say by which means the supervisor of this environment ends tasks, and prove that no process of a task is left.

``python -m airflow.sdk.execution_time.teardown`` starts a task of a few stubborn processes under the real
supervisor, with a stand-in for the API client. It kills the task, and looks for processes that are left. Then
it kills the supervisor of another task, and looks again. It needs no database and no API server, runs as any
user, and takes half a second besides the import of Airflow.

With ``--orphans`` it does what ``sweep`` does instead: it ends the tasks whose supervisors have died.

The exit status is 0, or 1 if something is wrong, or 2 if an argument is wrong, or 130 if interrupted. An SDK
without this module answers "No module named". The check warns of means that are poorer than they could be;
with ``--strict`` it fails then.

Each process holds one end of a socket pair, and the check the other. An end of file tells the check that the
process is gone, whatever ``/proc`` says. It also tells the process that the check is gone, so that no process
outlives a check that is killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pwd
import select
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from types import CodeType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, NoReturn
from uuid import uuid4

import psutil
import structlog

from airflow.sdk.api.datamodels._generated import TaskInstance, TIRunContext
from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess, WatchedSubprocess
from airflow.sdk.execution_time.teardown import (
    leftovers,
    lifeline,
    marks,
    process_tree,
    processes,
    sweep,
)
from airflow.sdk.execution_time.teardown.orphans import find_orphans
from airflow.sdk.execution_time.teardown.policy import (
    LeftoverPolicy,
    find_grace,
    find_leftover_policy,
    find_spared_names,
    find_stop_policy,
    is_grace_set,
)
from airflow.sdk.execution_time.teardown.session import lead_session
from airflow.sdk.execution_time.teardown.sudo import run_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

DISTRIBUTION = "apache-airflow-task-sdk"

PROOF_GRACE = 0.3
"""Seconds between SIGTERM and SIGKILL in the proof, whatever the deployment has set."""

START_TIMEOUT = 10.0
"""Seconds that the processes of the proof have to start."""

END_TIMEOUT = 2.0
"""Seconds that processes have to disappear once the proof itself has killed them."""

INTERRUPTED = 130

TEARDOWN_SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGSTOP, signal.SIGKILL)

NOBODY = (1 << 22) + 1
"""A PID beyond all (proc_sys_kernel(5))."""

CALLS = (
    (WatchedSubprocess, "start", "begin_runner"),
    (WatchedSubprocess, "start", "mark_process"),
    (WatchedSubprocess, "start", "follow_supervisor"),
    (ActivitySubprocess, "_on_child_started", "set_leader"),
    (ActivitySubprocess, "_on_child_started", "sweep_once"),
    (WatchedSubprocess, "_service_subprocess", "_exit_watch"),
    (WatchedSubprocess, "_check_subprocess_exit", "settle_exit_code"),
    (WatchedSubprocess, "_check_subprocess_exit", "note_exit"),
    (WatchedSubprocess, "_check_subprocess_exit", "end_leftovers"),
    (WatchedSubprocess, "kill", "prepare_kill"),
    (WatchedSubprocess, "kill", "signal_tree"),
    (ActivitySubprocess, "_monitor_subprocess", "heed_stop_signals"),
)
"""Methods of the supervisor, and a name that each of them uses in every patched release."""


class CheckFailedError(Exception):
    """The proof could not be carried out; the message is a clause that says why."""


@dataclass(frozen=True)
class Means:
    """The means that this environment offers."""

    session: bool
    """The task leads a session and a process group of its own."""
    exit: str
    """How the supervisor notices an exit: "pidfd" or "polling"."""
    mark: str
    """What marks a task's processes: "limit" (RLIMIT_RTTIME) or "variable"; "none" if the task was not found."""
    processes: str
    """Where the supervisor looks for processes: "/proc" or "psutil"; "hidden" if /proc hides our own (hidepid)."""


@dataclass(frozen=True)
class Users:
    """The means that this environment offers against processes of another user."""

    hidden: bool
    """Processes of other users cannot be seen, as where /proc is mounted with hidepid (proc(5))."""
    sudo: str | None
    """The path of sudo."""
    run_as_user: str | None
    """The user in question: of the option, or of ``[core] default_impersonation``."""
    refusal: str | None
    """Why sudo may not end processes of that user."""


@dataclass(frozen=True)
class Grace:
    """The seconds between SIGTERM and SIGKILL."""

    seconds: float
    configured: bool


@dataclass(frozen=True)
class Choices:
    """The options of ``[workers]``, or their defaults."""

    stop_signals: str
    """The meaning of a signal to a supervisor: "stop" its task, or let it "finish"."""
    leftovers: str
    """When leftovers are ended: "always", "killed", "report" or "never"."""
    spared: list[str]
    """Names of programs that are not ended."""


@dataclass(frozen=True)
class Proof:
    """The processes of the proof, by their roles, and how they ended."""

    ended: list[str]
    left: list[str]
    harmed: list[str]
    seconds: float
    """From the order to kill the task to its return."""
    orphaned: list[str]
    """The processes that are left of the task whose supervisor was killed."""


class Leash:
    """A socket pair between the check and one process, which shows each of them when the other is gone."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.pid = 0
        self.check_end, self.process_end = socket.socketpair()

    def announce(self) -> None:
        """In the process: tell the check that it plays its role now."""
        with suppress(ConnectionError):  # the check is gone
            self.process_end.sendall(b"%d\n" % os.getpid())

    def wait(self) -> None:
        """In the process: return when the check is gone."""
        with suppress(ConnectionResetError):  # the check is gone, and has not read the announcement
            self.process_end.recv(1)

    def hear(self) -> None:
        """
        In the check: wait until the process announces itself.

        :raises CheckFailedError: if it does not.
        """
        self.check_end.settimeout(START_TIMEOUT)
        try:
            self.pid = int(self.check_end.recv(64))
        except (OSError, ValueError):
            raise CheckFailedError(f"the {self.role} did not start") from None

    def is_gone(self) -> bool:
        """In the check: whether the process has ended. A zombie has."""
        self.check_end.settimeout(0)
        try:
            return self.check_end.recv(1) == b""
        except BlockingIOError:
            return False

    def end(self) -> None:
        """In the check: end the process if it is still there, or about to start."""
        self.process_end.close()
        if not self.pid:
            # A process that stops itself would stay when its task is gone. Wait for its PID.
            with suppress(CheckFailedError):
                self.hear()
        # While the process holds its socket, its PID is not reused. A stopped process would not notice the
        # close.
        if self.pid and not self.is_gone():
            os.kill(self.pid, signal.SIGKILL)
            self.check_end.settimeout(END_TIMEOUT)
            self.check_end.recv(1)
        self.check_end.close()


def be_child(leash: Leash) -> None:
    """Wait for a signal, or for the end of the check."""
    leash.announce()
    leash.wait()


def be_deaf(leash: Leash) -> None:
    """Ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()
    be_child(leash)


def be_stopped(leash: Leash) -> None:
    """
    Stop, in a process group that is orphaned before the task ends.

    Otherwise the kernel would continue this process when the task ends (setpgid(2)).
    """
    os.setsid()
    leash.announce()
    os.kill(os.getpid(), signal.SIGSTOP)
    leash.wait()


def be_daemon(leash: Leash) -> None:
    """Leave session and parent, and execute another program."""
    os.setsid()
    if os.fork() == 0:
        leash.process_end.set_inheritable(True)
        program = DAEMON_PROGRAM.format(leash.process_end.fileno())
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", program])  # noqa: S606


def be_bystander(leash: Leash) -> None:
    """Act as another task, which must not be harmed."""
    lead_session()
    marks.mark_process()
    be_child(leash)


def be_orphan(leash: Leash) -> None:
    """Act as the task whose supervisor is killed, and end on SIGTERM as tasks do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    be_child(leash)


RUNNER = "task"
SUPERVISOR = "supervisor"
DAEMON = "daemon"
STOPPED = "stopped child"
BYSTANDER = "bystander"

DAEMON_PROGRAM = """
import os, socket
leash = socket.socket(fileno={})
leash.sendall(b"%d\\n" % os.getpid())
leash.recv(1)
"""
"""Does what :func:`be_child` does, without Airflow."""

ROLES: dict[str, Callable[[Leash], None]] = {
    "plain child": be_child,
    DAEMON: be_daemon,
    "child deaf to SIGTERM": be_deaf,
    STOPPED: be_stopped,
}
"""The processes that the task starts, in this order."""


ORPHAN = "task without a supervisor"
ORPHANS = {"daemon without a supervisor": DAEMON}
"""The processes of the task whose supervisor is killed, each with a role of the first task."""


def run_task(leashes: dict[str, Leash]) -> None:
    """In the task: start its processes, and wait to be killed."""
    for leash in leashes.values():
        leash.check_end.close()
    pids = {role: fork(leashes, role, be) for role, be in ROLES.items()}
    try:
        os.waitpid(pids[DAEMON], 0)
        os.waitid(os.P_PID, pids[STOPPED], os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        be_child(leashes[RUNNER])
    finally:
        # The check is gone, which the stopped child cannot notice. SIGTERM does not lead here.
        os.kill(pids[STOPPED], signal.SIGKILL)


def fork(leashes: dict[str, Leash], role: str, be: Callable[[Leash], None]) -> int:
    """Fork a process that holds no end of a leash but its own."""
    pid = os.fork()
    if pid:
        leashes[role].process_end.close()
        return pid
    try:
        for other, leash in leashes.items():
            leash.check_end.close()
            if other != role:
                leash.process_end.close()
        be(leashes[role])
    finally:
        os._exit(0)


def start_task(target: Callable[[], None]) -> ActivitySubprocess:
    """Start ``target`` as a task, with a stand-in for the API client."""
    fields = {
        "id": uuid4(),
        "task_id": "check",
        "dag_id": "check",
        "run_id": "check",
        "try_number": 1,
        "map_index": -1,
        "dag_version_id": uuid4(),
        "queue": "default",
        "pool_slots": 1,
        "priority_weight": 1,
    }
    known = {name: value for name, value in fields.items() if name in TaskInstance.model_fields}
    context = TIRunContext.model_construct(should_retry=False, max_tries=0, start_date=None)
    return ActivitySubprocess.start(
        what=TaskInstance.model_construct(**known),
        dag_rel_path="check.py",
        bundle_info=SimpleNamespace(name="check", version=None),
        client=SimpleNamespace(task_instances=SimpleNamespace(start=lambda *_args, **_kwargs: context)),
        target=target,
        logger=structlog.wrap_logger(structlog.PrintLogger(sys.stderr), processors=[drop_event]).bind(),
    )


def drop_event(_logger: Any, _method: str, _event: Any) -> NoReturn:
    """Do not print the log of the task, which is empty."""
    raise structlog.DropEvent


@contextmanager
def hold_processes() -> Iterator[tuple[dict[str, Leash], ActivitySubprocess]]:
    """Start a task with its processes, and a bystander. In the end, end those that are left."""
    with ExitStack() as stack:
        leashes = {role: Leash(role) for role in (BYSTANDER, *ROLES, RUNNER)}
        for leash in leashes.values():
            stack.callback(leash.end)
        task = start_task(lambda: run_task(leashes))
        stack.callback(task.selector.close)
        fork(leashes, BYSTANDER, be_bystander)
        for leash in leashes.values():
            leash.process_end.close()
        for leash in leashes.values():
            leash.hear()
        yield leashes, task


@contextmanager
def hold_orphans(others: Iterable[Leash]) -> Iterator[dict[str, Leash]]:
    """Start another task, with a supervisor of its own. In the end, end those that are left."""
    with ExitStack() as stack:
        leashes = {role: Leash(role) for role in (*ORPHANS, ORPHAN, SUPERVISOR)}
        pid = os.fork()
        if pid == 0:
            be_supervisor(leashes, others)
        stack.callback(os.waitpid, pid, 0)
        for leash in leashes.values():
            stack.callback(leash.end)
            leash.process_end.close()
        for leash in leashes.values():
            leash.hear()
        yield leashes


def be_supervisor(leashes: dict[str, Leash], others: Iterable[Leash]) -> NoReturn:
    """In the supervisor of the other task: start it, and wait to be killed."""
    try:
        for leash in (*leashes.values(), *others):
            leash.check_end.close()
        start_task(lambda: run_orphan(leashes))
        for role in (*ORPHANS, ORPHAN):
            leashes[role].process_end.close()
        be_child(leashes[SUPERVISOR])
    finally:
        os._exit(0)


def run_orphan(leashes: dict[str, Leash]) -> None:
    """In the other task: start its processes, and wait to be told to stop."""
    leashes.pop(SUPERVISOR).process_end.close()
    for pid in [fork(leashes, role, ROLES[other]) for role, other in ORPHANS.items()]:
        os.waitpid(pid, 0)
    be_orphan(leashes[ORPHAN])


def list_orphaned(leashes: dict[str, Leash]) -> list[str]:
    """Wait a while; return the processes that are left of the task whose supervisor was killed."""
    deadline = time.monotonic() + END_TIMEOUT
    while (
        left := [role for role in (*ORPHANS, ORPHAN) if not leashes[role].is_gone()]
    ) and time.monotonic() < deadline:
        select.select([leashes[left[0]].check_end], [], [], deadline - time.monotonic())
    return left


@contextmanager
def ending_always() -> Iterator[None]:
    """For the proof, end all leftovers, whatever the deployment has chosen, and sweep no real tasks."""
    with ExitStack() as stack:
        for module in (leftovers, lifeline):
            replace(stack, module, "find_leftover_policy", lambda _conf: LeftoverPolicy.ALWAYS)
            replace(stack, module, "find_spared_names", lambda _conf: frozenset())
        replace(stack, supervisor, "sweep_once", lambda _conf: None)
        yield


def replace(stack: ExitStack, module: ModuleType, name: str, value: object) -> None:
    """Replace a function of a module until the stack is closed."""
    stack.callback(setattr, module, name, getattr(module, name, None))
    setattr(module, name, value)


def prove() -> tuple[Means, Proof]:
    """
    Kill a task that has started some stubborn processes, and see which are left.

    :raises CheckFailedError: if the task could not be started.
    """
    # A real supervisor does this first, from SDK 1.2 on, and its tasks inherit it.
    getattr(supervisor, "_make_process_nondumpable", lambda: None)()
    with ending_always(), hold_processes() as (leashes, task), hold_orphans(leashes.values()) as orphans:
        means = find_means(task)
        began = time.monotonic()
        task.kill(signal.SIGTERM, escalation_delay=PROOF_GRACE, force=True)
        # On a busy machine the task may not have died in time. The others end when it has.
        while task._exit_code is None and (left := began + END_TIMEOUT - time.monotonic()) > 0:
            task._service_subprocess(max_wait_time=left)
        seconds = time.monotonic() - began
        gone = [role for role, leash in leashes.items() if leash.is_gone()]
        os.kill(orphans[SUPERVISOR].pid, signal.SIGKILL)
        orphaned = list_orphaned(orphans)
    return means, Proof(
        ended=[role for role in (*ROLES, RUNNER) if role in gone],
        left=[role for role in (*ROLES, RUNNER) if role not in gone],
        harmed=[BYSTANDER] if BYSTANDER in gone else [],
        seconds=round(seconds, 2),
        orphaned=orphaned,
    )


def find_means(task: ActivitySubprocess) -> Means:
    """Return the means that are used for a task that runs."""
    return Means(
        session=os.getsid(task.pid) == os.getpgid(task.pid) == task.pid,
        exit="polling" if task._exit_watch._polls else "pidfd",
        mark=name_mark(task._tree),
        processes=find_source(task.pid),
    )


def find_source(pid: int) -> str:
    """Return where the supervisor looks for a process of our own."""
    if not os.path.exists(f"{processes.PROC}/self/stat"):
        return "psutil"
    process = processes.look_at(pid)
    return "hidden" if process and process.start < 0 else "/proc"


def name_mark(tree: process_tree.ProcessTree) -> str:
    """Return the kind of mark of a tree's processes."""
    if tree.leader is None:
        return "none"
    return "limit" if tree._read_marks is marks.read_limits else "variable"


def find_users(run_as_user: str | None) -> Users:
    """Return the means against processes of ``run_as_user``, or else of the configured user."""
    user = run_as_user or supervisor.conf.get("core", "default_impersonation", fallback="") or None
    return Users(
        hidden=hides_others(),
        sudo=shutil.which("sudo"),
        run_as_user=user,
        refusal=ask_sudo(user) if user else None,
    )


def hides_others() -> bool:
    """Whether processes of other users cannot be seen."""
    if processes.read_process(1) is None:
        return True
    if psutil.Process(1).uids().effective != os.geteuid():
        return False
    # PID 1 is our own, as in a container, and proves nothing.
    mounts = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint == processes.PROC]
    return os.geteuid() != 0 and any("hidepid=" in mount.opts for mount in mounts)


def ask_sudo(user: str) -> str | None:
    """
    Return why sudo may not kill processes of ``user``, None if it may; nothing is killed.

    Ask only on demand, because sudo mails the administrator about every refusal.
    """
    sudo = shutil.which("sudo")
    if sudo is None:
        return "there is no sudo"
    if not is_user(user):
        return "there is no such user"
    uid = pwd.getpwnam(user).pw_uid
    if uid == os.geteuid() or may_signal([sudo, "-n", "-u", f"#{uid}"]) or may_signal([sudo, "-n"]):
        return None
    return f"the sudoers permit `kill` without a password neither as {user} nor as root"


def may_signal(sudo: list[str]) -> bool:
    """Whether sudo runs ``kill`` for every signal that the supervisor sends."""
    for sig in TEARDOWN_SIGNALS:
        kill = ["kill", f"-{int(sig)}", str(NOBODY)]
        # sudo may list a rule without a password although the rule needs one. If it lists none, do not try.
        if run_sudo([*sudo, "-l", *kill]) is not None:
            return False
        complaint = run_sudo([*sudo, *kill]) or ""
        if complaint.startswith("sudo"):  # otherwise kill complains that there is no such process
            return False
    return True


def run_sudo(command: list[str]) -> str | None:
    """Run sudo; return why it failed, None if it did not."""
    return run_all({0: command})[0]


def is_user(name: str) -> bool:
    """Whether there is a user of that name."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def find_grace_in_force() -> Grace:
    """Return the grace period of a task that the server has ended."""
    configured = is_grace_set(supervisor.conf)
    # From 1.4 on the caller of kill() uses the option, and its default.
    seconds = getattr(supervisor, "KILLED_TASK_CLEANUP_TIME", None)
    return Grace(find_grace(supervisor.conf) if seconds is None else seconds, configured)


def find_missing_calls() -> list[str]:
    """Return the calls that the installed supervisor lacks, although a patched one has them."""
    return [
        f"{cls.__name__}.{method}() does not use {name}"
        for cls, method, name in CALLS
        if name not in list_names(getattr(cls, method).__code__)
    ]


def list_names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function uses, and those of the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from list_names(constant)


def find_version() -> str | None:
    """Return the version of the SDK; None if it can be imported, but is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def find_choices() -> Choices:
    """Return the choices of the deployment."""
    conf = supervisor.conf
    return Choices(
        find_stop_policy(conf, ActivitySubprocess._stop_policy).value,
        find_leftover_policy(conf).value,
        sorted(find_spared_names(conf)),
    )


@dataclass(frozen=True)
class Findings:
    """The findings of the check."""

    version: str | None
    """The installed version; None if the SDK can be imported, but is not installed."""
    missing: list[str]
    """Calls that the supervisor lacks, although a patched one has them."""
    means: Means | None
    """None if the proof could not be carried out; the same holds for ``proof``."""
    users: Users
    grace: Grace
    choices: Choices | None
    """None if the SDK is not patched."""
    proof: Proof | None
    orphans: list[int]
    """PIDs of task runners of this user whose supervisors have died."""
    warnings: list[str]
    """Means that are poorer than they could be, in a clause each."""
    problems: list[str]
    """The reasons why the check fails, in a clause each."""


def examine(run_as_user: str | None, *, strict: bool = False) -> Findings:
    """Examine this environment."""
    missing = find_missing_calls()
    problems = [f"the SDK is not patched, or only in part: {call}" for call in missing]
    means = proof = None
    try:
        means, proof = prove()
    except CheckFailedError as error:
        problems.append(f"the proof failed: {error}")
    except Exception as error:
        problems.append(f"the proof failed with {type(error).__name__}: {error}")
    users = find_users(run_as_user)
    problems += find_problems(means, users, proof)
    orphans: list[int] = []
    warnings = list(find_warnings(means, proof))
    try:
        orphans += [orphan.process.pid for orphan in find_orphans()]
    except OSError as error:
        warnings.append(f"tasks without a supervisor could not be looked for: {error.strerror}")
    if orphans:
        pids = ", ".join(map(str, orphans))
        warnings.append(
            f"tasks run on without their supervisors, until the next one starts or --orphans ends them: PID {pids}"
        )
    if strict:
        problems, warnings = problems + warnings, []
    return Findings(
        version=find_version(),
        missing=missing,
        means=means,
        users=users,
        grace=find_grace_in_force(),
        choices=None if missing else find_choices(),
        proof=proof,
        orphans=orphans,
        warnings=warnings,
        problems=problems,
    )


def find_warnings(means: Means | None, proof: Proof | None) -> Iterator[str]:
    """Yield the means that are poorer than they could be."""
    if means and means.mark == "variable":
        yield "what a task starts with an empty environment, and detaches, is not found: RLIMIT_RTTIME cannot be set"
    if proof and proof.orphaned:
        yield f"left running by a task whose supervisor was killed: {', '.join(proof.orphaned)}"


def find_problems(means: Means | None, users: Users, proof: Proof | None) -> Iterator[str]:
    """Yield the faults."""
    if means and not means.session:
        yield "a task does not lead a session of its own"
    if proof and proof.left:
        yield f"left running by a task that was killed: {', '.join(proof.left)}"
    if proof and proof.harmed:
        yield f"ended although it was not the task's: {', '.join(proof.harmed)}"
    if users.refusal:
        yield f"processes of {users.run_as_user} could not be ended: {users.refusal}"
    if users.run_as_user and users.hidden:
        yield f"processes of {users.run_as_user} could not be found: they are hidden (hidepid)"


def describe(findings: Findings) -> Iterator[str]:
    """Yield the findings as lines of text."""
    state = "not patched, or only in part" if findings.missing else "patched"
    yield f"{DISTRIBUTION} {findings.version or '(not installed)'}: {state}"
    if findings.means:
        yield from describe_means(findings.means)
    users, grace = findings.users, findings.grace
    yield f"  other users:   {'hidden' if users.hidden else 'visible'}"
    yield f"  run_as_user:   {describe_sudo(users)}"
    yield f"  grace period:  {grace.seconds:g} s, {'as configured' if grace.configured else 'the default'}"
    if findings.choices:
        yield from describe_choices(findings.choices)
    if findings.proof:
        number = len(ROLES) + 1
        yield (
            f"A task of {number} processes was killed in {findings.proof.seconds:.1f} s: "
            f"{len(findings.proof.left)} left, {len(findings.proof.harmed)} bystanders harmed."
        )
        yield f"The supervisor of another was killed: {len(findings.proof.orphaned)} of {len(ORPHANS) + 1} processes left."
    yield "NOT OK" if findings.problems else "OK"


EXITS = {"pidfd": "noticed at once, by pidfd", "polling": "looked for once a second"}

MARKS = {
    "limit": "RLIMIT_RTTIME",
    "variable": "a variable, which is lost with the environment",
    "none": "none, for the task itself was not found",
}


SOURCES = {
    "/proc": "found in /proc",
    "psutil": "found in psutil",
    "hidden": "found by their marks and sessions, for /proc hides them (hidepid)",
}


def describe_means(means: Means) -> Iterator[str]:
    """Yield the means that are used for a task."""
    yield f"  session:       {'its own, signalled as a group' if means.session else 'none of its own'}"
    yield f"  exit:          {EXITS[means.exit]}"
    yield f"  mark:          {MARKS[means.mark]}"
    yield f"  processes:     {SOURCES[means.processes]}"


STOPS = {
    "stop": "stop the task",
    "finish": "let the task finish",
}

LEFTOVERS = {
    "always": "ended unless the task succeeds",
    "killed": "ended when the task is killed",
    "report": "named in the task's log, and not ended",
    "never": "not ended",
}


def describe_choices(choices: Choices) -> Iterator[str]:
    """Yield the choices of the deployment."""
    yield f"  stop signals:  {STOPS[choices.stop_signals]}"
    spared = f", but for {', '.join(choices.spared)}" if choices.spared else ""
    yield f"  leftovers:     {LEFTOVERS[choices.leftovers]}{spared}"


def describe_sudo(users: Users) -> str:
    """Return whether processes of another user can be ended."""
    if users.run_as_user is None:
        return f"sudo is {'there' if users.sudo else 'missing'}; --run-as-user USER asks what it permits"
    return f"sudo {'does not permit' if users.refusal else 'permits'} ending processes of {users.run_as_user}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this environment, and return the exit status."""
    options = parse_arguments(arguments)
    if options.orphans:
        return sweep.main(["--dry-run"] if options.dry_run else [])
    # Suppress the supervisor's log apart from warnings, which may explain the findings.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    try:
        with redirect_stdout(sys.stderr):
            findings = examine(options.run_as_user, strict=options.strict)
    except KeyboardInterrupt:
        print("Interrupted: nothing was left running.", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(asdict(findings)) if options.json else "\n".join(describe(findings)), flush=True)
    for warning in findings.warnings:
        print(f"Warning: {warning}.", file=sys.stderr)
    for problem in findings.problems:
        print(f"Not OK: {problem}.", file=sys.stderr)
    return 1 if findings.problems else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, or exit with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m airflow.sdk.execution_time.teardown",
        description="Says by which means tasks are ended in this environment, and proves it.",
    )
    parser.add_argument("--json", action="store_true", help="write the findings as a JSON object")
    parser.add_argument(
        "--run-as-user", metavar="USER", help="ask sudo whether processes of USER can be ended"
    )
    parser.add_argument("--strict", action="store_true", help="fail also for what is only a warning")
    parser.add_argument(
        "--orphans",
        action="store_true",
        help="end the tasks whose supervisors have died, instead of the check",
    )
    parser.add_argument("--dry-run", action="store_true", help="with --orphans: list them, and end none")
    options = parser.parse_args(arguments)
    if options.dry_run and not options.orphans:
        parser.exit(2, "The check has no dry run: give --orphans as well, or leave out --dry-run.\n")
    if options.orphans and (options.json or options.strict or options.run_as_user is not None):
        parser.exit(
            2, "--orphans takes the place of the check: give no other option than --dry-run with it.\n"
        )
    if options.run_as_user is not None and not is_user(options.run_as_user):
        parser.exit(2, f"There is no user {options.run_as_user!r}: give the run_as_user of your tasks.\n")
    return options


if __name__ == "__main__":
    sys.exit(main())
