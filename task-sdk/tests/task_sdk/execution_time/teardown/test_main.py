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
"""The check passes where tasks end completely, fails where they do not, says by which means, and leaves nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pwd
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.faults import (
    PR_SET_DUMPABLE,
    RefusedError,
    become_nobody,
    mount_proc,
    write_sudo,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    Relay,
    Tree,
    ending_all,
    fork,
    list_living,
    waiting,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess, WatchedSubprocess
from airflow.sdk.execution_time.teardown import (
    __main__ as check,
    leftovers,
    lifeline,
    processes,
    stop_request,
    sudo,
)
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_mock import MockerFixture

MODULE = "airflow.sdk.execution_time.teardown"

OTHER_USER = next(user.pw_name for user in pwd.getpwall() if user.pw_uid != os.geteuid())

STUBBORN = ["daemon", "child deaf to SIGTERM", "stopped child"]
"""What only the teardown ends."""


REFUSED = 71
"""The status of a check whose surroundings the kernel does not allow."""

STARTING = 120
"""Seconds that a busy machine may take to import Airflow for the first time, and check it."""


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """End what a check leaves, be it orphaned, and fail."""
    with ending_all() as list_left:
        yield
        # What the check has killed, or let go, in its last moments may take a while to die.
        deadline = time.monotonic() + PATIENCE
        left = [pid for pid in list_left() if outlasts(pid, deadline)]
    assert left == []


def outlasts(pid: int, deadline: float) -> bool:
    """Whether a process of a test is still there when the time is up."""
    with contextlib.closing(Tree()) as tree:
        try:
            return not tree.gone(tree.add(pid), max(0, deadline - time.monotonic()))
        except ProcessLookupError:  # it has ended, and its parent has collected it, since it was listed
            return False


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Let processes that do end, and a sudo that answers, take as long as they do on a busy machine.

    The grace of the proof, which those deaf to SIGTERM always use up, stays as it is.
    """

    def prepare_patiently(*args: Any) -> float:
        prepare(*args)
        return PATIENCE

    prepare = supervisor.prepare_kill
    monkeypatch.setattr(supervisor, "prepare_kill", prepare_patiently)
    monkeypatch.setattr(leftovers, "KILL_TIME", PATIENCE)
    monkeypatch.setattr(check, "START_TIMEOUT", PATIENCE)
    monkeypatch.setattr(check, "END_TIMEOUT", PATIENCE)
    monkeypatch.setattr(sudo, "SUDO_TIMEOUT", PATIENCE)


@pytest.fixture(autouse=True)
def unseen_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep those of the machine, which may have any, out of what is found."""
    monkeypatch.setattr(check, "find_orphans", list)


@pytest.fixture(autouse=True)
def unset_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME", raising=False)


def run(*arguments: str, change: Callable[[], Any] = lambda: None) -> SimpleNamespace:
    """Run the check in a fork of this process, which ``change`` changes first; return its status and what it wrote."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                sys.stdout, sys.stderr = out, err
                change()
                status = check.main(arguments)
            except SystemExit as end:
                status = end.code
            except RefusedError as refused:
                err.write(str(refused))
                status = REFUSED
            except BaseException:  # noqa: BLE001 - a forked copy of the test runner must not go on running tests
                traceback.print_exc(file=err)
            finally:
                out.flush()
                err.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        if os.waitstatus_to_exitcode(status) == REFUSED:
            pytest.skip(err.read())
        return SimpleNamespace(status=os.waitstatus_to_exitcode(status), out=out.read(), err=err.read())


def find(*arguments: str, change: Callable[[], Any] = lambda: None, warnings: int = 0) -> SimpleNamespace:
    """Return the findings of a check that finds nothing wrong, but for what it warns of."""
    result = run("--json", *arguments, change=change)
    findings = read(result.out)
    assert result.status == 0
    assert result.err == "".join(f"Warning: {warning}.\n" for warning in findings.warnings)
    assert len(findings.warnings) == warnings, findings.warnings
    return findings


def find_wrong(*arguments: str, change: Callable[[], Any] = lambda: None) -> SimpleNamespace:
    """Return the findings of a check that finds something wrong, and says so."""
    result = run("--json", *arguments, change=change)
    assert result.status == 1, result.err
    findings = read(result.out)
    assert findings.problems
    assert all(f"Not OK: {problem}." in result.err for problem in findings.problems)
    return findings


def read(text: str) -> SimpleNamespace:
    # Before it, a supervisor of 1.0 whose logger was made before the check configures logging may say what it does.
    *_, last = text.splitlines()
    findings: SimpleNamespace = json.loads(last, object_hook=lambda fields: SimpleNamespace(**fields))
    return findings


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EPERM, "refused")


class TestCommand:
    def test_as_users_run_it(self, tmp_path: Path) -> None:
        """It runs as a module, without a configuration, a database or a terminal, and passes."""
        secret = "not-for-everybody"  # noqa: S105 - is looked for in the output
        result = subprocess.run(
            [sys.executable, "-m", MODULE],
            env={
                "PATH": os.environ["PATH"],
                "AIRFLOW_HOME": str(tmp_path),
                "AIRFLOW__API__SECRET_KEY": secret,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STARTING,
            check=False,
        )
        first, *_, last = result.stdout.splitlines()
        assert (result.returncode, last) == (0, "OK")
        assert first == f"apache-airflow-task-sdk {metadata.version('apache-airflow-task-sdk')}: patched"
        assert "5 processes" in result.stdout
        assert " 0 left, 0 bystanders harmed." in result.stdout
        assert "grace period:  5 s" in result.stdout or "60 s, the default" in result.stdout
        assert secret not in result.stdout + result.stderr

    def test_text_of_a_failure(self) -> None:
        """What is wrong is on stderr, in one line each; the rest is written all the same."""

        def break_teardown() -> None:
            ProcessTree.find = lambda *args, **kwargs: []

        result = run(change=break_teardown)
        assert result.status == 1
        assert result.err.startswith("Not OK: left running by a task that was killed: ")
        assert result.err.endswith(f"{', '.join(STUBBORN)}.\n")
        assert " 0 bystanders harmed.\n" in result.out
        assert result.out.endswith("\nNOT OK\n")

    def test_unknown_user(self) -> None:
        """A user that does not exist is refused in one sentence, before anything is started."""
        result = run("--run-as-user", "no such user")
        assert (result.status, result.out) == (2, "")
        assert result.err == "There is no user 'no such user': give the run_as_user of your tasks.\n"


class TestProof:
    def test_everything_ends(self) -> None:
        """All processes of its task are ended, and the other task is not."""
        proof = find().proof
        assert proof.ended == ["plain child", *STUBBORN, "task"]
        assert proof.left == proof.harmed == []

    def test_runner_that_dies_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine so busy that kill() returns before the task's own process is dead is no finding."""
        monkeypatch.setenv("AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME", "0.1")

        def return_at_once() -> None:
            ActivitySubprocess.kill = lambda task, *_, **__: os.kill(task.pid, signal.SIGKILL)

        proof = find(change=return_at_once).proof
        assert proof.ended == ["plain child", *STUBBORN, "task"]

    def test_unfinished_teardown(self) -> None:
        """A teardown that finds nobody is found out, and what it leaves does not stay."""

        def find_nobody() -> None:
            ProcessTree.find = lambda *args, **kwargs: []

        # Nobody waits for the plain child, which the signal to the group ends.
        assert set(STUBBORN) <= set(find_wrong(change=find_nobody).proof.left)

    def test_harm(self) -> None:
        """A teardown that ends a process of somebody else is found out."""

        def find_too_many() -> None:
            def find_all(tree: ProcessTree, **kwargs: Any) -> list[processes.Process]:
                members: list[processes.Process] = original(tree, **kwargs)
                pids = [child.pid for child in psutil.Process().children() if child.pid != tree._leader.pid]
                return members + [process for pid in pids if (process := processes.read_process(pid))]

            original = ProcessTree.find
            ProcessTree.find = find_all

        assert find_wrong(change=find_too_many).proof.harmed == ["bystander"]

    def test_supervisor_that_fails(self) -> None:
        """An exception of the supervisor is a finding, and nothing of its task stays."""

        def fail() -> None:
            ActivitySubprocess.kill = refuse

        findings = find_wrong(change=fail)
        assert findings.proof is None
        assert "the proof failed with PermissionError: [Errno 1] refused" in findings.problems

    def test_task_that_does_not_start(self) -> None:
        """It does not wait for processes that nobody could start."""

        def fail() -> None:
            check.ROLES["stopped child"] = refuse
            check.run_task = lambda leashes: os._exit(1)

        assert find_wrong(change=fail).problems == ["the proof failed: the plain child did not start"]

    @pytest.mark.parametrize(
        ("method", "missing"),
        [
            ("kill", ["prepare_kill", "signal_tree"]),
            ("start", ["begin_runner", "mark_process", "follow_supervisor"]),
        ],
    )
    def test_unpatched_supervisor(self, method: str, missing: list[str]) -> None:
        """A method of the supervisor that does not call what it should is named, even where the proof succeeds."""

        def replace() -> None:
            def call(*args: Any, **kwargs: Any) -> Any:
                return original(*args, **kwargs)

            original = getattr(WatchedSubprocess, method)
            setattr(WatchedSubprocess, method, call if method == "kill" else staticmethod(call))

        if method == "start":
            # A class method that is replaced would start the wrong class.
            findings = find_wrong(change=lambda: (replace(), setattr(ActivitySubprocess, "start", refuse)))
        else:
            findings = find_wrong(change=replace)
            assert findings.proof.left == []
        assert findings.missing == [f"WatchedSubprocess.{method}() does not use {name}" for name in missing]

    def test_death_of_a_supervisor(self) -> None:
        """A task that does not notice the death of its supervisor is a warning; --strict makes it a fault."""

        def ignore() -> None:
            lifeline.request_parent_death_signal = lambda _lifeline: False
            check.END_TIMEOUT = 1.0

        findings = find(change=ignore, warnings=1)
        assert findings.proof.orphaned == ["daemon without a supervisor", "task without a supervisor"]
        strict = find_wrong("--strict", change=ignore)
        assert (strict.problems, strict.warnings) == (findings.warnings, [])

    def test_orphans_of_the_machine(self) -> None:
        """Tasks whose supervisors have died are named, and left alone."""
        with waiting(lambda: None) as pid:

            def see_orphan() -> None:
                orphan = SimpleNamespace(process=processes.read_process(pid))
                check.find_orphans = lambda: [orphan]

            findings = find(change=see_orphan, warnings=1)
            assert findings.orphans == [pid]
            assert f"PID {pid}" in findings.warnings[0]
            assert processes.read_process(pid)

    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_check_that_is_ended(self, signum: signal.Signals) -> None:
        """However the check itself is ended, its processes end with it, the deaf and the stopped one among them."""
        with contextlib.closing(Relay()) as relay, contextlib.closing(Tree()) as tree:

            def wait_in_kill() -> None:
                def pause(*args: Any, **kwargs: Any) -> None:
                    relay.tell("killing")
                    signal.pause()

                # pytest's own, and what the shell may have left ignored
                signal.signal(signal.SIGINT, signal.default_int_handler)
                ActivitySubprocess.kill = pause

            forked = fork(lambda: os._exit(run(change=wait_in_kill).status & 127))
            assert relay.hear() == "killing"
            [checking] = psutil.Process(forked).children()
            processes = [tree.add(pid) for pid in list_living() if pid != forked]
            assert len(processes) == 10, (
                "the check, the task, its four, the bystander, and another with its supervisor"
            )
            checking.send_signal(signum)
            assert [pid for pid in processes if not tree.gone(pid)] == []
        _, status = os.waitpid(forked, 0)
        expected = check.INTERRUPTED if signum == signal.SIGINT else -signum
        assert os.waitstatus_to_exitcode(status) == expected & 127


class TestOrphans:
    def test_end(self) -> None:
        """Orphans are ended instead of the check, or listed, and the status is that of the sweep: here as many as it writes."""

        def note_arguments() -> None:
            check.sweep.main = lambda arguments: sys.stdout.write(repr(arguments))

        result = run("--orphans", change=note_arguments)
        assert (result.status, result.out) == (2, "[]")
        result = run("--orphans", "--dry-run", change=note_arguments)
        assert (result.status, result.out) == (13, "['--dry-run']")

    @pytest.mark.parametrize("option", [["--json"], ["--strict"], ["--run-as-user", OTHER_USER]])
    def test_options_of_the_check(self, option: list[str]) -> None:
        """They mean nothing where there is no check."""
        result = run("--orphans", *option)
        assert (result.status, result.out) == (2, "")
        assert result.err.count("give no other option") == 1

    def test_dry_run_of_the_check(self) -> None:
        """The check proves something, or nothing: there is no dry run of it."""
        result = run("--dry-run")
        assert (result.status, result.out) == (2, "")
        assert result.err == "The check has no dry run: give --orphans as well, or leave out --dry-run.\n"


class TestMeans:
    def test_all_there(self) -> None:
        """On Linux nothing is wanting."""
        means = find().means
        assert means == SimpleNamespace(session=True, exit="pidfd", mark="limit", processes="/proc")

    def test_without_pidfd(self) -> None:
        """Where there is no pidfd the exit is polled for."""

        def remove() -> None:
            del os.pidfd_open
            # psutil has one of its own, and remembers whether it works.
            if can_use_pidfd := getattr(psutil._psposix, "can_use_pidfd_open", None):
                can_use_pidfd.cache_clear()

        assert find(change=remove).means.exit == "polling"

    def test_without_limit(self) -> None:
        """A variable serves where the limit cannot be set."""

        def remove() -> None:
            resource.setrlimit = resource.prlimit = refuse
            check.END_TIMEOUT = 1.0

        findings = find(change=remove, warnings=2)
        assert findings.means.mark == "variable"
        assert findings.proof.orphaned == ["daemon without a supervisor"]

    def test_without_proc(self, tmp_path: Path) -> None:
        """Where there is no /proc psutil knows the processes."""

        def hide() -> None:
            processes.PROC = str(tmp_path / "missing")

        assert find(change=hide).means.processes == "psutil"

    def test_without_session(self) -> None:
        """A task that gets no session of its own is a fault, even where all of it is ended."""

        def remove() -> None:
            stop_request.lead_session = lambda: False

        findings = find_wrong(change=remove)
        assert not findings.means.session
        assert "a task does not lead a session of its own" in findings.problems

    def test_proc_of_others(self) -> None:
        """Where /proc belongs to another PID namespace it says that the task is not found, and what that means."""

        def confuse() -> None:
            os.readlink = lambda path, *args, **kwargs: another if path == "/proc/self" else original(path)

        original, another = os.readlink, str(os.getpid())
        findings = find_wrong(change=confuse)
        assert findings.means.mark == "none"
        assert set(STUBBORN) <= set(findings.proof.left)
        assert findings.proof.harmed == []


class TestLeash:
    def test_end_before_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that is about to start is waited for: if it stops itself, it would stay."""

        def start_late() -> None:
            relay.hear()
            check.be_stopped(leash)

        def hear_late(leash: check.Leash) -> None:
            relay.tell("now")
            hear(leash)

        hear = check.Leash.hear
        monkeypatch.setattr(check.Leash, "hear", hear_late)
        leash = check.Leash(check.STOPPED)
        with contextlib.closing(Relay()) as relay:
            pid = fork(start_late)
            leash.end()
            relay.tell("now")
            _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSIGNALED(status)


class TestHidden:
    """An unprivileged check whose /proc is mounted with hidepid; it is not dumpable, as workers are from SDK 1.2 on."""

    def hide(self, options: bytes) -> None:
        def be_forked_daemon(leash: check.Leash) -> None:
            os.setsid()
            if os.fork() == 0:
                check.be_child(leash)

        mount_proc(options)
        become_nobody()
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        # Nobody need be allowed to run this interpreter.
        check.ROLES[check.DAEMON] = be_forked_daemon

    def test_entries_that_are_closed(self) -> None:
        """With hidepid=1 its processes are found by other means, which it says."""
        findings = find(change=lambda: self.hide(b"hidepid=1"))
        workers_hide = hasattr(supervisor, "_make_process_nondumpable")
        assert findings.means.processes == ("hidden" if workers_hide else "/proc")
        assert findings.means.mark == "limit"
        assert findings.users.hidden
        assert findings.proof.left == []

    def test_text(self) -> None:
        """It says so to people, too."""
        result = run(change=lambda: self.hide(b"hidepid=1"))
        assert result.status == 0, result.err
        workers_hide = hasattr(supervisor, "_make_process_nondumpable")
        assert ("for /proc hides them" in result.out) == workers_hide

    def test_processes_that_are_not_listed(self) -> None:
        """With hidepid=2 no supervisor that is not dumpable can start a task, and the check fails, and leaves nothing."""
        if hasattr(supervisor, "_make_process_nondumpable"):
            findings = find_wrong(change=lambda: self.hide(b"hidepid=2"))
            assert [problem.partition(":")[0] for problem in findings.problems] == [
                "the proof failed with NoSuchProcess"
            ]
        else:
            assert find(change=lambda: self.hide(b"hidepid=2")).proof.left == []


class TestUsers:
    def install_sudo(self, folder: Path, script: str) -> Callable[[], None]:
        """Return what makes a sudo the only program on the PATH; its calls are noted in the folder."""
        write_sudo(folder, f'printf "%s\\n" "$*" >>{folder}/calls\n{script}')

        def change() -> None:
            os.environ["PATH"] = str(folder)

        return change

    def test_no_sudo(self, tmp_path: Path) -> None:
        """Its absence is a fact that nobody minds, and a fault where tasks run as another user."""

        def remove() -> None:
            os.environ["PATH"] = str(tmp_path)

        assert find(change=remove).users.sudo is None
        findings = find_wrong("--run-as-user", OTHER_USER, change=remove)
        assert findings.users.refusal == "there is no sudo"
        assert findings.proof.left == []

    def test_sudo_is_not_asked_in_vain(self, tmp_path: Path) -> None:
        """It reports to the administrator who has no permission, so that it is asked on demand alone."""
        change = self.install_sudo(tmp_path, "exit 1")
        assert find(change=change).users.sudo == f"{tmp_path}/sudo"
        assert not (tmp_path / "calls").exists()

    def test_sudo_permits(self, tmp_path: Path) -> None:
        """Every signal of the teardown is tried, as the teardown does it, on a PID that nobody has."""
        nobody = '[ "$2" = -l ] || [ "$4" = -l ] || { echo "kill: No such process" >&2; exit 1; }'
        change = self.install_sudo(tmp_path, nobody)
        users = find("--run-as-user", OTHER_USER, change=change).users
        assert (users.run_as_user, users.refusal) == (OTHER_USER, None)
        uid = pwd.getpwnam(OTHER_USER).pw_uid
        calls = (tmp_path / "calls").read_text().splitlines()
        assert [call for call in calls if "-l" not in call] == [
            f"-n -u #{uid} kill -{int(sig)} {1 + (1 << 22)}"
            for sig in (signal.SIGTERM, signal.SIGCONT, signal.SIGSTOP, signal.SIGKILL)
        ]

    def test_sudo_permits_as_root(self, tmp_path: Path) -> None:
        """It is enough that it permits to kill as root, if not as the user."""
        change = self.install_sudo(tmp_path, '[ "$2" != -u ] || exit 1')
        assert find("--run-as-user", OTHER_USER, change=change).users.refusal is None

    @pytest.mark.parametrize(
        "script",
        [
            "exit 1",
            # Listing takes no password as soon as any rule takes none, whether or not it is this one.
            'for word; do [ "$word" = -l ] && exit; done; echo sudo: a password is required >&2; exit 1',
            # One signal of four.
            'for word; do [ "$word" = -9 ] && exit; done; exit 1',
        ],
        ids=["nothing", "with a password", "SIGKILL alone"],
    )
    def test_sudo_refuses(self, tmp_path: Path, script: str) -> None:
        """It is a fault where it does not permit every signal, or wants a password."""
        findings = find_wrong("--run-as-user", OTHER_USER, change=self.install_sudo(tmp_path, script))
        assert "permit `kill`" in findings.users.refusal
        assert findings.problems == [
            f"processes of {OTHER_USER} could not be ended: {findings.users.refusal}"
        ]

    def test_configured_user(self, tmp_path: Path) -> None:
        """The user of tasks that name none is asked about without being given."""
        change = self.install_sudo(tmp_path, "exit 0")

        def configure() -> None:
            change()
            os.environ["AIRFLOW__CORE__DEFAULT_IMPERSONATION"] = OTHER_USER

        users = find(change=configure).users
        assert (users.run_as_user, users.refusal) == (OTHER_USER, None)

    def test_configured_user_that_is_missing(self) -> None:
        """A configured user that does not exist is a fault; one that is given is refused at once."""

        def configure() -> None:
            os.environ["AIRFLOW__CORE__DEFAULT_IMPERSONATION"] = "no such user"

        assert find_wrong(change=configure).users.refusal in ("there is no such user", "there is no sudo")

    def test_hidden(self, tmp_path: Path) -> None:
        """Where hidepid hides other users it says so, which is a fault where tasks run as one."""
        change = self.install_sudo(tmp_path, "exit 0")

        def hide() -> None:
            def read_unless_hidden(pid: int) -> processes.Process | None:
                return None if pid == 1 else original(pid)

            change()
            original = processes.read_process
            processes.read_process = read_unless_hidden

        assert find(change=hide).users.hidden
        assert find_wrong("--run-as-user", OTHER_USER, change=hide).problems == [
            f"processes of {OTHER_USER} could not be found: they are hidden (hidepid)"
        ]

    @pytest.mark.parametrize(("euid", "options", "hidden"), [(7, "rw,hidepid=2", True), (7, "rw", False)])
    def test_own_first_process(self, mocker: MockerFixture, euid: int, options: str, *, hidden: bool) -> None:
        """Where PID 1 is our own, as in a container, the mount options tell."""
        mocker.patch.object(os, "geteuid", autospec=True, return_value=euid)
        mocker.patch.object(
            psutil.Process, "uids", autospec=True, return_value=SimpleNamespace(effective=euid)
        )
        proc = SimpleNamespace(mountpoint="/proc", opts=options)
        mocker.patch.object(psutil, "disk_partitions", autospec=True, return_value=[proc])
        assert check.hides_others() is hidden


class TestGrace:
    def test_default(self) -> None:
        """It is 5 s, and from 1.4 on what the option has as its default."""
        grace = find().grace
        assert (grace.seconds in (5, 60), grace.configured) == (True, False)

    def test_configured(self, tmp_path: Path) -> None:
        """It is what the deployment sets."""
        result = subprocess.run(
            [sys.executable, "-m", MODULE, "--json"],
            env={
                "PATH": os.environ["PATH"],
                "AIRFLOW_HOME": str(tmp_path),
                "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": "17",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STARTING,
            check=True,
        )
        findings = read(result.stdout)
        assert findings.grace == SimpleNamespace(seconds=17, configured=True)
        assert findings.proof.seconds < 17, "the proof takes a grace of its own"
