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
Keep a request and its answer together. Before 1.0.3 a runner sends the one and reads the other by two calls.

Most callers hold the lock of the comms for both calls. This lock is not reentrant, and an ``on_kill`` that
sends a request needs it, too. So the holder of the lock is not interrupted. Callers without the lock are
recognised by the messages that they send.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import aiologic

from airflow.sdk.execution_time.teardown.answered_requests import expects_answer
from airflow.sdk.execution_time.teardown.interruption import begin_request, end_request, request_in_flight

if TYPE_CHECKING:
    from collections.abc import Callable


_Method = TypeVar("_Method", bound="Callable[..., Any]")


class CommsLock(aiologic.Lock):  # type: ignore[misc]
    """A lock whose holder is not interrupted."""

    def __enter__(self) -> Any:
        """Acquire the lock."""
        begin_request()
        try:
            return super().__enter__()
        except BaseException:
            end_request()
            raise

    def __exit__(self, *exception: object) -> None:
        """Release the lock, and let the task be interrupted again."""
        super().__exit__(*exception)
        end_request()


def sends_request(method: _Method) -> _Method:
    """Put off an interruption from when a method sends ``msg`` until its answer was read; a decorator."""

    @functools.wraps(method)
    def send(comms: Any, log: Any, msg: Any) -> Any:
        if not expects_answer(msg):
            with request_in_flight():
                return method(comms, log, msg)
        begin_request()
        try:
            return method(comms, log, msg)
        except BaseException:
            end_request()
            raise

    return send  # type: ignore[return-value]


def reads_answer(method: _Method) -> _Method:
    """Allow interruptions again after a method has read an answer; a decorator."""

    @functools.wraps(method)
    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            end_request()

    return read  # type: ignore[return-value]
