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
Tell the truth about a task that was told to stop, or that the API server has ended.

If the server has ended a task, the supervisor refuses the state that the task reports. Otherwise its runner
would run the callbacks of a failure, though the task has not failed.
"""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import structlog

from airflow.sdk.api.client import ServerResponseError
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse
from airflow.sdk.execution_time.teardown.exit_status import FAILURE, FAILURES, find_sent_state
from airflow.sdk.execution_time.teardown.stop_request import (
    CONFLICT,
    ENDED_STATUSES,
    find_detail,
    heed_refusal,
    is_task,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from structlog.typing import FilteringBoundLogger

    from airflow.sdk.execution_time.teardown.stop_request import StoppableProcess, StoppableTask
    from airflow.sdk.execution_time.teardown.supervised import TaskProcess, WatchedProcess


STATE_REPORTS = (
    "TaskState",
    "SucceedTask",
    "RetryTask",
    "DeferTask",
    "RescheduleTask",
    "AwaitInputTask",
)
"""Messages with the state in which a task has ended; not every release has each of them."""

log = structlog.get_logger(logger_name="supervisor")

UTC = timezone(timedelta(0))
"""``datetime.UTC``, which upstream's ruff wants instead of ``timezone.utc``, needs Python 3.11."""

UP_FOR_RETRY = "up_for_retry"


def handle_request(
    process: StoppableProcess, msg: object, log: FilteringBoundLogger, *request_id: int
) -> None:
    """
    Handle a request of a task, or refuse it.

    :param process: a ``WatchedSubprocess``. Types that lead no session of their own are served as before.
    :param request_id: none before 1.0.3.
    """
    if is_task(process) and type(msg).__name__ in STATE_REPORTS:
        heed_refusal(process)
        if process._stop.server_ended:
            refuse(process, *request_id)
            return
    process._handle_request(msg, log, *request_id)


def refuse(process: WatchedProcess, *request_id: int) -> None:
    """Refuse a reported state with the same answer as the API server; before 1.0.3 the runner reads none."""
    detail = {"status_code": CONFLICT, "message": "The API server has ended this task"}
    error = ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail=detail)
    for number in request_id:
        process.send_msg(msg=None, error=error, request_id=number)


def deny_silent_success(process: StoppableTask, exit_code: int) -> int:
    """
    Replace the 0 of a task process that was told to stop and has sent no state: it has not succeeded.

    :param process: an ``ActivitySubprocess`` that has ended.
    """
    if exit_code != 0 or not process._exit_watch.exit_expected or process._terminal_state is not None:
        return exit_code
    return FAILURE if find_sent_state(process) in (None, *FAILURES) else exit_code


def tell_state(process: TaskProcess) -> None:
    """
    Tell the API server how a task has ended, even that it is up for retry because its runner was killed.

    Upstream does not report that, so that the server learns of it by the heartbeat timeout.
    """
    with tolerate_refusal(process):
        process.update_task_state_if_needed()
        if process.final_state == UP_FOR_RETRY and find_sent_state(process) is None:
            tell_retry(process)


def tell_retry(process: TaskProcess) -> None:
    """Tell the API server that a task is up for retry."""
    try:
        process.client.task_instances.retry(
            id=process.id,
            end_date=datetime.now(tz=UTC),
            rendered_map_index=process._rendered_map_index,
        )
    except Exception:
        # The server may know already, by the heartbeat timeout, or be away. The logs are still to be uploaded.
        log.exception("The server could not be told that the task is up for retry", ti_id=process.id)


@contextlib.contextmanager
def tolerate_refusal(process: TaskProcess) -> Iterator[None]:
    """
    If the server refuses a state because it has already ended the task, say so in the task's log, and go on.

    A user may end a task at any time. Up to 1.3 the supervisor then raised an exception, and did not upload
    the logs.
    """
    try:
        yield
    except ServerResponseError as error:
        if error.response.status_code not in ENDED_STATUSES:
            raise
        detail = find_detail(error.detail)
        process.process_log.warning(
            "The API server refused the state of the task: it had already ended the task",
            refused=process.final_state,
            status=error.response.status_code,
            reason=detail.get("reason"),
            state=detail.get("current_state"),
        )
