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
Types of the supervisor's classes, with what this package uses of them.

A module that gives these classes further attributes extends the protocols. Methods whose parameters differ between
releases are properties here. Imports nothing at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import selectors
    import signal
    from collections.abc import Callable
    from uuid import UUID

    from structlog.typing import FilteringBoundLogger

    from airflow.sdk.api.client import Client


class WatchedProcess(Protocol):
    """The part of ``WatchedSubprocess`` (the supervisor's view of any child) that this package uses."""

    pid: int
    selector: selectors.BaseSelector
    process_log: FilteringBoundLogger
    """The log of the task, or of whatever else the child does."""
    _exit_code: int | None

    def _service_subprocess(self, max_wait_time: float) -> int | None:
        """Serve the sockets for some seconds, or until the process has ended; return its exit code."""

    def kill(self, signal_to_send: signal.Signals, *, force: bool) -> None:
        """End the process."""

    @property
    def send_msg(self) -> Callable[..., None]:
        """Answer a request of the process."""

    @property
    def _handle_request(self) -> Callable[..., None]:
        """Do what the process has asked for, and answer."""


class TaskProcess(WatchedProcess, Protocol):
    """The part of ``ActivitySubprocess`` (the supervisor's view of a task's runner) that this package uses."""

    id: UUID
    """Of the task instance."""
    client: Client
    failed_heartbeats: int
    _last_successful_heartbeat: float
    """By time.monotonic(), as all times here; 0 if the server has not let the task start."""
    _last_heartbeat_attempt: float
    _task_end_time_monotonic: float | None
    """When the task has reported its end."""
    _rendered_map_index: str | None
    _terminal_state: str | None
    """The state that the task has reported, or that the supervisor has noted for it."""

    @property
    def final_state(self) -> object:
        """How the task has ended."""

    @property
    def update_task_state_if_needed(self) -> Callable[[], None]:
        """Tell the API server the state of a task that has not reported one."""
