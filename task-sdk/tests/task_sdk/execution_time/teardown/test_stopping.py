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
"""A supervisor passes the signals that stop it on to its task."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from typing import Any, TextIO

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised_task import (
    SLEEPER,
    Relay,
    Tree,
    forked,
    pause_for_ever,
    start_task,
    tell_when_monitoring,
)

from airflow.sdk.execution_time import supervisor


class TestForwarding:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_signal_reaches_the_group(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
    ) -> None:
        """A supervisor that is told to stop passes that on to the task's group, and restores its handlers."""

        def supervise() -> None:
            tell_when_monitoring(relay, monkeypatch)
            process = start_task(lambda: (relay.tell(subprocess.Popen(SLEEPER).pid), pause_for_ever()))
            former = signal.signal(signum, signal.SIG_IGN)
            code = process.wait()
            relay.tell([code, signal.getsignal(signum) == signal.SIG_IGN])
            signal.signal(signum, former)

        with forked(supervise) as supervising:
            told = [relay.hear(), relay.hear()]
            child = tree.add(next(pid for pid in told if pid != "monitoring"))
            os.kill(supervising, signum)
            assert relay.hear() == [-signum, True]
            assert tree.gone(child)

    def test_signals_while_logging(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second signal, while the first is being logged, does not hang the supervisor."""

        class Interrupting(io.StringIO):
            def write(self, text: str) -> int:
                signal.raise_signal(signal.SIGTERM)
                return super().write(text)

        install = signal.signal

        def install_and_signal(signum: int, handler: Any) -> Any:
            former = install(signum, handler)
            signal.raise_signal(signal.SIGTERM)
            return former

        def supervise() -> None:
            process = start_task(pause_for_ever)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            monkeypatch.setattr(signal, "signal", install_and_signal)
            log_into(Interrupting(), monkeypatch)
            relay.tell(process.wait())

        with forked(supervise):
            assert relay.hear() == -signal.SIGTERM


def log_into(file: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whatever supervises a task log into a file, under its lock."""
    log = structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(0),
    )
    for name, module in list(sys.modules.items()):
        if name.startswith(supervisor.__package__) and hasattr(module, "log"):
            monkeypatch.setattr(module, "log", log)
