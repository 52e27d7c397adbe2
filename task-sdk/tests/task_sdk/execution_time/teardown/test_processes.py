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
import signal
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    Relay,
    Tree,
    fork,
    list_pending,
    make_zombie,
    pause_for_ever,
    set_name,
)
from task_sdk.execution_time.teardown.trees import lead, read, start_child, start_waiting

from airflow.sdk.execution_time.teardown.processes import (
    is_alive,
    is_in_own_namespace,
    look_at,
    read_process,
    send_signals,
)

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


pytestmark = pytest.mark.usefixtures("list_left")


class TestReadProcess:
    def test_any_name(self) -> None:
        """A name may hold parentheses, blanks and newlines."""
        name = b"a) Z 1\n(b"
        pid, _ = start_waiting(lambda: set_name(name))
        process = read_process(pid)
        assert process is not None
        assert (process.name, process.parent, process.session) == (name.decode(), os.getpid(), os.getsid(0))

    def test_name_that_is_no_text(self) -> None:
        """A sweep looks for the namespace of whatever was condemned; a name of any bytes does not end it."""
        pid, _ = start_waiting(lambda: set_name(b"\xff"))
        assert is_in_own_namespace(pid)

    def test_zombie(self) -> None:
        """A zombie is dead, whether or not somebody collects it."""
        pid, _ = start_waiting(lambda: None)
        assert read_process(pid) is not None
        make_zombie(pid)
        assert read_process(pid) is None
        zombie = look_at(pid)
        assert zombie
        assert zombie.dead

    def test_process_without_its_first_thread(self) -> None:
        """A process lives on in its other threads, although its state says zombie."""

        def main() -> None:
            threading.Thread(target=pause_for_ever).start()
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
    def test_process_gets_it(
        self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, pidfd: Any
    ) -> None:
        """It does so with and without a pidfd."""
        pid, _ = start_waiting(lambda: None)
        process = read(pid)
        with contextlib.closing(Tree()) as held:
            held.add(pid)
            if pidfd is None:
                monkeypatch.delattr(os, "pidfd_open")
            elif pidfd != "works":
                mocker.patch.object(os, "pidfd_open", autospec=True, side_effect=OSError(pidfd, "refused"))
            assert send_signals(process, [signal.SIGTERM])
            assert held.gone(pid)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
        assert send_signals(process, [signal.SIGTERM]) is None
        assert not is_alive(process)

    @pytest.mark.parametrize("pidfd", [True, False])
    def test_recycled_number(self, monkeypatch: pytest.MonkeyPatch, *, pidfd: bool) -> None:
        """Whoever has got the number since is not signalled."""
        pid, _ = start_waiting(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) and [])
        present = read(pid)
        if not pidfd:
            monkeypatch.delattr(os, "pidfd_open")
        assert send_signals(replace(present, start=present.start - 1), [signal.SIGTERM]) is None
        assert list_pending(pid) == 0
        assert send_signals(present, [signal.SIGTERM])
        assert list_pending(pid) == 1 << signal.SIGTERM - 1

    @pytest.mark.parametrize("pidfd", [True, False])
    def test_denied(self, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, *, pidfd: bool) -> None:
        """A signal that is not allowed is told to the caller, who may have somebody else send it."""
        if not pidfd:
            monkeypatch.delattr(os, "pidfd_open")
        mocker.patch.object(
            *((signal, "pidfd_send_signal") if pidfd else (os, "kill")),
            autospec=True,
            side_effect=PermissionError,
        )
        assert send_signals(read(os.getpid()), [signal.SIGCONT]) is False

    def test_record(self) -> None:
        """Who has ended before its signal is not among those that were ended by it."""
        tree, _, [child, other] = lead(start_child, start_child)
        members = tree.find()
        with contextlib.closing(Tree()) as held:
            held.add(child)
            os.kill(child, signal.SIGKILL)
            assert held.gone(child)
        tree.signal(members, signal.SIGTERM)
        assert [process.pid for process in tree.end_signals] == [other]

    def test_every_signal(self) -> None:
        """A stopped process is told to end, and continued so that it can."""
        tree, _, [pid] = lead(start_child)
        tree.stop(PATIENCE)
        with contextlib.closing(Tree()) as held:
            held.add(pid)
            tree.signal(tree.find(), signal.SIGTERM, signal.SIGCONT)
            assert held.gone(pid)

    def test_descriptors_are_closed(self) -> None:
        """It leaves none behind."""
        pid, _ = start_waiting(lambda: None)
        before = sorted(os.scandir("/proc/self/fd"), key=lambda entry: entry.name)
        send_signals(read(pid), [signal.SIGCONT])
        after = sorted(os.scandir("/proc/self/fd"), key=lambda entry: entry.name)
        assert len(before) == len(after)
