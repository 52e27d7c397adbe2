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
Answer the requests of a task, even if the API server cannot answer, or has ended the task.

- If a request fails in an unforeseen way, as when the API server is away, the supervisor must not end: its
  task would run on without one.
- If the server has ended a task, the supervisor refuses the state that the task reports. Otherwise its runner
  would run the callbacks of a failure, though the task has not failed.
"""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import structlog

from airflow.sdk.api.client import ServerResponseError
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse
from airflow.sdk.execution_time.teardown.exit_status import UNKNOWN, has_reported
from airflow.sdk.execution_time.teardown.interruption import CONFLICT
from airflow.sdk.execution_time.teardown.stop_request import find_detail, is_task

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
"""``datetime.UTC`` needs Python 3.11, and Airflow 3.0 runs on 3.9."""

UP_FOR_RETRY = "up_for_retry"

ENDED_STATUSES = (404, CONFLICT, 410)
"""The server's answers about a task that is not to run any more, or that it does not know."""

ANSWERED = ("DeleteVariable", "TriggerDagRun", "ValidateInletsAndOutlets")
"""Before 1.0.3 these, and those named "Get...", are the only messages that get an answer."""


def handle_request(
    process: StoppableProcess,
    msg: object,
    log: FilteringBoundLogger,
    *request_id: int,
    answer_failures: bool = False,
) -> None:
    """
    Handle a request of a task, or refuse it.

    :param process: a ``WatchedSubprocess``. Types that lead no session of their own are served as before.
    :param request_id: none before 1.0.3.
    :param answer_failures: whether to answer an unforeseen failure with an error; from 1.3 on the caller does
        so.
    :raises ServerResponseError: for the caller to answer.
    """
    if not is_task(process):
        process._handle_request(msg, log, *request_id)
    elif process._stop.server_ended and type(msg).__name__ in STATE_REPORTS:
        refuse(process, msg, *request_id)
    elif answer_failures:
        handle_or_answer(process, msg, log, *request_id)
    else:
        process._handle_request(msg, log, *request_id)


def refuse(process: WatchedProcess, msg: object, *request_id: int) -> None:
    """Refuse a reported state with the same answer as the API server."""
    answer(
        process, msg, {"status_code": CONFLICT, "message": "The API server has ended this task"}, *request_id
    )


def handle_or_answer(
    process: StoppableTask, msg: object, log: FilteringBoundLogger, *request_id: int
) -> None:
    """Handle a request; if that fails, answer with an error, and forget a state that was not reported."""
    state = process._terminal_state
    try:
        process._handle_request(msg, log, *request_id)
    except ServerResponseError:
        process._terminal_state = state
        raise
    except Exception as error:
        process._terminal_state = state
        log.exception("A request of the task could not be handled", request=type(msg).__name__)
        detail = {"status_code": None, "message": str(error), "exception_type": type(error).__name__}
        # The task may be gone by now.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            answer(process, msg, detail, *request_id)


def answer(process: WatchedProcess, msg: object, detail: dict[str, Any], *request_id: int) -> None:
    """Send an error, unless the runner does not wait for an answer."""
    error = ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail=detail)
    if request_id:
        process.send_msg(msg=None, error=error, request_id=request_id[0])
    elif expects_answer(msg):
        process.send_msg(error)


def expects_answer(msg: object) -> bool:
    """Whether a runner of a release before 1.0.3 waits for the answer to a message."""
    name = type(msg).__name__
    return name.startswith("Get") or name in ANSWERED


def deny_silent_success(process: StoppableTask, exit_code: int) -> int:
    """
    Replace the 0 of a task process that was told to stop and has reported no state: it has not succeeded.

    :param process: an ``ActivitySubprocess`` that has ended.
    """
    silent = process._exit_watch.exit_expected and process._terminal_state is None
    return UNKNOWN if exit_code == 0 and silent else exit_code


def tell_state(process: TaskProcess) -> None:
    """
    Tell the API server how a task has ended, even that it is up for retry because its runner was killed.

    Upstream does not report that, so that the server learns of it by the heartbeat timeout.
    """
    with bear_refusal(process):
        process.update_task_state_if_needed()
        untold = getattr(process, "_pending_terminal_state_msg", None)
        if process.final_state == UP_FOR_RETRY and not has_reported(process) and untold is None:
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
def bear_refusal(process: TaskProcess) -> Iterator[None]:
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
            "The API server does not take the state of the task, which it has ended before",
            refused=process.final_state,
            status=error.response.status_code,
            reason=detail.get("reason"),
            state=detail.get("current_state"),
        )
