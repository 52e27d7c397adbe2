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
Close the sockets of a child, for a supervisor that counts them but does not keep them (SDK 1.0.0 to 1.0.2).

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from airflow.sdk.execution_time.teardown.exit_event import unregister

if TYPE_CHECKING:
    import selectors
    import socket


def close_sockets(selector: selectors.BaseSelector) -> None:
    """Close every socket of the child that ``selector`` has; they have handlers as their data."""
    for key in [key for key in selector.get_map().values() if key.data is not None]:
        sock = cast("socket.socket", key.fileobj)
        unregister(selector, sock)
        sock.close()
