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
import subprocess
import sys

import pytest

from airflow.sdk.execution_time.child_popen import signal_popen, wait_for_popen


class TestWaitForPopen:
    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    def test_status_is_there(self) -> None:
        """A status that nobody has taken is returned, as often as it is asked for."""
        popen = self.start()
        assert wait_for_popen(popen, None) == 3
        assert wait_for_popen(popen, None) == 3

    def test_status_was_taken(self) -> None:
        """Popen itself would say 0, which reads as success."""
        popen = self.start()
        os.waitpid(popen.pid, 0)
        signal_popen(popen, signal.SIGTERM)
        assert wait_for_popen(popen, None) is None
        assert popen.wait() == 0

    def test_signal(self) -> None:
        """A child that runs is signalled, and its status says by what it was ended."""
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as popen:
            signal_popen(popen, signal.SIGKILL)
            assert wait_for_popen(popen, None) == -signal.SIGKILL

    def test_without_waitid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a Python that has no waitid() a lost status stays what Popen makes of it."""
        monkeypatch.delattr(os, "waitid")
        popen = self.start()
        os.waitpid(popen.pid, 0)
        assert wait_for_popen(popen, None) == 0

    def test_timeout(self) -> None:
        """A child that does not end in time is waited for no longer, as by Popen."""
        waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with waiting, pytest.raises(subprocess.TimeoutExpired):
            wait_for_popen(waiting, 0)
