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
Answer the requests of a task that fail. Before 1.3 an unforeseen failure ends the supervisor.

Its task would run on without one, if only because the API server is away for some seconds.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from airflow.sdk.api.client import ServerResponseError
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse
from airflow.sdk.execution_time.teardown.stop_request import is_task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from structlog.typing import FilteringBoundLogger

    from airflow.sdk.execution_time.teardown.stop_request import StoppableProcess
    from airflow.sdk.execution_time.teardown.supervised import WatchedProcess


ANSWERED = ("DeleteVariable", "TriggerDagRun", "ValidateInletsAndOutlets")
"""Before 1.0.3 these, and those named "Get...", are the only messages that get an answer."""


@contextlib.contextmanager
def answering_failures(
    process: StoppableProcess, msg: object, log: FilteringBoundLogger, *request_id: int
) -> Iterator[None]:
    """
    If a request of a task cannot be handled, answer with an error, and forget a state that was not reported.

    :param process: a ``WatchedSubprocess``. Types that lead no session of their own are served as before.
    :param request_id: none before 1.0.3.
    :raises ServerResponseError: for the caller to answer.
    """
    if not is_task(process):
        yield
        return
    state = process._terminal_state
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        # The request was handled, and the runner is gone before it had the answer: what it has reported stands.
        return
    except ServerResponseError:
        process._terminal_state = state
        raise
    except Exception as error:  # without an answer the runner would wait for ever
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
