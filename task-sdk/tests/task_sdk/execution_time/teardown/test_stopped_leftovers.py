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
"""A supervisor that was told to stop ends what its task has left."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from task_sdk.execution_time.teardown.supervised_task import (
    Relay,
    Tree,
    be_polite,
    detach,
    forked,
    pause_for_ever,
    start_task,
    tell_when_monitoring,
)

if TYPE_CHECKING:
    import pytest


class TestForwarding:
    def test_leftovers_end(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """They do so although the runner, told to stop, ends with 0."""

        def target() -> None:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            detach(lambda: be_polite(relay))
            pause_for_ever()

        def supervise() -> None:
            tell_when_monitoring(relay, monkeypatch)
            relay.tell(["ended", start_task(target).wait()])

        with forked(supervise) as supervising:
            told = [relay.hear(), relay.hear()]
            daemon = tree.add(next(pid for pid in told if pid != "monitoring"))
            os.kill(supervising, signal.SIGTERM)
            assert relay.hear() == ["ended", 0]
            assert tree.gone(daemon, timeout=0)

    def test_success_all_the_same(self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that goes on, as one without an on_kill does, and succeeds, keeps what it has left running."""

        def target() -> None:
            detach(lambda: be_polite(relay))
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            relay.tell("ready")
            signal.sigwaitinfo({signal.SIGTERM})

        def supervise() -> None:
            tell_when_monitoring(relay, monkeypatch)
            process = start_task(target)
            process._terminal_state = "success"
            relay.tell(["ended", process.wait()])

        with forked(supervise) as supervising:
            told = [relay.hear(), relay.hear(), relay.hear()]
            daemon = tree.add(next(pid for pid in told if isinstance(pid, int)))
            os.kill(supervising, signal.SIGTERM)
            assert relay.hear() == ["ended", 0]
            assert tree.runs(daemon)
