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
End the processes of trees: SIGTERM, then SIGKILL for those that are still there when the grace period is over.

A supervisor does so with the leftovers of its task (``leftovers``), a watchdog or a sweep with whole trees
(``orphans``). They differ in how they wait, and in whether the leaders are among those to end.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING

from airflow.sdk.execution_time.teardown.processes import Process, is_alive

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from airflow.sdk.execution_time.teardown.process_tree import ProcessTree


KILL_TIME = 0.8
"""Seconds after the grace period within which all processes have to be dead."""

KILL_WAIT = 0.2
"""Seconds that killed processes have to disappear before the next look."""

LOOK_INTERVAL = 0.5
"""Seconds between looks for processes that others start while they end."""

POLL_INTERVAL = 0.02
"""Seconds between looks at a process that cannot be watched."""

LAST_LOOKS = 3
"""At most this many last looks for processes that were started meanwhile, when the time is up."""


class Ending:
    """Ends the processes of trees, with their leaders."""

    with_leader = True

    def __init__(self, trees: Sequence[ProcessTree], deadline: float) -> None:
        """
        Begin a grace period.

        :param deadline: when it ends, by time.monotonic().
        """
        self._trees = trees
        self._deadline = deadline
        self._in_grace = True

    def terminate(self) -> None:
        """Send SIGTERM to all, and to those that they start, until none is left or the grace is over."""
        asked: set[Process] = set()
        while time.monotonic() < self._deadline:
            members: list[Process] = []
            for tree in self._trees:
                found = tree.find(with_leader=self.with_leader)
                fresh = [member for member in found if member not in asked]
                # If this process dies, a sweep could not distinguish a tree whose runner is gone from the
                # leftovers of a success. So mark its processes.
                tree.condemn(fresh)
                tree.signal(fresh, signal.SIGTERM, signal.SIGCONT, deadline=self._deadline)
                members += found
            asked.update(members)
            if not self._await_next_look(members, LOOK_INTERVAL):
                return

    def kill(self) -> list[Process]:
        """Kill all until none is left; return those that are still there when the time is up."""
        self._in_grace = False
        self._deadline = max(self._deadline, time.monotonic()) + KILL_TIME
        killed: dict[Process, None] = {}
        late: list[Process] = []
        while True:
            members = self._kill_once()
            killed.update(dict.fromkeys(members))
            if not self._await_next_look(members, KILL_WAIT):
                break
            if time.monotonic() >= self._deadline:
                late = self._kill_fresh(killed)
                break
        killed.update(dict.fromkeys(self._list_suspects()))
        return [process for process in killed if is_alive(process)] + late

    def _await_next_look(self, members: Sequence[Process], seconds: float) -> bool:
        """Wait for the members that a look has found; False if it has found nobody, so that no other is due."""
        if members:
            self.wait_for(members, seconds)
        elif self._has_look_failed():
            # There may be some all the same.
            self.pause(POLL_INTERVAL)
        else:
            return False
        return True

    def wait_for(self, members: Sequence[Process], seconds: float) -> None:
        """Wait until all members have ended, for ``seconds`` or until the time is up."""
        wait_until_gone(members, min(self._deadline, time.monotonic() + seconds))

    def pause(self, seconds: float) -> None:
        """Wait for some seconds."""
        time.sleep(seconds)

    def _kill_once(self) -> list[Process]:
        """Stop and kill the members of all trees; return them."""
        return [
            member
            for tree in self._trees
            for member in tree.kill_all(
                max(0, self._deadline - KILL_WAIT - time.monotonic()),
                with_leader=self.with_leader,
                deadline=self._deadline,
            )
        ]

    def _kill_fresh(self, killed: dict[Process, None]) -> list[Process]:
        """
        Kill processes that unstopped members have started since the look, and add them to ``killed``.

        :returns: those that have appeared since, and may be gone by now: they start others faster than these
            can be signalled.
        """
        # On a busy machine, these may have started others before they were killed.
        for _ in range(LAST_LOOKS):
            found = self._find_fresh(killed)
            if not found:
                return []
            for tree, fresh in found.items():
                tree.signal(fresh, signal.SIGKILL)
            members = [member for fresh in found.values() for member in fresh]
            killed.update(dict.fromkeys(members))
            self._deadline = time.monotonic() + POLL_INTERVAL
            self.wait_for(members, POLL_INTERVAL)
        return [member for fresh in self._find_fresh(killed).values() for member in fresh]

    def _find_fresh(self, killed: Collection[Process]) -> dict[ProcessTree, list[Process]]:
        """Return the members of each tree that are not among those killed, if there are any."""
        found = {tree: tree.find(with_leader=self.with_leader) for tree in self._trees}
        fresh = {
            tree: [member for member in members if member not in killed] for tree, members in found.items()
        }
        return {tree: members for tree, members in fresh.items() if members}

    def _has_look_failed(self) -> bool:
        # Without a leader no look can succeed.
        return any(tree.look_failure for tree in self._trees if tree.leader)

    def _list_suspects(self) -> list[Process]:
        """Return the processes that may be there although the last look has found nobody: it has failed."""
        suspects: list[Process] = []
        for tree in self._trees:
            if tree.look_failure:
                suspects += tree.end_signals
                suspects += [tree.leader] if tree.leader and self.with_leader else []
        return suspects


def wait_until_gone(processes: Sequence[Process], deadline: float) -> None:
    """Wait until all processes have ended, or the time is up."""
    for process in processes:
        with watching(process.pid) as poll:
            while is_alive(process) and (left := deadline - time.monotonic()) > 0:
                if poll is None:
                    time.sleep(min(left, POLL_INTERVAL))
                else:
                    poll.poll(left * 1000)


@contextlib.contextmanager
def watching(pid: int) -> Iterator[select.poll | None]:
    """Yield a poll object that is ready when a process ends; None if there is no pidfd for it."""
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # before Linux 5.3, or no descriptor is left, or it is gone
        yield None
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        yield poll
    finally:
        os.close(pidfd)
