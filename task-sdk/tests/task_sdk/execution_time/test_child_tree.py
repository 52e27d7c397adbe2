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
import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.faults import fork_as, run_in_namespace, write_sudo
from task_sdk.execution_time.teardown.supervised_task import (
    PATIENCE,
    Relay,
    Tree,
    ended_by,
    ending_all,
    fork,
    hear_in_popen,
    lift_limit,
    pause_for_ever,
    waiting,
)

from airflow.sdk.execution_time import child_tree
from airflow.sdk.execution_time.child_tree import (
    MARK_VARIABLE,
    Process,
    ProcessTree,
    compute_mark,
    has_limit,
    is_alive,
    list_pids,
    look_at,
    mark_process,
    read_process,
    send_signals,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_mock import MockerFixture

PR_SET_NAME = 15

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """End every process that a test has started, however it ends."""
    with ending_all():
        yield


def start_waiting(main: Callable[[], Any]) -> tuple[int, list[int]]:
    """Fork a child that runs ``main`` and then waits for signals; return its PID, and those that ``main`` returned."""

    def tell_and_wait() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever other tests have installed
        told.tell(main() or [])
        pause_for_ever()

    with contextlib.closing(Relay()) as told:
        return fork(tell_and_wait), told.hear()


def lead(*starts: Callable[[], int]) -> tuple[ProcessTree, int, list[int]]:
    """Fork a marked session leader that starts what it is told to; return its tree, its PID and theirs."""

    def main() -> list[int]:
        os.setsid()
        mark_process()
        return [start() for start in starts]

    pid, started = start_waiting(main)
    tree = ProcessTree()
    tree.adopt(pid)
    return tree, pid, started


def find(tree: ProcessTree) -> list[int]:
    return sorted(process.pid for process in tree.find())


def end(pid: int) -> None:
    """Kill a child alone, and collect it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def start_child() -> int:
    return subprocess.Popen(SLEEPER).pid


def start_session() -> int:
    return subprocess.Popen(SLEEPER, start_new_session=True).pid


def start_daemon(prepare: Callable[[], Any] = lambda: None, **kwargs: Any) -> int:
    """Start a process in a session of its own whose parent is gone."""

    def main() -> list[int]:
        os.setsid()
        prepare()
        return [subprocess.Popen(SLEEPER, **kwargs).pid]

    parent, [pid] = start_waiting(main)
    end(parent)
    return pid


def start_daemon_without_environment() -> int:
    return start_daemon(env={})


def start_daemon_without_mark() -> int:
    return start_daemon(lift_limit)


STARTS = [start_child, start_session, start_daemon, start_daemon_without_environment]


class TestFind:
    def test_everything_is_found(self) -> None:
        """A child, a session, a daemon, and one with an emptied environment; the leader itself is not among them."""
        tree, _, started = lead(*STARTS)
        assert find(tree) == sorted(started)

    def test_everything_is_found_when_the_leader_is_gone(self) -> None:
        """The same holds for what has lost its leader."""
        tree, leader, started = lead(*STARTS)
        end(leader)
        assert find(tree) == sorted(started)

    def test_opt_out(self) -> None:
        """A process that has detached with its limit lifted is not found; one that has detached alone is."""
        tree, _, [_, kept] = lead(start_daemon_without_mark, start_daemon)
        assert find(tree) == [kept]

    def test_descendants_are_remembered(self) -> None:
        """A child that has lost the mark, as through PAM, is the task's still when its parent is dead."""

        def start_session_without_mark() -> int:
            return subprocess.Popen(SLEEPER, start_new_session=True, preexec_fn=lift_limit).pid  # noqa: PLW1509

        tree, leader, started = lead(start_session_without_mark)
        tree.remember()
        end(leader)
        assert find(tree) == started

    def test_strangers_are_not_found(self) -> None:
        """Another leader's tree, a session of ours, and we ourselves are not in it."""
        tree, _, _ = lead()
        lead(*STARTS)
        start_session()
        assert find(tree) == []

    def test_older_process_is_not_found(self) -> None:
        """Whoever ran before the leader was not started by it, whatever its limits are."""
        older = start_session()
        time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # start times are counted in ticks
        tree, leader, _ = lead()
        mark = compute_mark(read_process(leader))
        resource.prlimit(older, resource.RLIMIT_RTTIME, (mark, resource.RLIM_INFINITY))
        assert has_limit(older, mark)
        assert find(tree) == []

    def test_recycled_leader(self) -> None:
        """The session of a process that has got the leader's number since is not the leader's."""
        tree, _, _ = lead(start_child)
        tree._leader = replace(tree._leader, start=tree._leader.start - 1)
        tree._mark = 1
        assert find(tree) == []

    def test_recycled_session(self) -> None:
        """When leader and session are gone, whoever has their number from then on is a stranger."""
        tree, leader, _ = lead()
        end(leader)
        assert find(tree) == []

        def open_session() -> list[int]:
            os.setsid()
            return [start_child()]

        stranger, [child] = start_waiting(open_session)
        end(stranger)
        tree._leader = replace(tree._leader, pid=stranger)
        assert os.getsid(child) == stranger
        assert find(tree) == []

    def test_leader_that_is_gone_before(self) -> None:
        """A leader that could not be adopted has no tree."""
        pid, _ = start_waiting(os.setsid)
        end(pid)
        tree = ProcessTree()
        tree.adopt(pid)
        assert find(tree) == []

    def test_leader_that_is_dead_before(self) -> None:
        """What a leader has left that is dead before it could be adopted, but not collected, belongs to it."""
        pid, [daemon] = start_waiting(lambda: (os.setsid(), mark_process(), [start_daemon()])[-1])
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        tree = ProcessTree()
        tree.adopt(pid)
        assert find(tree) == [daemon]

    def test_stranger_is_not_adopted(self) -> None:
        """A process that is not our child is neither marked nor looked at, whoever got its number wrong."""
        _, _, [stranger] = lead(start_child)
        before = resource.prlimit(stranger, resource.RLIMIT_RTTIME)
        tree = ProcessTree()
        tree.adopt(stranger)
        assert resource.prlimit(stranger, resource.RLIMIT_RTTIME) == before
        assert find(tree) == []

    def test_proc_of_another_namespace(self, mocker: MockerFixture) -> None:
        """Where /proc tells of somebody else under the leader's number, nobody is looked for."""
        pid, _ = start_waiting(lambda: (os.setsid(), [start_child()])[1])

        def read_another(number: int) -> Process | None:
            process = look_at(number)
            return replace(process, parent=2) if process and number == pid else process

        mocker.patch.object(child_tree, "look_at", autospec=True, side_effect=read_another)
        tree = ProcessTree()
        tree.adopt(pid)
        assert find(tree) == []
        assert tree.look_failure

    def test_leader_that_did_not_mark_itself(self) -> None:
        """A leader that was spawned is marked by its parent."""
        pid, _ = start_waiting(os.setsid)
        tree = ProcessTree()
        tree.adopt(pid)
        assert has_limit(pid, compute_mark(read_process(pid)))


class TestLook:
    """What is looked at again, and what is known for good."""

    def test_only_the_young_are_read_again(self, mocker: MockerFixture) -> None:
        """What ran before the leader, or is dead, is read once; what is the tree's, every time."""
        zombie, _ = start_waiting(lambda: None)
        os.kill(zombie, signal.SIGKILL)
        os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
        tree, leader, [child] = lead(start_child)
        assert find(tree) == [child]
        look = mocker.spy(child_tree, "look_at")
        assert find(tree) == [child]
        again = {call.args[0] for call in look.call_args_list}
        assert {leader, child} <= again
        assert not {zombie, os.getpid(), 1} & again

    def test_another_process_of_the_same_number_is_read(self, mocker: MockerFixture) -> None:
        """What is known for good of a process is not taken for true of its namesake."""
        tree, _, _ = lead()
        find(tree)
        own = os.getpid()
        renewed = [(pid, identity + (pid == own)) for pid, identity in list_pids()]
        mocker.patch.object(child_tree, "list_pids", autospec=True, return_value=renewed)
        look = mocker.spy(child_tree, "look_at")
        find(tree)
        assert own in {call.args[0] for call in look.call_args_list}

    def test_namesakes_are_told_apart(self) -> None:
        """The number that tells a process from its namesakes changes with the process."""

        def main() -> dict[str, Any]:
            pid = fork(pause_for_ever)
            identity = dict(list_pids())[pid]
            assert identity is not None
            assert dict(list_pids())[pid] == identity
            end(pid)
            fork_as(pid)
            assert dict(list_pids())[pid] not in (None, identity)
            return {}

        run_in_namespace(main)


class TestStop:
    def test_all_are_stopped(self) -> None:
        """When it returns, none of them can start another process; the leader runs unless told otherwise."""
        tree, leader, started = lead(*STARTS)
        assert sorted(process.pid for process in tree.stop(PATIENCE)) == sorted(started)
        assert all(read_process(pid).stopped for pid in started)
        assert not read_process(leader).stopped
        tree.stop(PATIENCE, with_leader=True)
        assert read_process(leader).stopped

    def test_children_come_before_their_parents(self) -> None:
        """A stopped group whose last tie to its session dies is continued: it must be as good as dead by then."""
        tree, leader, started = lead(*STARTS)
        stopped = tree.stop(PATIENCE, with_leader=True)
        assert [process.start for process in stopped] == sorted(
            (read_process(pid).start for pid in [leader, *started]), reverse=True
        )
        assert stopped[-1].pid == leader
        assert stopped.index(read_process(started[0])) > stopped.index(read_process(started[1]))

    def limit_time(self, mocker: MockerFixture, find: Callable[..., list[Process]]) -> None:
        """Have a tree find what ``find`` does, and fail if it goes on asking."""
        given_up_at = time.monotonic() + PATIENCE

        def find_in_time(tree: ProcessTree, **kwargs: bool) -> list[Process]:
            assert time.monotonic() < given_up_at
            return find(tree, **kwargs)

        mocker.patch.object(ProcessTree, "find", autospec=True, side_effect=find_in_time)

    def test_what_does_not_stop_is_not_waited_for(self, mocker: MockerFixture) -> None:
        """It does not wait for ever, as for a process that does not get to run."""
        tree, _, [pid] = lead(start_child)
        mocker.patch.object(child_tree, "send_signals", autospec=True, return_value=True)
        self.limit_time(mocker, ProcessTree.find)
        assert [process.pid for process in tree.stop(0.1)] == [pid]

    def test_time_is_limited_whatever_appears(self, mocker: MockerFixture) -> None:
        """Processes that cannot be stopped, and start others all the time, do not keep it from an end."""
        tree, _, [pid] = lead(start_child)
        process = read_process(pid)
        self.limit_time(mocker, lambda *_, **__: [replace(process, start=time.monotonic())])
        assert len(tree.stop(0.1)) == 1


class TestFallbacks:
    def test_limit_is_capped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hard limit below the mark, as a container or a service may have, leaves the variable."""
        monkeypatch.delenv(MARK_VARIABLE, raising=False)

        def main() -> list[int]:
            resource.setrlimit(resource.RLIMIT_RTTIME, (10**6, 10**6))
            os.setsid()
            mark_process()
            return [start_daemon()]

        leader, started = start_waiting(main)
        tree = ProcessTree()
        tree.adopt(leader)
        end(leader)
        assert find(tree) == started

    def test_without_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the limit cannot be set a variable marks whatever keeps its environment."""

        def refuse(*args: Any) -> None:
            raise PermissionError

        monkeypatch.setattr(resource, "setrlimit", refuse)
        monkeypatch.setattr(resource, "prlimit", refuse)
        monkeypatch.delenv(MARK_VARIABLE, raising=False)
        tree, leader, [daemon, _] = lead(start_daemon, start_daemon_without_environment)
        end(leader)
        assert find(tree) == [daemon]

    def test_without_prlimit(self, mocker: MockerFixture) -> None:
        """The limits of another user's process, which prlimit() denies, are read from /proc."""
        tree, leader, started = lead(*STARTS)
        end(leader)
        mocker.patch.object(resource, "prlimit", autospec=True, side_effect=PermissionError)
        assert find(tree) == sorted(started)

    def test_without_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Elsewhere than on Linux psutil knows the processes."""
        monkeypatch.setattr(child_tree, "PROC", str(tmp_path / "missing"))
        own = read_process(os.getpid())
        assert own is not None
        assert (own.pid, own.parent, own.session) == (os.getpid(), os.getppid(), os.getsid(0))
        tree, leader, started = lead(start_child, start_session, start_daemon)
        assert find(tree) == sorted(started)
        assert read_process(leader) is not None
        end(leader)
        assert read_process(leader) is None

    @pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError, PermissionError])
    def test_entries_that_vanish_or_are_hidden(self, error: type[OSError]) -> None:
        """A process that ends between the listing and the look, or that hidepid hides, is left out."""
        tree, _, [hidden, seen] = lead(start_child, start_child)

        def refuse(path: str, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(f"/proc/{hidden}/"):
                raise error
            return original(path, *args, **kwargs)

        original = os.open
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(os, "open", refuse)
            found = find(tree)
        assert found == [seen]


class TestReadProcess:
    def test_any_name(self) -> None:
        """A name may hold parentheses, blanks and newlines."""
        name = b"a) Z 1\n(b"
        pid, _ = start_waiting(lambda: ctypes.CDLL(None).prctl(PR_SET_NAME, name) and [])
        process = read_process(pid)
        assert process is not None
        assert (process.name, process.parent, process.session) == (name.decode(), os.getpid(), os.getsid(0))

    def test_zombie(self) -> None:
        """A zombie is dead, whether or not somebody collects it."""
        pid, _ = start_waiting(lambda: None)
        assert read_process(pid) is not None
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert read_process(pid) is None
        assert look_at(pid).dead

    def test_process_without_its_first_thread(self) -> None:
        """A process lives on in its other threads, although its state says zombie."""

        def main() -> None:
            threading.Thread(target=time.sleep, args=(600,)).start()
            told.tell("started")
            ctypes.CDLL(None).pthread_exit(None)

        with contextlib.closing(Relay()) as told:
            pid = fork(main)
            assert told.hear() == "started"
        deadline = time.monotonic() + PATIENCE
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
        assert read_process(pid) is not None


class TestSendSignal:
    @pytest.mark.parametrize("pidfd", ["works", errno.ENOSYS, errno.EMFILE, None])
    def test_process_gets_it(self, monkeypatch: pytest.MonkeyPatch, pidfd: Any) -> None:
        """It does so with and without a pidfd."""

        def refuse(pid: int, flags: int = 0) -> int:
            raise OSError(pidfd, "refused")

        pid, _ = start_waiting(lambda: None)
        process = read_process(pid)
        with contextlib.closing(Tree()) as held:
            held.add(pid)
            if pidfd is None:
                monkeypatch.delattr(os, "pidfd_open")
            elif pidfd != "works":
                monkeypatch.setattr(os, "pidfd_open", refuse)
            assert send_signals(process, [signal.SIGTERM])
            assert held.gone(pid)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
        assert send_signals(process, [signal.SIGTERM]), "it is gone, which nobody needs to hear of"
        assert not is_alive(process)

    def test_recycled_number(self) -> None:
        """Whoever has got the number since is not signalled."""
        pid, _ = start_waiting(lambda: None)
        former = read_process(pid)
        assert send_signals(replace(former, start=former.start - 1), [signal.SIGKILL])
        assert is_alive(former)

    def test_descriptors_are_closed(self) -> None:
        """It leaves none behind."""
        pid, _ = start_waiting(lambda: None)
        before = sorted(os.scandir("/proc/self/fd"), key=lambda entry: entry.name)
        send_signals(read_process(pid), [signal.SIGCONT])
        after = sorted(os.scandir("/proc/self/fd"), key=lambda entry: entry.name)
        assert len(before) == len(after)


class TestSudo:
    """Processes of another user, for which the kernel answers EPERM."""

    @pytest.fixture(autouse=True)
    def deny(self, mocker: MockerFixture) -> None:
        mocker.patch.object(child_tree, "send_signals", autospec=True, return_value=False)

    @pytest.fixture(autouse=True)
    def patient(self, mocker: MockerFixture) -> None:
        """Let a sudo that answers take as long as it does on a busy machine."""
        mocker.patch.object(child_tree, "SUDO_TIMEOUT", PATIENCE)

    def install_sudo(self, monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        write_sudo(folder, script)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    @contextlib.contextmanager
    def hanging_sudo(self, folder: Path, says: str) -> Iterator[list[Any]]:
        """Have sudo say something and hang, from when on it is timed; yields the list of what its calls have said."""
        with contextlib.closing(Relay()) as told, pytest.MonkeyPatch.context() as patching:
            self.install_sudo(
                patching, folder, f"echo {says} >/proc/{os.getpid()}/fd/{told.writer}; exec sleep 600"
            )
            patching.setattr(child_tree, "SUDO_TIMEOUT", 0.1)
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

    def test_as_root_where_not_as_the_user(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that permits to kill as root alone is no failure."""
        self.install_sudo(monkeypatch, tmp_path, '[ "$2" = kill ] || exit 1')
        tree, _, _ = lead(start_child)
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {}

    def test_process_that_ends_meanwhile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Kill fails when one of many is gone; that is no refusal, and sudo is asked again for the rest."""
        tree, _, [polite, _] = lead(start_child, start_child)
        wait = f"until grep -q '^State:.Z' /proc/{polite}/status; do :; done"
        self.install_sudo(
            monkeypatch, tmp_path, f"kill -9 {polite}; {wait}; echo No such process >&2; exit 1"
        )
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {}

    def test_failure_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What sudo says when it does not permit it is there to be logged."""
        self.install_sudo(monkeypatch, tmp_path, "echo a password is required >&2; exit 1")
        tree, _, _ = lead(start_child)
        tree.signal(tree.find(), signal.SIGTERM)
        assert tree.sudo_failures == {os.geteuid(): "a password is required"}

    def test_one_failure_is_enough(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A sudo that may not is not asked again, which every time would be logged and take its time."""
        self.install_sudo(monkeypatch, tmp_path, f"echo call >>{tmp_path}/calls; exit 1")
        tree, _, _ = lead(start_child)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            tree.signal(tree.find(), sig)
        assert (tmp_path / "calls").read_text() == "call\n" * 2, "as the user, and as root"
        assert tree.sudo_failures == {os.geteuid(): "sudo ended with 1"}

    def test_failure_of_one_user_is_not_all_users(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mocker: MockerFixture
    ) -> None:
        """The sudoers may permit one user and not another."""
        self.install_sudo(
            monkeypatch, tmp_path, f'echo "$3 $4 $5" >>{tmp_path}/calls; [ "$3" = "#4712" ] || exit 1'
        )
        tree, _, _ = lead(start_child, start_child)
        one, other = tree.find()
        by_owner = {4711: [one], 4712: [other]}
        mocker.patch.object(child_tree, "group_by_owner", autospec=True, return_value=by_owner)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            tree.signal([one, other], sig)
        calls = (tmp_path / "calls").read_text().splitlines()
        assert [call for call in calls if call.startswith("#4712")] == ["#4712 kill -15", "#4712 kill -9"]
        assert list(tree.sudo_failures) == [4711]

    def test_sudo_that_hangs(self, tmp_path: Path) -> None:
        """It is not waited for, nor asked again but for the SIGKILL, for it may have been slow just once."""
        tree, _, _ = lead(start_child)
        with self.hanging_sudo(tmp_path, '"$5"') as calls:
            for sig in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
                tree.signal(tree.find(), sig)
        assert calls == [-signal.SIGTERM, -signal.SIGKILL]
        assert tree.sudo_failures == {os.geteuid(): child_tree.SUDO_TIMED_OUT}

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


class TestMark:
    def test_no_two_are_alike(self) -> None:
        """It is a limit that is never reached, and differs with the PID and with the start."""
        process = read_process(os.getpid())
        marks = {
            compute_mark(replace(process, pid=pid, start=start))
            for pid in (2, 3, 1 << 21)
            for start in (0, 1, 1 << 36)
        }
        assert len(marks) == 9
        assert all(1 << 62 <= mark < 1 << 63 for mark in marks)


class TestInterrupted:
    @pytest.mark.parametrize("look", [2, 3])
    def test_nothing_stays_stopped(self, monkeypatch: pytest.MonkeyPatch, look: int) -> None:
        """An exception between SIGSTOP and SIGKILL does not keep those from being killed that were stopped."""

        def lead() -> None:
            os.setsid()
            relay.tell(fork(pause_for_ever))

        def interrupt(**kwargs: Any) -> list[Process]:
            looks.append(kwargs)
            if len(looks) == look:
                raise KeyboardInterrupt
            return find(**kwargs)

        looks: list[Any] = []
        with contextlib.closing(Relay()) as relay, contextlib.closing(Tree()) as held, waiting(lead) as pid:
            child = held.add(relay.hear())
            tree = ProcessTree()
            tree.adopt(pid)
            find = tree.find
            monkeypatch.setattr(tree, "find", interrupt)
            with pytest.raises(KeyboardInterrupt):
                tree.kill_all(PATIENCE, with_leader=True)
            assert held.gone(child)
            assert ended_by(pid) == signal.SIGKILL
