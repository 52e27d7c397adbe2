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
The options with which a deployment chooses how its tasks end.

``[core] killed_task_cleanup_time``
    Seconds between SIGTERM and SIGKILL.
``[workers] stop_signal_policy``
    What SIGTERM, SIGINT, SIGHUP and SIGQUIT mean to a supervisor: ``stop`` the task, or let it ``finish``.
``[workers] leftover_policy``
    When the processes that a task leaves behind are ended: ``always`` unless it succeeds; only when it is
    ``killed`` or told to stop; not at all, but ``report`` them in its log; or ``never``.
``[workers] spared_leftovers``
    Names of programs that are never ended, separated by commas.

For a value that is not valid, the supervisor warns once and uses the default: a task must end even if an
option has a typo.

Nothing here imports Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import os
from configparser import Error as ConfigError, RawConfigParser
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from configparser import ConfigParser


log = structlog.get_logger(logger_name="supervisor")

GRACE = 5.0
"""
Seconds between SIGTERM and SIGKILL, the default of kill().

The option counts instead where the server has ended the task, and for leftovers of a task that nobody has ended.
"""

STOP_GRACE = 60.0
"""The same for a supervisor that was told to stop: the option's documented default, which Airflow 2 used."""

MIN_GRACE = 0.05
MAX_GRACE = 7 * 24 * 3600.0
"""Seconds; select() takes no infinite timeout, and none much longer."""

GRACE_OPTION = ("core", "killed_task_cleanup_time")

GRACE_VARIABLE = "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME"
"""The variants with _CMD and _SECRET are for secret options, which this is not."""

SECTION = "workers"
STOP_OPTION = "stop_signal_policy"
LEFTOVER_OPTION = "leftover_policy"
SPARED_OPTION = "spared_leftovers"


class StopPolicy(Enum):
    """The meaning of a signal to the supervisor for its task."""

    STOP = "stop"
    FINISH = "finish"


class LeftoverPolicy(Enum):
    """When the processes that a task leaves behind are ended."""

    ALWAYS = "always"
    KILLED = "killed"
    REPORT = "report"
    NEVER = "never"

    @property
    def ends_what_is_killed(self) -> bool:
        """Whether the processes end that a killed task has started."""
        return self in (LeftoverPolicy.ALWAYS, LeftoverPolicy.KILLED)


_Policy = TypeVar("_Policy", bound=Enum)

_warned: set[tuple[str, str]] = set()
"""Options and bad values that were warned about, so that a worker with many tasks warns once."""

_is_silent = False
"""Whether warnings are suppressed."""


def find_grace(conf: ConfigParser, default: float = GRACE) -> float:
    """
    Return the seconds between SIGTERM and SIGKILL: ``[core] killed_task_cleanup_time`` where it is set.

    :param default: seconds where it is not set. The option's documented default of 60 counts only where the
        caller passes it.
    """
    if not is_grace_set(conf):
        return default
    try:
        return limit_grace(float(conf.get(*GRACE_OPTION)))
    except (TypeError, ValueError, ConfigError) as error:
        warn_once(GRACE_OPTION, str(error), expected="a number of seconds", used=default)
        return default


def limit_grace(grace: float) -> float:
    """Clamp a grace period. With 0, kill() would return before it had reaped the process."""
    return min(max(MIN_GRACE, grace), MAX_GRACE)


def is_grace_set(conf: ConfigParser) -> bool:
    """Whether the deployment sets the option, in the file or in the environment."""
    # Not conf.has_option(), which also finds the defaults.
    return RawConfigParser.has_option(conf, *GRACE_OPTION) or GRACE_VARIABLE in os.environ


def find_stop_policy(conf: ConfigParser, default: StopPolicy) -> StopPolicy:
    """Return what a signal to the supervisor means."""
    return read_policy(conf, STOP_OPTION, default)


def find_leftover_policy(conf: ConfigParser) -> LeftoverPolicy:
    """Return when leftovers are ended."""
    return read_policy(conf, LEFTOVER_OPTION, LeftoverPolicy.ALWAYS)


def find_spared_names(conf: ConfigParser) -> frozenset[str]:
    """Return the names of programs that are never ended."""
    names = (name.strip() for name in read_option(conf, SPARED_OPTION).split(","))
    return frozenset(filter(None, names))


def read_policy(conf: ConfigParser, option: str, default: _Policy) -> _Policy:
    """Return the member that the option names, in upper or lower case; the default if it names none."""
    value = read_option(conf, option)
    if not value:
        return default
    try:
        return type(default)(value.lower())
    except ValueError:
        expected = ", ".join(member.value for member in type(default))
        warn_once((SECTION, option), value, expected=expected, used=default.value)
        return default


def read_option(conf: ConfigParser, option: str) -> str:
    """Return the value of an option, without blanks around it; "" if it is not set."""
    try:
        value = conf.get(SECTION, option, fallback=None)
    except ConfigError as error:
        warn_once((SECTION, option), str(error), expected="a value that can be read", used="the default")
        return ""
    return str(value or "").strip()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress warnings for the duration, as a signal handler must not log."""
    global _is_silent
    _is_silent = True
    try:
        yield
    finally:
        _is_silent = False


def warn_once(option: tuple[str, str], value: str, *, expected: str, used: object) -> None:
    """Warn of an option whose value is not valid, once in this process."""
    name = "[{}] {}".format(*option)
    if not _is_silent and (name, value) not in _warned:
        _warned.add((name, value))
        log.warning(
            "Invalid value for a configuration option",
            option=name,
            value=value,
            expected=expected,
            used=used,
        )
