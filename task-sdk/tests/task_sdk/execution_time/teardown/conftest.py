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

import contextlib
from configparser import ConfigParser
from typing import TYPE_CHECKING, Any

import pytest
from task_sdk.execution_time.teardown.supervised.supervised_task import Relay, ending_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Conf(ConfigParser):
    """Airflow's, as far as this goes: what is set in the file, and a grace that nobody has set."""

    def get(self, section: str, option: str, **kwargs: Any) -> Any:  # type: ignore[override]  # as typeshed's own
        if self.has_option(section, option):
            return super().get(section, option, **kwargs)
        return kwargs.get("fallback", "60")


@pytest.fixture
def conf() -> ConfigParser:
    return Conf()


@pytest.fixture
def relay() -> Iterator[Relay]:
    with contextlib.closing(Relay()) as relay:
        yield relay


@pytest.fixture
def list_left() -> Iterator[Callable[[], list[int]]]:
    """End every process that a test has started, however it ends; gives a function that lists those that live."""
    with ending_all() as list_left:
        yield list_left
