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
A task ends completely, whatever the kernel or other code in the supervisor's process does.

Each fault comes to a real supervisor of a real task. None ends in a traceback or hurts the bystander in the
supervisor's group, and whatever is left all the same is named in the task's log.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import resource
import signal
import threading
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from task_sdk.execution_time.teardown.supervised.faults import (
    NOISE,
    WAYS,
    be_deaf_runner,
    become_nobody,
    end_supervised,
    forbid_pidfd,
    fork_as,
    lack,
    misbehave,
    mount_proc,
    refuse_sigterm,
    supervise,
    supervise_in_namespace,
)
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    GRACE_WITH_FAULTS,
    NEVER,
    Api,
    Relay,
    be_deaf,
    be_polite,
    conflict,
    detach,
    exec_sleeper,
    fork,
    hear_ready,
    in_turn,
    keep_open,
    kill_child,
    lift_limit,
    list_descriptors,
    list_living,
    make_zombie,
    pause_for_ever,
    start_task,
    wait_to_end,
)

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.teardown import leftovers, process_tree, processes
from airflow.sdk.execution_time.teardown.stop_request import catch_stop_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from airflow.sdk.execution_time.supervisor import ActivitySubprocess

pytestmark = pytest.mark.usefixtures("faulty_surroundings")

KILL_TIME = leftovers.KILL_TIME


FAILURES = [
    ("os.getpgid", errno.EPERM),
    ("os.getpgid", errno.ESRCH),
    ("os.kill", errno.EPERM),
    ("os.kill", errno.ESRCH),
    ("os.killpg", errno.EPERM),
    ("os.killpg", errno.ESRCH),
    ("os.pidfd_open", errno.EMFILE),
    ("os.pidfd_open", errno.ESRCH),
    ("os.waitid", errno.EPERM),
    ("resource.prlimit", errno.EPERM),
    ("resource.prlimit", errno.ESRCH),
    ("signal.pidfd_send_signal", errno.EPERM),
    ("signal.pidfd_send_signal", errno.ESRCH),
]
TIMES = {"first": {1}, "second": {2}, "all": None}
STARTS = 10
"""Of which the parent is first with most, if it makes its children group leaders."""

HOPELESS = ("signal.pidfd_send_signal", "all")
"""What leaves no way to signal a process of the task other than its runner."""


class TestCalls:
    """System calls that fail once, several times, or always."""

    @pytest.fixture
    def usual_kill_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wait no longer than the product does for what does not end."""
        monkeypatch.setattr(leftovers, "KILL_TIME", KILL_TIME)

    @pytest.mark.parametrize("way", ["conflict", "killed"])
    @pytest.mark.parametrize(
        ("call", "error", "which"),
        [(*failure, which) for failure in FAILURES for which in TIMES if (failure[0], which) != HOPELESS],
        ids=lambda value: errno.errorcode.get(value, value),
    )
    def test_failing_call(self, relay: Relay, call: str, error: int, which: str, way: str) -> None:
        """There is another way, or another time: nothing is left, and nothing said to be."""
        outcome = end_supervised(relay, way, after=lambda *_: misbehave(call, error, times=TIMES[which]))
        assert outcome.left == outcome.name_survivors() == []
        assert outcome.seconds < GRACE_WITH_FAULTS + 1 + NOISE

    @pytest.mark.usefixtures("usual_kill_time")
    @pytest.mark.parametrize("way", ["conflict", "killed"])
    @pytest.mark.parametrize("error", [errno.EPERM, errno.ESRCH], ids=errno.errorcode.get)
    def test_hopeless_call(self, relay: Relay, error: int, way: str) -> None:
        """The log says what could not be ended."""
        call, which = HOPELESS
        outcome = end_supervised(relay, way, after=lambda *_: misbehave(call, error, times=TIMES[which]))
        assert outcome.left == outcome.name_survivors() == [outcome.daemon]
        assert outcome.seconds < GRACE_WITH_FAULTS + 1 + NOISE

    @pytest.mark.parametrize("error", [errno.EPERM, errno.ESRCH], ids=errno.errorcode.get)
    def test_nobody_can_be_told_to_end(self, relay: Relay, error: int) -> None:
        """A task that is beyond SIGTERM, like that of another user, gets SIGKILL in its time."""
        outcome = end_supervised(relay, "conflict", after=lambda *_: refuse_sigterm(error))
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL

    @pytest.mark.usefixtures("usual_kill_time")
    @pytest.mark.parametrize("way", WAYS)
    def test_survivor_is_named(self, relay: Relay, way: str) -> None:
        """A process that SIGKILL does not end, as in an uninterruptible sleep, costs one error and a second."""

        def spare(_: ActivitySubprocess, pid: int) -> None:
            send = processes.send_signals

            def drop(process: processes.Process, signals: Iterable[int]) -> bool | None:
                return process.pid == pid or send(process, signals)

            process_tree.send_signals = mock.create_autospec(send, side_effect=drop)

        outcome = end_supervised(relay, way, after=spare)
        assert len(outcome.find("error", "could not be ended")) == 1
        assert outcome.name_survivors() == outcome.left == [outcome.daemon]
        assert outcome.seconds < GRACE_WITH_FAULTS + 1 + NOISE


class TestPidfd:
    """No pidfd: a kernel before 5.3, a sandbox that does not know of it, or a Python without it."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("daemon", [be_polite, be_deaf], ids=lambda daemon: daemon.__name__)
    @pytest.mark.parametrize("how", ["absent", "ENOSYS"])
    def test_nothing_is_left(self, relay: Relay, daemon: Callable[[Relay], None], way: str, how: str) -> None:
        """Processes are signalled by their PID, and their ends are polled for."""
        outcome = end_supervised(relay, way, daemon, before=lambda: forbid_pidfd(how))
        assert outcome.left == []
        assert not outcome.find("error", "could not be ended")

    @pytest.mark.parametrize("how", ["absent", "ENOSYS", "EPERM"])
    def test_exit_is_noticed(self, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        """The supervisor looks by itself, long before the next heartbeat."""
        monkeypatch.setattr(supervisor, "MIN_HEARTBEAT_INTERVAL", NEVER)
        monkeypatch.setattr(supervisor, "HEARTBEAT_TIMEOUT", NEVER)
        reader, writer = os.pipe()

        def target() -> None:
            keep_open(reader)
            os.read(reader, 1)
            os._exit(3)

        def main() -> dict[str, Any]:
            forbid_pidfd(how)
            process = start_task(target)
            while len(process._open_sockets):
                process._service_subprocess(max_wait_time=0.05)
            os.write(writer, b".")
            return {"code": process.wait(), "log": []}

        assert supervise(main).code == 3
        os.close(reader)
        os.close(writer)


class TestMark:
    """No limit to serve as the mark of a task: macOS, or a sandbox that refuses the calls."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("how", ["absent", "refused"])
    def test_variable_serves(self, relay: Relay, way: str, how: str) -> None:
        """An environment variable marks what runs other programs."""

        def forbid() -> None:
            if how == "absent":
                lack("resource.RLIMIT_RTTIME")
                lack("resource.prlimit")
            else:
                misbehave("resource.prlimit", errno.EPERM, spares_children=False)

        outcome = end_supervised(relay, way, exec_sleeper, before=forbid)
        assert outcome.left == []
        assert outcome.find("warning", "left running")


def exec_shell(relay: Relay) -> None:
    """Be a daemon that runs another program, which opens its entry in /proc again."""
    os.dup2(relay.writer, 9)  # a shell may not know of more
    os.execv("/bin/sh", ["sh", "-c", "echo $$ >&9; exec sleep 600"])  # noqa: S606


class TestProc:
    """Entries of /proc that are hidden, or vanish."""

    @pytest.mark.parametrize("way", WAYS)
    def test_processes_that_come_and_go(self, relay: Relay, way: str) -> None:
        """Some are gone when they are looked at that were there when /proc was listed."""

        def churn() -> None:
            while True:
                os.waitpid(fork(lambda: None), 0)

        outcome = end_supervised(relay, way, before=lambda: fork(churn))
        assert outcome.daemon not in outcome.left
        assert len(outcome.left) <= 2, "the bystander that forks, and its child"

    @pytest.mark.parametrize("way", WAYS)
    def test_processes_that_cannot_be_read(self, relay: Relay, way: str) -> None:
        """An unprivileged supervisor and its task may be closed to each other (prctl(2), PR_SET_DUMPABLE)."""
        outcome = end_supervised(relay, way, setting=become_nobody)
        assert outcome.left == []

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("daemon", [be_polite, be_deaf, exec_shell], ids=lambda daemon: daemon.__name__)
    def test_hidepid(self, relay: Relay, daemon: Callable[[Relay], None], way: str) -> None:
        """Nothing is left where even the entries of an unprivileged supervisor's own task are closed to it."""

        def hide() -> None:
            mount_proc(b"hidepid=1")
            become_nobody()
            assert processes.read_process(1) is None

        outcome = end_supervised(relay, way, daemon, setting=hide)
        assert outcome.left == []
        assert not outcome.find("error", "could not")


class TestSession:
    """A runner that gets no session."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
    def test_no_session(self, relay: Relay, error: int, way: str) -> None:
        """It shares the group of its supervisor, which is not signalled."""
        refuse = functools.partial(misbehave, "os.setsid", error, times={1, 2}, spares_children=False)
        outcome = end_supervised(relay, way, before=refuse)
        assert outcome.left == []


class TestDescriptors:
    """No file descriptor is left in the supervisor's process."""

    @pytest.mark.parametrize("way", WAYS)
    def test_nothing_is_left(self, relay: Relay, way: str) -> None:
        """All that the task has started is found and ended all the same."""

        def use_up(*_: Any) -> None:
            limit = (max(list_descriptors()) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            with contextlib.suppress(OSError):
                while True:
                    os.dup(relay.reader)

        # As supervise() does, before there is a task.
        catching = catch_stop_signals()
        outcome = end_supervised(relay, way, before=catching.__enter__, after=use_up)
        assert outcome.left == []
        assert not outcome.find("error", "could not")

    def test_nothing_can_be_looked_for(self, relay: Relay) -> None:
        """The task's log says so; its group has ended all the same."""

        def forbid(*_: Any) -> None:
            misbehave("os.scandir", errno.EMFILE)

        outcome = end_supervised(relay, "conflict", after=forbid)
        [error] = outcome.find("error", "could not be looked for")
        assert error["reason"] == os.strerror(errno.EMFILE)
        assert outcome.left == [outcome.daemon]


class TestRequests:
    """What the task's processes ask of the supervisor while they are being ended."""

    def test_nonsense(self, relay: Relay) -> None:
        """A daemon that writes anything into the socket for requests is ended all the same."""

        def babble(*_: Any) -> None:
            os.write(0, b"\x00\x00\x00\x02\xc1\n" * 2)

        def be_babbler(relay: Relay) -> None:
            signal.signal(signal.SIGTERM, babble)
            relay.tell(os.getpid())

        outcome = end_supervised(relay, "killed", be_babbler)
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL


class TestStolenStatus:
    """Somebody else in the supervisor's process collects the runner."""

    @pytest.mark.parametrize("way", WAYS)
    def test_child_signal_ignored(self, relay: Relay, way: str) -> None:
        """With SIGCHLD ignored the kernel itself does (waitpid(2))."""
        ignore = functools.partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN)
        outcome = end_supervised(relay, way, before=ignore)
        assert outcome.left == []
        assert outcome.code == 1

    @pytest.mark.parametrize("way", WAYS)
    def test_thread_waits(self, relay: Relay, way: str) -> None:
        """Whether a thread or the supervisor gets the status is a matter of chance; the code is not 0 either way."""

        def collect(process: ActivitySubprocess, _: int) -> None:
            threading.Thread(target=os.waitpid, args=(process.pid, 0), daemon=True).start()

        outcome = end_supervised(relay, way, after=collect)
        assert outcome.left == []
        assert outcome.code

    def test_exit_after_the_look(self, relay: Relay) -> None:
        """A runner that ends when the supervisor has just seen it run is looked at again before it is collected."""

        def leave_stray() -> None:
            # Only the session of its runner ties it to the task.
            stray = in_turn(lift_limit, lambda: ready.tell("ready"), pause_for_ever)
            os.waitpid(fork(lambda: fork(stray)), 0)
            ready.hear()

        def look_too_early(child: int) -> bool:
            process_tree.is_unreaped_zombie = is_unreaped_zombie
            make_zombie(child)
            return False

        def prepare() -> None:
            process_tree.is_unreaped_zombie = mock.create_autospec(
                is_unreaped_zombie, side_effect=look_too_early
            )

        is_unreaped_zombie = process_tree.is_unreaped_zombie
        with contextlib.closing(Relay()) as ready:
            outcome = end_supervised(relay, "signalled", runner=leave_stray, after=lambda *_: prepare())
        assert outcome.left == []
        assert outcome.code == -signal.SIGKILL

    def test_collected_before_the_kill(self, relay: Relay) -> None:
        """The runner is collected just before the server says that it should be killed."""

        class Slow(Api):
            def heartbeat(self, _id: Any, pid: int) -> None:
                kill_child(pid)
                raise conflict()

        outcome = end_supervised(relay, "conflict", api=Slow())
        assert outcome.left == []
        assert outcome.code == 1


class TestKill:
    """kill() while kill() is under way."""

    def test_kill_within_kill(self, relay: Relay) -> None:
        """A signal handler may kill the task, and the next one again."""

        def keep_killing(process: ActivitySubprocess, _: int) -> None:
            def kill_again(*_: Any) -> None:
                if next(kills) < 5:
                    signal.setitimer(signal.ITIMER_REAL, GRACE_WITH_FAULTS / 10)
                process.kill(signal.SIGTERM, force=True)

            kills = itertools.count()
            signal.signal(signal.SIGALRM, kill_again)
            signal.setitimer(signal.ITIMER_REAL, GRACE_WITH_FAULTS / 2)

        outcome = end_supervised(relay, "conflict", runner=be_deaf_runner, after=keep_killing)
        assert outcome.left == []
        # A handler may collect the status for which it has interrupted somebody, who then does not know it.
        assert outcome.code in (-signal.SIGKILL, 1)

    def test_kill_when_the_exit_is_noticed(self, relay: Relay) -> None:
        """A handler that runs as select() returns takes from it what it has found."""

        def interrupt(process: ActivitySubprocess, _: int) -> None:
            select = process.selector.select

            def select_and_kill(timeout: float | None = None) -> Any:
                events = select(timeout)
                patching.stop()
                process.kill(signal.SIGTERM)
                return events

            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            patching = mock.patch.object(
                process.selector, "select", autospec=True, side_effect=select_and_kill
            )
            patching.start()

        outcome = end_supervised(relay, "failed", after=interrupt)
        assert outcome.left == []
        assert outcome.code == 1


class TestNamespace:
    def test_group_without_a_number(self, relay: Relay) -> None:
        """A supervisor whose own group has no number in its PID namespace, as under unshare, gives each task a session."""

        def main() -> dict[str, Any]:
            assert os.getpgid(0) == 0
            sessions = []
            for _ in range(STARTS):
                process = start_task(lambda: wait_to_end(relay))
                relay.hear()
                sessions.append(os.getsid(process.pid) == process.pid)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            return {"code": 0, "log": sessions, "left": list_living()}

        outcome = supervise_in_namespace(main)
        assert outcome.left == []
        assert outcome.log == [True] * STARTS


class TestRecycledNumber:
    """A process that belongs to nobody here gets the number of one that has just ended."""

    def test_leftover(self, relay: Relay) -> None:
        """It does so between the look and the signal, which spares it."""

        def main() -> dict[str, Any]:
            send = processes.send_signals

            def replace_and_send(victim: processes.Process, signals: Iterable[int]) -> bool | None:
                process_tree.send_signals = send
                os.kill(daemon, signal.SIGKILL)
                os.waitpid(daemon, 0)  # the first process of a namespace adopts its orphans
                fork_as(daemon)
                return send(victim, signals)

            process = start_task(
                in_turn(lambda: detach(lambda: be_polite(relay)), lambda: wait_to_end(relay))
            )
            [daemon] = hear_ready(relay)
            process_tree.send_signals = mock.create_autospec(send, side_effect=replace_and_send)
            os.kill(process.pid, signal.SIGKILL)
            code = process.wait()
            return {"code": code, "log": [], "left": list_living(), "number": daemon}

        outcome = supervise_in_namespace(main)
        assert outcome.left == [outcome.number]

    def test_leader(self, relay: Relay) -> None:
        """The runner is collected by somebody else, and a session leader has its number when it is to be killed."""

        def main() -> dict[str, Any]:
            class Slow(Api):
                def heartbeat(self, _id: Any, pid: int) -> None:
                    kill_child(pid)
                    # Not a child of ours, for then psutil would collect it.
                    fork(in_turn(lambda: fork_as(pid), lambda: relay.tell("replaced"), pause_for_ever))
                    assert relay.hear() == "replaced"
                    raise conflict()

            process = start_task(
                in_turn(lambda: detach(lambda: be_polite(relay)), lambda: wait_to_end(relay)), Slow()
            )
            hear_ready(relay)
            code = process.wait()
            return {"code": code, "log": [], "left": list_living(), "number": process.pid}

        outcome = supervise_in_namespace(main)
        assert outcome.number in outcome.left
        assert len(outcome.left) == 2, "the stranger, and its parent"
