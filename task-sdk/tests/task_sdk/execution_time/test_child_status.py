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

from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from airflow.sdk.execution_time.child_status import settle_exit_code


@pytest.fixture
def log() -> structlog.testing.CapturingLogger:
    return structlog.testing.CapturingLogger()


def task(log: Any, reported: str | None) -> Any:
    return SimpleNamespace(pid=4711, process_log=log, _terminal_state=reported)


class TestSettleExitCode:
    @pytest.mark.parametrize(
        ("reported", "code"), [(None, 1), ("success", 0), ("deferred", 0), ("SERVER_TERMINATED", 1)]
    )
    def test_unknown(self, log: structlog.testing.CapturingLogger, reported: str | None, code: int) -> None:
        """A reported state stands, and unknown is not success; one warning says so."""
        assert settle_exit_code(task(log, reported), None) == code
        [call] = log.calls
        assert call.method_name == "warning"
        assert call.kwargs == {"pid": 4711, "reported_state": reported if code == 0 else None}

    @pytest.mark.parametrize("code", [0, 1, -9])
    def test_known(self, log: structlog.testing.CapturingLogger, code: int) -> None:
        """A status that is known stands, and nothing is said."""
        assert settle_exit_code(task(log, None), code) == code
        assert not log.calls

    def test_other_types(self) -> None:
        """A type that reports no terminal state gets what psutil said."""
        assert settle_exit_code(SimpleNamespace(pid=4711), None) is None
