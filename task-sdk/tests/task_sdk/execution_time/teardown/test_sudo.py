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
from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.faults import write_sudo
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    Relay,
    fork,
    hear_in_popen,
    kill_child,
)
from task_sdk.execution_time.teardown.trees import lead, read, start_child, start_waiting

from airflow.sdk.execution_time.teardown import process_tree, sudo
from airflow.sdk.execution_time.teardown.processes import Process, is_alive
from airflow.sdk.execution_time.teardown.sudo import group_by_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_mock import MockerFixture

    from airflow.sdk.execution_time.teardown.process_tree import ProcessTree


pytestmark = pytest.mark.usefixtures("list_left")


class TestSudo:
    """Processes of another user, for which the kernel answers EPERM."""

    @pytest.fixture(autouse=True)
    def deny(self, mocker: MockerFixture) -> None:
        mocker.patch.object(process_tree, "send_signals", autospec=True, return_value=False)

    @pytest.fixture(autouse=True)
    def patient(self, mocker: MockerFixture) -> None:
        """Let a sudo that answers take as long as it does on a busy machine."""
        mocker.patch.object(sudo, "SUDO_TIMEOUT", PATIENCE)

    @pytest.fixture
    def owned_by(self, mocker: MockerFixture) -> Callable[..., list[Process]]:
        """Return what gives the processes of a tree to users, one each, and returns them."""

        def own(tree: ProcessTree, *uids: int) -> list[Process]:
            processes = tree.find()
            by_owner = {uid: [processes[i]] for i, uid in enumerate(uids)}
            mocker.patch.object(process_tree, "group_by_owner", autospec=True, return_value=by_owner)
            return processes

        return own

    def install_sudo(self, monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        write_sudo(folder, script)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def install_sudo_that_fails_late(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, pid: int, says: str
    ) -> None:
        """Have sudo say something and fail when one of the processes has ended."""
        wait = f"until grep -q '^State:.Z' /proc/{pid}/status; do :; done"
        self.install_sudo(monkeypatch, folder, f"kill -9 {pid}; {wait}; echo {says} >&2; exit 1")

    @contextlib.contextmanager
    def hanging_sudo(self, folder: Path, says: str) -> Iterator[list[Any]]:
        """Have sudo say something and hang, from when on it is timed; yields the list of what its calls have said."""
        with contextlib.closing(Relay()) as told, pytest.MonkeyPatch.context() as patching:
            self.install_sudo(
                patching, folder, f"echo {says} >/proc/{os.getpid()}/fd/{told.writer}; exec sleep 600"
            )
            patching.setattr(sudo, "SUDO_TIMEOUT", 0.1)
            yield hear_in_popen(told, patching)

    def test_numbers_only(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """One call for all of a user, as that user, which asks for no password and gets numbers only."""
        self.install_sudo(
            monkeypatch, tmp_path, f'printf "%s\\n" "$*" >>{tmp_path}/calls; shift 3; exec "$@"'
        )
        tree, _, started = lead(start_child, start_child)
        processes = sorted(tree.find(), key=lambda process: process.pid)
        tree.signal(processes, signal.SIGKILL)
        pids = " ".join(map(str, sorted(started)))
        assert (tmp_path / "calls").read_text() == f"-n -u #{os.geteuid()} kill -9 {pids}\n"
        assert tree.sudo_failures == {}
        deadline = time.monotonic() + PATIENCE
        while any(map(is_alive, processes)):
            assert time.monotonic() < deadline

    def test_as_root_where_not_as_the_user(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """A sudo that permits to kill as root alone is no failure."""
        self.install_sudo(monkeypatch, tmp_path, '[ "$2" = kill ] || exit 1')
        tree, _, _ = lead(start_child)
        tree.signal(owned_by(tree, 4711), signal.SIGTERM)
        assert tree.sudo_failures == {}

    def test_process_that_ends_meanwhile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Kill fails when one of many is gone; that is no refusal, and sudo is asked again for the rest."""
        tree, _, [polite, _] = lead(start_child, start_child)
        self.install_sudo_that_fails_late(monkeypatch, tmp_path, polite, "kill: No such process")
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {}

    def test_refusal_while_one_ends(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that does not permit it has refused, also if one of the processes has ended meanwhile."""
        tree, _, [polite, _] = lead(start_child, start_child)
        self.install_sudo_that_fails_late(monkeypatch, tmp_path, polite, "a password is required")
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "a password is required"}
        assert tree.end_signals == {}, "nobody was signalled"

    def test_nobody_is_stopped(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that takes its time to stop them could leave too little of it to kill them."""
        self.install_sudo(monkeypatch, tmp_path, f'printf "%s\\n" "$*" >>{tmp_path}/calls')
        tree, _, [child] = lead(start_child)
        began = time.monotonic()
        assert [process.pid for process in tree.kill_all(PATIENCE)] == [child]
        assert time.monotonic() - began < PATIENCE, "nobody is waited for to stop"
        assert (tmp_path / "calls").read_text() == f"-n -u #{os.geteuid()} kill -9 {child}\n"

    def test_failure_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What sudo says when it does not permit it is there to be logged."""
        self.install_sudo(monkeypatch, tmp_path, "echo a password is required >&2; exit 1")
        tree, _, _ = lead(start_child)
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "a password is required"}

    def test_one_failure_is_enough(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """A sudo that may not is not asked again, which every time would be logged and take its time."""
        self.install_sudo(monkeypatch, tmp_path, f"echo call >>{tmp_path}/calls; exit 1")
        tree, _, _ = lead(start_child)
        processes = owned_by(tree, 4711)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            tree.signal(processes, sig)
        assert (tmp_path / "calls").read_text() == "call\n" * 2, "as the user, and as root"
        assert tree.sudo_failures == {4711: "sudo ended with 1"}

    def test_failure_of_one_user_is_not_all_users(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """The sudoers may permit one user and not another."""
        self.install_sudo(
            monkeypatch, tmp_path, f'echo "$3 $4 $5" >>{tmp_path}/calls; [ "$3" = "#4712" ] || exit 1'
        )
        tree, _, _ = lead(start_child, start_child)
        processes = owned_by(tree, 4711, 4712)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            tree.signal(processes, sig)
        calls = (tmp_path / "calls").read_text().splitlines()
        assert [call for call in calls if call.startswith("#4712")] == ["#4712 kill -15", "#4712 kill -9"]
        assert list(tree.sudo_failures) == [4711]

    def test_all_users_at_once(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """What sudo takes for one user it takes for any number of them."""
        calls = tmp_path / "calls"
        wait = f"until [ $(wc -l <{calls}) = 3 ]; do :; done"
        self.install_sudo(monkeypatch, tmp_path, f"echo $3 >>{calls}; {wait}")
        tree, _, _ = lead(start_child, start_child, start_child)
        tree.signal(owned_by(tree, 4711, 4712, 4713), signal.SIGTERM)
        assert sorted(calls.read_text().split()) == ["#4711", "#4712", "#4713"]
        assert tree.sudo_failures == {}

    def test_root_is_not_asked_twice(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owned_by: Callable[..., list[Process]]
    ) -> None:
        """A process of root is signalled as root in the first place."""
        self.install_sudo(monkeypatch, tmp_path, f"echo call >>{tmp_path}/calls; exit 1")
        tree, _, _ = lead(start_child)
        tree.signal(owned_by(tree, 0), signal.SIGTERM)
        assert (tmp_path / "calls").read_text() == "call\n"
        assert list(tree.sudo_failures) == [0]

    def test_deadline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not waited for any longer than the caller has time."""
        tree, _, _ = lead(start_child)
        with self.hanging_sudo(tmp_path, '"$5"'):
            monkeypatch.setattr(sudo, "SUDO_TIMEOUT", PATIENCE)
            began = time.monotonic()
            tree.signal(tree.find(), signal.SIGTERM, signal.SIGCONT, deadline=began + 0.1)
            assert time.monotonic() - began < PATIENCE
        assert tree.sudo_failures == {os.geteuid(): sudo.SUDO_TIMED_OUT}

    def test_sudo_that_hangs(self, tmp_path: Path) -> None:
        """It is not waited for, nor asked again but for the SIGKILL, for it may have been slow just once."""
        tree, _, _ = lead(start_child)
        with self.hanging_sudo(tmp_path, '"$5"') as calls:
            for sig in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
                tree.signal(tree.find(), sig)
        assert calls == [-signal.SIGTERM, -signal.SIGKILL]
        assert tree.sudo_failures == {os.geteuid(): sudo.SUDO_TIMED_OUT}

    def test_sudo_that_hangs_and_may_not_be_killed(self, tmp_path: Path, mocker: MockerFixture) -> None:
        """Sudo becomes root before it runs a command; nobody waits for it then."""
        tree, _, _ = lead(start_child)
        refuse = mocker.patch.object(subprocess.Popen, "kill", autospec=True, side_effect=PermissionError)
        with self.hanging_sudo(tmp_path, "$$") as pids:
            tree.signal(tree.find(), signal.SIGTERM)
        assert refuse.called
        [pid] = pids
        os.kill(pid, signal.SIGKILL)

    def test_no_sudo(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that is not there is a failure like any other."""
        monkeypatch.setenv("PATH", str(tmp_path))
        tree, _, _ = lead(start_child)
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "there is no sudo"}


class TestSudoTime:
    def test_limit(self, mocker: MockerFixture) -> None:
        """A sudo that hangs costs a second, where nobody has less time."""
        popen = mocker.patch.object(subprocess, "Popen", autospec=True)
        popen.return_value.configure_mock(returncode=0, **{"communicate.return_value": ("", "")})
        assert sudo.run_all({0: ["sudo"]}) == {0: None}
        [call] = popen.return_value.communicate.mock_calls
        assert 0 < call.kwargs["timeout"] <= 1


class TestGroupByOwner:
    def test_effective_user(self, mocker: MockerFixture) -> None:
        """It is the effective user whom sudo is asked to signal as, for a set-user-ID program has another real one."""
        process = read(start_child())
        ids = psutil.Process().uids()._replace(real=1, effective=2, saved=3)
        mocker.patch.object(psutil.Process, "uids", autospec=True, return_value=ids)
        assert group_by_owner([process]) == {2: [process]}

    def test_dead_process(self) -> None:
        """Whoever has ended belongs to nobody."""
        pid, _ = start_waiting(lambda: None)
        process = read(pid)
        kill_child(pid)
        assert group_by_owner([process]) == {}

    def test_no_descriptor_left(self) -> None:
        """Where the owner cannot be told for want of a file descriptor, nobody is asked, and nothing raised."""
        process = read(start_child())
        with contextlib.closing(Relay()) as told:

            def use_up_descriptors() -> None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
                told.tell([*group_by_owner([process])])

            fork(use_up_descriptors)
            assert told.hear() == []
