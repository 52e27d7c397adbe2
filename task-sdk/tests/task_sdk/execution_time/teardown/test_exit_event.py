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

import errno
import os
import selectors
import signal
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import NEVER, PATIENCE, fork, in_turn

from airflow.sdk.execution_time.teardown import exit_event
from airflow.sdk.execution_time.teardown.exit_event import ExitWatch, release_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_mock import MockerFixture


class Child:
    """A child that exits when told to, and holds one end of ``socket`` open until then."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        self.socket, theirs = socket.socketpair()
        self.pid = fork(in_turn(lambda: os.close(self._writer), lambda: os.read(reader, 1)))
        os.close(reader)
        theirs.close()

    def finish(self) -> None:
        os.write(self._writer, b".")

    def exited(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> None:
        os.close(self._writer)
        self.socket.close()
        # Nobody but this collects the child, so the number is still its own.
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


@pytest.fixture
def selector() -> Iterator[FinishingSelector]:
    with FinishingSelector() as selector:
        yield selector


class FinishingSelector(selectors.DefaultSelector):
    """Has a child finish when it comes to wait."""

    finishing: Child | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        child, self.finishing = self.finishing, None
        if child is not None:
            child.finish()
        return super().select(timeout)


def deny(monkeypatch: pytest.MonkeyPatch, pidfd: str) -> None:
    """Make the kernel one that has no pidfd, has none left, or a Python that does not know of it."""
    if pidfd == "AttributeError":
        monkeypatch.delattr(os, "pidfd_open")
    else:
        number = getattr(errno, pidfd)
        error = OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "pidfd_open", create_autospec(os.pidfd_open, side_effect=error))


class TestExitWatch:
    @pytest.mark.parametrize("pidfd", ["works", "ENOSYS", "EMFILE", "AttributeError"])
    def test_exit_ends_the_wait(
        self, child: Child, selector: FinishingSelector, monkeypatch: pytest.MonkeyPatch, pidfd: str
    ) -> None:
        """The exit ends select() long before its timeout, also where there is no pidfd, and is no event itself."""
        if pidfd != "works":
            deny(monkeypatch, pidfd)
        watch = ExitWatch()
        watch.start(selector, child.pid)
        selector.finishing = child
        deadline = time.monotonic() + PATIENCE
        assert watch.select(selector, timeout=PATIENCE, exit_code=None) == []
        while not child.exited():
            watch.select(selector, timeout=PATIENCE, exit_code=None)
        assert time.monotonic() < deadline
        watch.close(selector)
        assert not selector.get_map()

    def test_traced_child_is_polled_for(self, child: Child, selector: selectors.BaseSelector) -> None:
        """After the event the pidfd is gone: it stays readable, and select() would spin until the exit is collected."""
        watch = ExitWatch()
        watch.start(selector, child.pid)
        child.finish()
        watch.select(selector, timeout=PATIENCE, exit_code=None)
        assert not selector.get_map()
        watch.expect_exit(PATIENCE)
        started = time.monotonic()
        watch.select(selector, timeout=PATIENCE, exit_code=None)
        assert time.monotonic() - started >= exit_event.IMMINENT_EXIT_POLL_INTERVAL / 2

    def test_wait_after_the_event_is_short(
        self, child: Child, selector: selectors.BaseSelector, mocker: MockerFixture
    ) -> None:
        """Nobody tells when a tracer has collected the child: it is looked for every second at least."""
        watch = ExitWatch()
        watch.start(selector, child.pid)
        child.finish()
        watch.select(selector, timeout=PATIENCE, exit_code=None)
        select = mocker.patch.object(selector, "select", autospec=True, return_value=[])
        watch.select(selector, timeout=PATIENCE, exit_code=None)
        [call] = select.mock_calls
        assert 0 < call.kwargs["timeout"] <= 1

    def test_one_is_followed_at_a_time(self, child: Child, selector: selectors.BaseSelector) -> None:
        """Whoever follows another gives up the one before, and its file descriptor."""
        watch = ExitWatch()
        watch.start(selector, child.pid)
        for _ in range(2):
            assert watch.follow(selector, child.pid)
            assert len(selector.get_map()) == 1
        watch.unfollow(selector)
        assert not selector.get_map()

    def test_socket_events_pass(self, child: Child, selector: selectors.BaseSelector) -> None:
        """The events of sockets come through, with what the selector keeps for them."""
        selector.register(child.socket, selectors.EVENT_READ, "data")
        watch = ExitWatch()
        watch.start(selector, child.pid)
        child.finish()
        [(key, _)] = watch.select(selector, timeout=PATIENCE, exit_code=None)
        assert key.data == "data"
        watch.close(selector)

    def test_without_start_nothing_is_watched(self, selector: selectors.BaseSelector) -> None:
        """A subprocess type that does not start the watch selects as before."""
        watch = ExitWatch()
        assert watch.select(selector, timeout=0.01, exit_code=None) == []
        assert not selector.get_map()
        watch.close(selector)

    @pytest.mark.parametrize("pidfd", ["works", "ENOSYS"])
    def test_closed_selector(
        self, child: Child, selector: selectors.BaseSelector, monkeypatch: pytest.MonkeyPatch, pidfd: str
    ) -> None:
        """A loop whose selector was closed still waits for the exit, and does not spin."""
        if pidfd != "works":
            deny(monkeypatch, pidfd)
        watch = ExitWatch()
        watch.start(selector, child.pid)
        selector.close()
        began = time.monotonic()
        assert watch.select(selector, timeout=0.04, exit_code=None) == []
        assert time.monotonic() - began >= 0.04
        child.finish()
        deadline = time.monotonic() + PATIENCE
        while not child.exited():
            assert watch.select(selector, timeout=PATIENCE, exit_code=None) == []
        assert time.monotonic() < deadline
        watch.close(selector)

    def test_close_twice(self, child: Child, selector: selectors.BaseSelector) -> None:
        """The first close gives the file descriptor back, and the second does nothing."""
        watch = ExitWatch()
        before = os.listdir("/proc/self/fd")
        watch.start(selector, child.pid)
        watch.close(selector)
        watch.close(selector)
        assert os.listdir("/proc/self/fd") == before

    def test_sockets_are_overdue_after_the_grace_of_a_kill(self, mocker: MockerFixture) -> None:
        """The sockets of a child that was killed may be held for half a second after it, and no longer."""
        clock = mocker.patch.object(exit_event.time, "monotonic", autospec=True, return_value=100.0)
        watch = ExitWatch()
        assert not watch.sockets_overdue(0), "a normal end waits for [workers] socket_cleanup_timeout"
        watch.expect_exit(5)
        clock.return_value = 104.0
        watch.expect_exit(5)
        clock.return_value = 105.4
        assert not watch.sockets_overdue(-15)
        clock.return_value = 105.5
        assert watch.sockets_overdue(-15), "the grace runs from the first kill()"
        assert not watch.sockets_overdue(None), "a child that is there still is no socket's fault"

    def test_exit_that_a_signal_handler_announces(self, mocker: MockerFixture) -> None:
        """The grace goes on for a while when the busy caller is back, unless that says how long it is; no kill is put off."""
        clock = mocker.patch.object(exit_event.time, "monotonic", autospec=True, return_value=100.0)
        watch = ExitWatch()
        watch.announce_exit(60, least=5)
        assert watch.exit_expected
        assert watch.grace_ends(default=0) == 160
        clock.return_value = 158.0
        assert watch.grace_ends(default=0) == 163
        watch.expect_exit(7)
        assert watch.grace_ends(default=0) == 165
        watch.announce_exit(1, least=30)
        watch.expect_exit(8)
        assert watch.grace_ends(default=0) == 165

    def test_wakes_at_a_time(self, child: Child, selector: FinishingSelector) -> None:
        """The loop is woken for what is due besides the exit, once it is told of it; then no more."""
        # Instead of a wait without an end.
        awaken = threading.Timer(PATIENCE, child.finish)
        awaken.start()
        watch = ExitWatch()
        watch.start(selector, child.pid)
        due = time.monotonic() + 0.1
        watch.wake_at(due)
        assert watch.select(selector, timeout=NEVER, exit_code=None) == []
        assert time.monotonic() >= due
        assert not child.exited()
        watch.wake_at(None)
        selector.finishing = child
        watch.select(selector, timeout=PATIENCE, exit_code=None)
        awaken.cancel()
        assert child.exited()
        watch.close(selector)

    def test_sockets_that_are_given_up(self) -> None:
        """They are not waited for once the child is gone, and it was not asked to end for that."""
        watch = ExitWatch()
        watch.give_up_sockets()
        assert not watch.sockets_overdue(None)
        assert watch.sockets_overdue(0)
        assert not watch.exit_expected

    @pytest.mark.parametrize("has_event", [False, True])
    def test_before_handlers(
        self, child: Child, selector: selectors.BaseSelector, *, has_event: bool
    ) -> None:
        """Whoever wants to be called before the events of sockets are handled is, and only then."""
        calls: list[str] = []
        watch = ExitWatch()
        watch.start(selector, child.pid)
        watch.before_handlers = lambda: calls.append("called")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            selector.register(ours, selectors.EVENT_READ, lambda _: True)
            if has_event:
                theirs.send(b".")
            watch.select(selector, timeout=0, exit_code=None)
            selector.unregister(ours)
        assert bool(calls) is has_event
        watch.close(selector)

    def test_wake_up_is_no_event(self, child: Child, selector: selectors.BaseSelector) -> None:
        """A socket that has no handler wakes the loop, is emptied, however much is in it, and is no event."""
        watch = ExitWatch()
        watch.start(selector, child.pid)
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            selector.register(reader, selectors.EVENT_READ)
            writer.sendall(b"." * 5000)
            assert watch.select(selector, timeout=PATIENCE, exit_code=None) == []
            assert selector.select(0) == []
            selector.unregister(reader)
        assert len(selector.get_map()) == 1, "the exit is still watched"
        watch.close(selector)

    def test_what_is_no_socket_of_the_child_does_not_count(
        self, child: Child, selector: selectors.BaseSelector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The poll for an exit speeds up when a socket of the child has closed, and not slows down for another one."""
        deny(monkeypatch, "ENOSYS")
        selector.register(child.socket, selectors.EVENT_READ, "handler")
        watch = ExitWatch()
        watch.start(selector, child.pid)
        selector.unregister(child.socket)
        reader, writer = socket.socketpair()
        with reader, writer:
            selector.register(reader, selectors.EVENT_READ)
            assert watch._limit(PATIENCE, selector, None) <= 0.1
            selector.unregister(reader)


def collect(received: list[bytes]) -> tuple[Any, None]:
    """Return what the selector keeps for a socket: a reader, and what to do at the end."""

    def read(sock: socket.socket) -> bytes:
        received.append(sock.recv(4))
        return received[-1]

    return read, None


class TestReleaseSockets:
    @pytest.fixture
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours, theirs

    def test_buffered_data_is_read(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """What is in the socket reaches its reader, and then the end, though the writer is still there."""
        ours, theirs = pair
        received: list[bytes] = []
        selector.register(ours, selectors.EVENT_READ, collect(received))
        theirs.sendall(b"last line")
        release_sockets(selector, {ours: "stdout"})
        assert b"".join(received) == b"last line"
        assert received[-1] == b""
        assert not selector.get_map()

    def test_the_end_is_told_once(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """A reader that logs an unfinished last line at the end is not asked again, which would repeat the line."""
        ours, theirs = pair
        received: list[bytes] = []
        selector.register(ours, selectors.EVENT_READ, collect(received))
        theirs.sendall(b"last line")
        theirs.close()
        release_sockets(selector, {ours: "stdout"})
        assert received.count(b"") == 1

    def test_sockets_stay_with_the_caller(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """A supervisor's mapping has weak keys, which nothing else than the selector holds."""
        ours, theirs = pair
        sock = socket.socket(fileno=os.dup(ours.fileno()))
        sockets = weakref.WeakKeyDictionary({sock: "stdout"})
        selector.register(sock, selectors.EVENT_READ, collect([]))
        del sock
        theirs.close()
        released = release_sockets(selector, sockets)
        assert list(released.values()) == list(sockets.values()) == ["stdout"]
        assert not selector.get_map()
        for sock in released:
            sock.close()

    def test_requests_are_not_read(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """Each would cost a call of the API, whose answer nobody waits for."""
        ours, theirs = pair
        received: list[bytes] = []
        selector.register(ours, selectors.EVENT_READ, collect(received))
        theirs.sendall(b"request")
        release_sockets(selector, {ours: "requests"})
        assert received == []
        assert not selector.get_map()

    def test_endless_writer(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """A writer without an end cannot keep the supervisor from closing its socket."""
        ours, theirs = pair

        def read(sock: socket.socket) -> bytes:
            theirs.send(b".")
            return sock.recv(4)

        selector.register(ours, selectors.EVENT_READ, (read, None))
        release_sockets(selector, {ours: "stdout"})
        assert not selector.get_map()

    def test_reset_by_peer(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """A peer that died with unread data resets the connection, which ends the reading and nothing else."""
        ours, theirs = pair
        selector.register(ours, selectors.EVENT_READ, collect([]))
        ours.sendall(b"never read")
        theirs.close()
        release_sockets(selector, {ours: "stdout"})
        assert not selector.get_map()

    @pytest.mark.parametrize("error", [RuntimeError("bad line"), OSError(errno.ENOSPC, "disk full")])
    def test_reader_that_fails(self, selector: selectors.BaseSelector, pair: Any, error: Exception) -> None:
        """A reader's exception costs the rest of that socket, not the supervisor."""
        ours, theirs = pair

        def read(sock: socket.socket) -> bytes:
            raise error

        selector.register(ours, selectors.EVENT_READ, (read, None))
        theirs.sendall(b"line")
        with structlog.testing.capture_logs() as logs:
            release_sockets(selector, {ours: "stdout"})
        assert [entry["log_level"] for entry in logs] == ["error"]
        assert not selector.get_map()

    def test_unknown_socket(self, selector: selectors.BaseSelector, pair: Any) -> None:
        """A socket that was never registered, or is closed by now, is passed over."""
        ours, _ = pair
        release_sockets(selector, {ours: "stdout"})
        ours.close()
        release_sockets(selector, {ours: "stdout"})

    def test_closed_selector(self, selector: selectors.BaseSelector) -> None:
        """A selector that was closed has nothing to release."""
        selector.close()
        release_sockets(selector, {})
