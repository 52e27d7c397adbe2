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
"""A runtime of another language is ended like any other task."""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    Api,
    Relay,
    Tree,
    describe_task,
    end_task,
    ending,
    forked,
    hear_in_popen,
    hear_ready,
    set_stop_policy,
    tell_when_monitoring,
)

from airflow.sdk.coordinators._subprocess import _PopenActivitySubprocess

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from airflow.sdk.execution_time.supervisor import ActivitySubprocess

# Does step by step what its arguments say, tells its PID, and stays.
RUNTIME = """
import os, signal, socket, sys

told, steps, *addresses = sys.argv[1:]
connections = []

def tell():
    with open(told, "a") as relay:
        relay.write(f"{os.getpid()}\\n")

def start_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            tell()
            signal.pause()
        os._exit(0)
    os.wait()

def connect():
    for address in addresses:
        host, port = address.partition("=")[2].split(":")
        connections.append(socket.create_connection((host, int(port))))

for step in steps.split():
    {"daemon": start_daemon, "connect": connect}[step]()
tell()
signal.pause()
"""


def start_runtime(relay: Relay, steps: str, client: Any = None, **kwargs: Any) -> ActivitySubprocess:
    """Start a task in a runtime of another language, as far as its supervisor can tell."""
    told = f"/proc/{os.getpid()}/fd/{relay.writer}"
    command = [sys.executable, "-I", "-S", "-c", RUNTIME, told, steps]
    return _PopenActivitySubprocess.start(command=command, **describe_task(client, **kwargs))


@pytest.mark.usefixtures("short_grace")
class TestRuntimes:
    """A runtime is spawned by Popen, connects to its supervisor, and is ended like any other task."""

    @pytest.fixture
    def slow_popen(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have Popen return only when the runtime's daemon is there."""
        hear_in_popen(relay, monkeypatch)

    def test_session(self, relay: Relay) -> None:
        """It leads a session, and it and what it starts carry the mark of the task."""
        with ending(start_runtime(relay, "connect daemon")) as process:
            pids = [relay.hear(), relay.hear()]
            assert process.pid in pids
            assert os.getsid(process.pid) == process.pid
            [mark] = {resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] for pid in pids}
            assert mark != resource.getrlimit(resource.RLIMIT_RTTIME)[0]

    @pytest.mark.parametrize("steps", ["connect daemon", "daemon connect"])
    @pytest.mark.parametrize("way", ["conflict", "killed"])
    def test_nothing_is_left(
        self, relay: Relay, steps: str, way: str, list_left: Callable[[], list[int]]
    ) -> None:
        """What it has started is ended with it, also what it had started before it connected."""
        api = Api()
        process = start_runtime(relay, steps, api)
        relay.hear(), relay.hear()
        end_task(way, process, api)
        assert list_left() == []

    @pytest.mark.usefixtures("slow_popen")
    @pytest.mark.parametrize("way", ["conflict", "killed"])
    def test_nothing_is_left_of_a_quick_one(
        self, relay: Relay, way: str, list_left: Callable[[], list[int]]
    ) -> None:
        """What it has started is ended, also if its parent was gone before the supervisor could look."""
        api = Api()
        process = start_runtime(relay, "daemon connect", api)
        relay.hear()
        end_task(way, process, api)
        assert list_left() == []

    @pytest.mark.parametrize("policy", ["stop", "finish"])
    def test_supervisor_that_is_told_to_stop(
        self, relay: Relay, tree: Tree, monkeypatch: pytest.MonkeyPatch, policy: str
    ) -> None:
        """A signal to the supervisor's group, which the runtime is not in, ends the runtime, or lets it finish."""
        set_stop_policy(monkeypatch, policy)

        def tell_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
            if "told to stop" in event["event"]:
                relay.tell("told")
            raise structlog.DropEvent

        def supervise() -> None:
            os.setpgid(0, 0)
            process = start_runtime(
                relay, "connect", logger=structlog.wrap_logger(None, processors=[tell_event])
            )
            tell_when_monitoring(relay, monkeypatch)
            process.wait()
            relay.tell("returned")

        with forked(supervise) as supervising:
            runtime = tree.add(*hear_ready(relay, ready="monitoring"))
            os.killpg(supervising, signal.SIGTERM)
            assert relay.hear() == "told"
            if policy == "finish":
                assert tree.runs(runtime)
                os.kill(runtime, signal.SIGKILL)
            assert relay.hear() == "returned"
            assert tree.gone(runtime, timeout=0)

    @pytest.mark.usefixtures("slow_popen")
    def test_runtime_that_does_not_connect_leaves_nothing(
        self, relay: Relay, list_left: Callable[[], list[int]]
    ) -> None:
        """It is ended with all that it has started."""
        with pytest.raises(TimeoutError):
            start_runtime(relay, "daemon", startup_timeout=0.5)
        assert list_left() == []
