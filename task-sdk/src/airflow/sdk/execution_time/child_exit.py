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

The supervisor sleeps in ``selector.select()``. The child's sockets close before it can be waited for, so the
wake-up that they cause can come too early, and a grandchild that inherited them keeps them open after its
death. A pidfd becomes readable exactly when the child can be waited for (pidfd_open(2), Linux 5.3).

Nothing here imports Airflow.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import selectors
import time
from typing import TYPE_CHECKING, Callable, cast

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

__all__ = ["ExitWatch", "close_sockets", "release_sockets"]

EXIT_POLL_INTERVAL = 1.0
"""Seconds between looks at a running child where there is no pidfd."""

IMMINENT_EXIT_POLL_INTERVAL = 0.05
"""The same once the exit is expected: one of the child's sockets has closed, or it is being killed."""

SOCKET_GRACE = 0.5
"""Seconds that sockets may stay open after the grace period of a kill."""

MAX_DRAIN_READS = 1024
"""Reads per socket before it is closed: more than a socket buffer holds, and an end for a writer that has none."""

_Events = list[tuple[selectors.SelectorKey, int]]


class ExitWatch:
    """
    Watches one child on behalf of one selector loop.

    Does nothing but pass ``select()`` through until :meth:`start`. Subprocess types that share a selector,
    such as the Dag processor's, never start it.
    """

    def __init__(self) -> None:
        self._pidfd: io.FileIO | None = None
        self._polls = False
        self._sockets_at_start = 0
        self._kill_ends: float | None = None

    def start(self, selector: selectors.BaseSelector, pid: int) -> None:
        """Make the exit of our child ``pid`` wake ``selector``, or have :meth:`select` poll for it."""
        self._sockets_at_start = len(selector.get_map())
        try:
            self._pidfd = io.FileIO(os.pidfd_open(pid))
        except (AttributeError, OSError):
            # Not Linux, or older than 5.3, or a seccomp profile that does not know the call, or EMFILE, or
            # somebody else has reaped the child already.
            self._polls = True
        else:
            selector.register(self._pidfd, selectors.EVENT_READ)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Forget the child. Harmless when repeated, or when nothing was started."""
        if self._pidfd is None:
            return
        if selector.get_map() is not None:
            _unregister(selector, self._pidfd)
        self._pidfd.close()
        self._pidfd = None

    def expect_exit(self, grace: float) -> None:
        """Note that the child is being killed, and has ``grace`` seconds to end."""
        if self._kill_ends is None:
            self._kill_ends = time.monotonic() + grace

    def select(self, selector: selectors.BaseSelector, *, timeout: float, exit_code: int | None) -> _Events:
        """
        ``selector.select(timeout)`` that the child's exit ends early, and that a closed selector cannot break.

        :param timeout: seconds to wait at the most.
        :param exit_code: what the caller knows of the child so far, None if it runs.
        :returns: the events of sockets alone; the exit itself is for the caller to collect.
        """
        if selector.get_map() is None:
            self._sleep_without_selector(timeout)
            return []
        events = selector.select(timeout=self._limit(timeout, selector, exit_code))
        if self._pidfd is None:
            return events
        on_sockets = [event for event in events if event[0].fileobj is not self._pidfd]
        if len(on_sockets) < len(events):
            # It stays readable for good, and would turn the next select() into a busy loop. Under a tracer
            # (strace, gdb) the child cannot be waited for until the tracer has collected it: poll from here.
            self.close(selector)
            self._polls = True
        return on_sockets

    def sockets_overdue(self, exit_code: int | None) -> bool:
        """Whether the child was killed, is gone, and has left its sockets to somebody who keeps them open."""
        return exit_code is not None and self._release_due_in() <= 0

    def _release_due_in(self) -> float:
        if self._kill_ends is None:
            return math.inf
        return self._kill_ends + SOCKET_GRACE - time.monotonic()

    def _limit(self, timeout: float, selector: selectors.BaseSelector, exit_code: int | None) -> float:
        if exit_code is not None:
            return max(0, min(timeout, self._release_due_in()))
        if not self._polls:
            return timeout
        imminent = self._kill_ends is not None or len(selector.get_map()) < self._sockets_at_start
        return min(timeout, IMMINENT_EXIT_POLL_INTERVAL if imminent else EXIT_POLL_INTERVAL)

    def _sleep_without_selector(self, timeout: float) -> None:
        """Keep a caller that loops until the exit from spinning."""
        if self._pidfd is None:
            time.sleep(min(timeout, IMMINENT_EXIT_POLL_INTERVAL))
            return
        with selectors.DefaultSelector() as own:
            own.register(self._pidfd, selectors.EVENT_READ)
            own.select(timeout)


def release_sockets(selector: selectors.BaseSelector, sockets: Iterable[socket.socket]) -> None:
    """
    Read what the child wrote before it died, then take its sockets out of ``selector``; closing is the caller's.

    Out before close: epoll forgets a closed descriptor only when its last duplicate is closed (epoll(7), Q6),
    and a registration that outlives its socket collides with the next one of the same number.
    """
    if selector.get_map() is None:
        return
    for sock in list(sockets):
        try:
            key = selector.get_key(sock)
        except (KeyError, ValueError):  # never registered, or closed by now
            continue
        _drain(sock, key.data[0] if isinstance(key.data, tuple) else key.data)
        _unregister(selector, sock)


def close_sockets(selector: selectors.BaseSelector) -> None:
    """Release and close every socket of ``selector``, which must be nobody else's."""
    sockets = [cast("socket.socket", key.fileobj) for key in selector.get_map().values()]
    release_sockets(selector, sockets)
    for sock in sockets:
        sock.close()


def _unregister(selector: selectors.BaseSelector, file: socket.socket | io.FileIO) -> None:
    """Take ``file`` out of ``selector``, if it still is in there."""
    with contextlib.suppress(KeyError, ValueError):
        selector.unregister(file)


def _drain(sock: socket.socket, handle: Callable[[socket.socket], bool]) -> None:
    """Feed ``handle`` from ``sock`` until nothing is left, the stream ends, or its writer proves endless."""
    sock.setblocking(False)
    for _ in range(MAX_DRAIN_READS):
        try:
            if not handle(sock):
                return
        except OSError:  # would block, or reset by a peer that died with unread data
            return
