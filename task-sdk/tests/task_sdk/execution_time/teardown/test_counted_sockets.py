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

import selectors
import socket

from airflow.sdk.execution_time.teardown.counted_sockets import close_sockets


def test_closes_all() -> None:
    """Every socket of the child is closed, and taken out of the selector first; what else is watched stays."""
    ours, theirs = socket.socketpair()
    signals, writer = socket.socketpair()
    with theirs, signals, writer, selectors.DefaultSelector() as selector:
        selector.register(ours, selectors.EVENT_READ, "handler")
        selector.register(signals, selectors.EVENT_READ)
        close_sockets(selector)
        assert ours.fileno() == -1
        assert [key.fileobj for key in selector.get_map().values()] == [signals]
