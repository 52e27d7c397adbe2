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
Notice the exit of a supervised child at once, and never wait on sockets for longer than a kill may last.

The supervisor sleeps in ``selector.select()``. The child's sockets do not show its exit:

1. They close before the child can be waited for, so they may wake the supervisor too early.
2. A grandchild that inherited them keeps them open after the child's death.

A pidfd becomes readable exactly when the child can be waited for (pidfd_open(2), Linux 5.3).

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


log = structlog.get_logger(logger_name="supervisor")

REQUESTS = "requests"
"""The supervisor's name for the socket on which the child sends requests."""

EXIT_POLL_INTERVAL = 1.0
"""Seconds between looks at a running child where there is no pidfd."""

IMMINENT_EXIT_POLL_INTERVAL = 0.05
"""The same once the exit is expected: one of the child's sockets has closed, or the child is being killed."""

SOCKET_GRACE = 0.5
"""Seconds that sockets may stay open after the grace period of a kill."""

MAX_DRAIN_READS = 1024
"""Maximum reads to drain a socket: more than its buffer can hold; an endless writer cannot keep us here."""

_Events = list[tuple[selectors.SelectorKey, int]]


class ExitWatch:
    """
    Watches one child on behalf of one selector loop.

    Until :meth:`start` it only passes ``select()`` through. Subprocess types that share a selector, such as
    the Dag processor's, never start it.
    """

    def __init__(self) -> None:
        self._pidfd: io.FileIO | None = None
        self._polls = False
        self._sockets_at_start = 0
        self._kill_ends: float | None = None
        self._least_grace: float | None = None
        """Seconds from :meth:`announce_exit`, as long as it stands; None otherwise."""
        self._wake_at = math.inf
        self._sockets_given_up = False
        self.is_waiting = False
        """Whether :meth:`select` is waiting, so that its caller handles a wake-up at once."""
        self.before_handlers: Callable[[], None] | None = None
        """Called when the caller is about to handle the events of sockets, which may take long."""
        self._started = False
        self._follows = False

    def start(self, selector: selectors.BaseSelector, pid: int) -> None:
        """Make the exit of our child ``pid`` wake ``selector``, or have :meth:`select` poll for it."""
        self._started = True
        self._sockets_at_start = count_sockets(selector)
        self._polls = not self._watch(selector, pid)

    def follow(self, selector: selectors.BaseSelector, pid: int) -> bool:
        """
        Make the exit of ``pid``, which need not be our child, wake ``selector``; end the previous watch.

        :returns: False if the process cannot be watched; it may be gone.
        """
        self.close(selector)
        self._follows = True
        return self._watch(selector, pid)

    def _watch(self, selector: selectors.BaseSelector, pid: int) -> bool:
        try:
            self._pidfd = io.FileIO(os.pidfd_open(pid))
        except (AttributeError, OSError):
            # Not Linux, or older than 5.3, or a seccomp profile that does not know the call, or EMFILE, or
            # other code has reaped the process already.
            return False
        if selector.get_map() is not None:
            selector.register(self._pidfd, selectors.EVENT_READ)
        return True

    def unfollow(self, selector: selectors.BaseSelector) -> None:
        """End the watch of :meth:`follow`; :meth:`select` now returns in time for :meth:`sockets_overdue`."""
        self.close(selector)
        self._follows = False

    def close(self, selector: selectors.BaseSelector) -> None:
        """Forget the child. Harmless when repeated, or when nothing was started."""
        if self._pidfd is None:
            return
        if selector.get_map() is not None:
            unregister(selector, self._pidfd)
        self._pidfd.close()
        self._pidfd = None

    @property
    def exit_expected(self) -> bool:
        """Whether the child was asked to end."""
        return self._kill_ends is not None

    def grace_ends(self, default: float) -> float:
        """Return when the grace period ends, by time.monotonic(); without one, in ``default`` seconds."""
        now = time.monotonic()
        if self._kill_ends is None:
            return now + default
        return self._kill_ends if self._least_grace is None else max(self._kill_ends, now + self._least_grace)

    def expect_exit(self, grace: float) -> None:
        """
        Note that the child has been asked to end, and has ``grace`` seconds for it.

        If called several times, the earliest end counts. What a signal handler has announced does not count
        any more.
        """
        ends = time.monotonic() + grace
        if self._least_grace is not None:
            self._kill_ends = self._least_grace = None
        self._kill_ends = ends if self._kill_ends is None else min(self._kill_ends, ends)

    def announce_exit(self, grace: float, least: float) -> None:
        """
        Note the same in a signal handler that has asked the child to end while the caller of :meth:`select` is busy.

        A child that needs its caller, because it writes to a socket that is full, cannot end before the
        caller is back. So the grace period lasts ``least`` seconds from then on, even if ``grace`` is over.
        """
        if self._kill_ends is None:
            self._kill_ends = time.monotonic() + grace
            self._least_grace = least

    def give_up_sockets(self) -> None:
        """Do not wait for open sockets any longer, once the child is gone."""
        self._sockets_given_up = True

    def wake_at(self, deadline: float | None) -> None:
        """Make :meth:`select` return at ``deadline``, by time.monotonic(), exit or not; None cancels that."""
        self._wake_at = math.inf if deadline is None else deadline

    def select(self, selector: selectors.BaseSelector, *, timeout: float, exit_code: int | None) -> _Events:
        """
        Call ``selector.select(timeout)``; return early on the child's exit, and accept a closed selector.

        :param timeout: seconds to wait at the most.
        :param exit_code: what the caller knows of the child so far, None if it runs.
        :returns: the events of sockets alone. The caller collects the exit itself.
        """
        if selector.get_map() is None:
            self._sleep_without_selector(timeout)
            return []
        limit = self._limit(timeout, selector, exit_code)
        self.is_waiting = True
        try:
            events = selector.select(timeout=limit)
        finally:
            self.is_waiting = False
        if not self._started:
            return events
        # The child's sockets have handlers as their data. Anything else only had to wake the caller.
        on_sockets = [event for event in events if event[0].data is not None]
        wake_ups = [key.fileobj for key, _ in events if key.data is None]
        for wake_up in wake_ups:
            if isinstance(wake_up, socket.socket):
                empty(wake_up)
        if any(isinstance(wake_up, io.FileIO) for wake_up in wake_ups):
            # The pidfd stays readable for ever, and would turn the next select() into a busy loop. Under a
            # tracer (strace, gdb) the child cannot be waited for until the tracer has reaped it. So poll from
            # now on.
            self.close(selector)
            self._polls = True
        if on_sockets and self.before_handlers is not None:
            self.before_handlers()
        return on_sockets

    def sockets_overdue(self, exit_code: int | None) -> bool:
        """Whether the child is gone, but another process has held its sockets open too long."""
        return exit_code is not None and self._release_due_in() <= 0

    def _release_due_in(self) -> float:
        if self._sockets_given_up:
            return 0
        if self._kill_ends is None:
            return math.inf
        return self._kill_ends + SOCKET_GRACE - time.monotonic()

    def _limit(self, timeout: float, selector: selectors.BaseSelector, exit_code: int | None) -> float:
        if self._follows or not self._started:
            return timeout
        if exit_code is not None:
            return max(0, min(timeout, self._release_due_in()))
        timeout = max(0, min(timeout, self._wake_at - time.monotonic()))
        if not self._polls:
            return timeout
        imminent = self._kill_ends is not None or count_sockets(selector) < self._sockets_at_start
        return min(timeout, IMMINENT_EXIT_POLL_INTERVAL if imminent else EXIT_POLL_INTERVAL)

    def _sleep_without_selector(self, timeout: float) -> None:
        """Keep a caller that loops until the exit from spinning."""
        if self._pidfd is None:
            time.sleep(min(timeout, IMMINENT_EXIT_POLL_INTERVAL))
            return
        with selectors.DefaultSelector() as own:
            own.register(self._pidfd, selectors.EVENT_READ)
            if not own.select(timeout):
                return
        self._polls = True  # see select()
        self._pidfd.close()
        self._pidfd = None


def release_sockets(
    selector: selectors.BaseSelector, sockets: Mapping[socket.socket, str]
) -> dict[socket.socket, str]:
    """
    Log what the child wrote before it died, then take its sockets out of ``selector``.

    The caller closes the sockets afterwards, not before: epoll forgets a closed descriptor only when its last
    duplicate is closed (epoll(7), Q6), and a registration that outlives its socket collides with the next one
    of the same number.

    :param sockets: the sockets and their purposes. Requests are not read, because nobody waits for the
        answers.
    :returns: the same sockets. A mapping with weak keys loses those that only the selector has held.
    """
    held = dict(sockets)
    if selector.get_map() is None:
        return held
    for sock, purpose in held.items():
        try:
            key = selector.get_key(sock)
        except (KeyError, ValueError):  # never registered, or closed by now
            continue
        if purpose != REQUESTS:
            _drain(sock, key.data[0] if isinstance(key.data, tuple) else key.data)
        unregister(selector, sock)
    return held


def count_sockets(selector: selectors.BaseSelector) -> int:
    """Return how many of the child's sockets are still open; they have handlers as their data."""
    return sum(key.data is not None for key in selector.get_map().values())


def empty(sock: socket.socket) -> None:
    """Read all bytes from the socket of a wakeup descriptor: one for each signal."""
    with contextlib.suppress(BlockingIOError):
        while sock.recv(4096):
            pass


def unregister(selector: selectors.BaseSelector, file: socket.socket | io.FileIO) -> None:
    """Take ``file`` out of ``selector``, if it still is in there."""
    with contextlib.suppress(KeyError, ValueError):
        selector.unregister(file)


def _drain(sock: socket.socket, handle: Callable[[socket.socket], bool]) -> None:
    """Have ``handle`` read ``sock`` to its end, where it logs an unfinished last line."""
    sock.setblocking(False)
    try:
        if _read(sock, handle):
            return
        # Now a writer that is still there gets EPIPE, so that reading comes to an end. This cannot be done
        # before the first read: systems other than Linux then discard unread data.
        with contextlib.suppress(OSError):  # not connected any more
            sock.shutdown(socket.SHUT_RD)
        _read(sock, handle)
    except ConnectionError:  # reset by a peer that died with unread data
        return
    except Exception:  # a reader may fail in any way, and the exit must still be handled
        log.exception("Failed to log the rest of the task's output")


def _read(sock: socket.socket, handle: Callable[[socket.socket], bool]) -> bool:
    """
    Have ``handle`` read ``sock`` until it is empty, the stream ends, or the writer proves endless.

    :returns: whether the stream has ended. Do not call ``handle`` again then: it would log an unfinished last
        line twice.
    """
    with contextlib.suppress(BlockingIOError):
        for _ in range(MAX_DRAIN_READS):
            if not handle(sock):
                return True
    return False
