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
Have a ``subprocess.Popen`` admit that it does not know the exit status of its child.

If other code in the process has reaped the child (``waitpid(-1)``), or SIGCHLD is ignored, Popen returns 0,
which means success: https://github.com/apache/airflow/issues/70117.

Imports nothing of Airflow outside this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.execution_time.child_status import is_unreaped_child

if TYPE_CHECKING:
    import subprocess

__all__ = ["signal_popen", "wait_for_popen"]


def wait_for_popen(popen: subprocess.Popen[Any], timeout: float | None) -> int | None:
    """
    Return ``popen.wait(timeout)``, but None where ``Popen`` would make up a 0 for a lost status.

    :raises subprocess.TimeoutExpired: as ``popen.wait`` does.
    """
    if popen.returncode is None and not is_unreaped_child(popen.pid):
        return None
    return popen.wait(timeout)


def signal_popen(popen: subprocess.Popen[Any], sig: int) -> None:
    """Call ``popen.send_signal(sig)``, unless other code has reaped the child."""
    if popen.returncode is not None or is_unreaped_child(popen.pid):
        popen.send_signal(sig)
