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

import os
import signal

import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    Api,
    Log,
    Relay,
    forked,
    name_failure,
    name_state,
    start_task,
)


def end_without_status(*, reported: str | None = None, should_retry: bool = False) -> tuple[str, int]:
    """Run a task whose exit status is collected behind its supervisor's back; return its state and warnings."""
    log = Log()
    process = start_task(lambda: os._exit(0), Api(should_retry=should_retry), logger=log.logger)
    process._terminal_state = reported
    os.waitpid(process.pid, 0)
    process.wait()
    return name_state(process.final_state), len(log.find("exit status"))


class TestStolenStatus:
    """The exit status was collected by somebody else in the supervisor's process: apache/airflow issue 70117."""

    @pytest.mark.parametrize("reported", ["success", "deferred", "up_for_reschedule"])
    def test_reported_state_stands(self, relay: Relay, reported: str) -> None:
        """The state that the task had reported before is its final one."""
        with forked(lambda: relay.tell(end_without_status(reported=reported))):
            assert relay.hear() == [reported, 1]

    @pytest.mark.parametrize("should_retry", [False, True])
    def test_unknown_is_not_success(self, relay: Relay, *, should_retry: bool) -> None:
        """A task that had reported nothing ends as one that exits with 1: it failed, or is up for a retry."""
        with forked(lambda: relay.tell(end_without_status(should_retry=should_retry))):
            assert relay.hear() == [name_failure(should_retry=should_retry), 1]

    def test_child_signal_ignored(self, relay: Relay) -> None:
        """With SIGCHLD ignored, as some libraries leave it, the kernel itself discards the status (waitpid(2))."""

        def end_when_started() -> None:
            os.read(0, 1)  # A child that is gone before it is known to its supervisor is no task yet.
            os._exit(0)

        def supervise() -> None:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            relay.tell(start_task(end_when_started).wait())

        with forked(supervise):
            assert relay.hear() == 1
