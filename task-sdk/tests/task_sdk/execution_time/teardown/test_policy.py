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

from typing import TYPE_CHECKING, Any

import pytest
import structlog

from airflow.sdk.execution_time.teardown import policy
from airflow.sdk.execution_time.teardown.policy import (
    GRACE,
    MAX_GRACE,
    MIN_GRACE,
    STOP_GRACE,
    LeftoverPolicy,
    StopPolicy,
    find_grace,
    find_leftover_policy,
    find_spared_names,
    find_stop_policy,
    limit_grace,
)

if TYPE_CHECKING:
    from configparser import ConfigParser


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_warned", set())
    for suffix in ("", "_CMD", "_SECRET"):
        monkeypatch.delenv(f"AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME{suffix}", raising=False)


def set_workers(conf: ConfigParser, **options: str) -> None:
    conf.read_dict({"workers": options})


class TestGrace:
    def test_default(self, conf: ConfigParser) -> None:
        """The documented default of 60 s, which no release before 3.4 heeds, is not taken for what somebody has set."""
        assert find_grace(conf) == GRACE == 5

    def test_default_of_a_stop(self, conf: ConfigParser) -> None:
        """Whoever is told to stop has a minute: an ``on_kill`` may have to delete a pod."""
        assert find_grace(conf, default=STOP_GRACE) == 60

    def test_in_file(self, conf: ConfigParser) -> None:
        """What the configuration file sets counts."""
        conf.read_dict({"core": {"killed_task_cleanup_time": "17"}})
        assert find_grace(conf) == find_grace(conf, default=STOP_GRACE) == 17

    @pytest.mark.parametrize(
        ("value", "grace"),
        [
            ("soon", GRACE),
            ("", GRACE),
            ("-1", MIN_GRACE),
            ("0", MIN_GRACE),
            ("inf", MAX_GRACE),
            ("nan", MIN_GRACE),
            ("60%", GRACE),
        ],
    )
    def test_bad_value(self, conf: ConfigParser, value: str, grace: float) -> None:
        """A task must end also where somebody has mistyped how."""
        conf.read_string(f"[core]\nkilled_task_cleanup_time = {value}")
        assert find_grace(conf) == grace

    def test_bad_value_is_told_once(self, conf: ConfigParser) -> None:
        """One warning names the option, what is wrong, and what counts instead, however many tasks there are."""
        conf.read_dict({"core": {"killed_task_cleanup_time": "soon"}})
        with structlog.testing.capture_logs() as logs:
            assert find_grace(conf, default=7) == find_grace(conf, default=7) == 7
        [warning] = logs
        assert warning["log_level"] == "warning"
        assert warning["option"] == "[core] killed_task_cleanup_time"
        assert "soon" in warning["value"]
        assert warning["used"] == 7

    @pytest.mark.parametrize(("suffix", "grace"), [("", 60), ("_CMD", GRACE), ("_SECRET", GRACE)])
    def test_in_environment(
        self, conf: ConfigParser, monkeypatch: pytest.MonkeyPatch, suffix: str, grace: float
    ) -> None:
        """How the value is found then is the configuration's business; the suffixes are for secrets, and not heeded."""
        monkeypatch.setenv(f"AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME{suffix}", "x")
        assert find_grace(conf) == grace

    @pytest.mark.parametrize(
        ("grace", "limited"), [(3.0, 3.0), (0, MIN_GRACE), (-1, MIN_GRACE), (float("inf"), MAX_GRACE)]
    )
    def test_limits(self, grace: float, limited: float) -> None:
        """A grace is neither so short that kill() collects nobody, nor longer than select() can wait."""
        assert limit_grace(grace) == limited


class TestPolicies:
    @pytest.mark.parametrize("default", StopPolicy)
    def test_stop_policy_by_default(self, conf: ConfigParser, default: StopPolicy) -> None:
        """What a signal means is the release's choice where the deployment has none; an empty value is none."""
        assert find_stop_policy(conf, default) is default
        set_workers(conf, stop_signal_policy="  ")
        assert find_stop_policy(conf, default) is default

    @pytest.mark.parametrize("value", ["stop", "finish"])
    @pytest.mark.parametrize("spelling", [str.lower, str.upper, " {} ".format])
    def test_stop_policy(self, conf: ConfigParser, value: str, spelling: Any) -> None:
        """A policy is found however it is spelled."""
        set_workers(conf, stop_signal_policy=spelling(value))
        assert [find_stop_policy(conf, default) for default in StopPolicy] == [StopPolicy(value)] * 2

    def test_leftover_policy(self, conf: ConfigParser) -> None:
        """Leftovers end always, unless the deployment has chosen another of the four policies."""
        assert find_leftover_policy(conf) is LeftoverPolicy.ALWAYS
        for chosen in LeftoverPolicy:
            set_workers(conf, leftover_policy=chosen.value)
            assert find_leftover_policy(conf) is chosen
        assert [chosen.value for chosen in LeftoverPolicy] == ["always", "killed", "report", "never"]

    def test_bad_policy(self, conf: ConfigParser) -> None:
        """A policy that does not exist is the default, and one warning that says which do, for each such value."""
        set_workers(conf, leftover_policy="sometimes", stop_signal_policy="halt")
        with structlog.testing.capture_logs() as logs:
            for _ in "ab":
                assert find_leftover_policy(conf) is LeftoverPolicy.ALWAYS
                assert find_stop_policy(conf, StopPolicy.FINISH) is StopPolicy.FINISH
        assert [(entry["option"], entry["value"], entry["expected"], entry["used"]) for entry in logs] == [
            ("[workers] leftover_policy", "sometimes", "always, killed, report, never", "always"),
            ("[workers] stop_signal_policy", "halt", "stop, finish", "finish"),
        ]

    def test_option_that_cannot_be_read(self, conf: ConfigParser) -> None:
        """A value that the parser refuses is one warning, and the default."""
        conf.read_string("[workers]\nleftover_policy = 60%\nspared_leftovers = %(missing)s\n")
        with structlog.testing.capture_logs() as logs:
            assert find_leftover_policy(conf) is LeftoverPolicy.ALWAYS
            assert find_spared_names(conf) == set()
        assert [entry["option"] for entry in logs] == [
            "[workers] leftover_policy",
            "[workers] spared_leftovers",
        ]


class TestSparedNames:
    @pytest.mark.parametrize(
        ("value", "names"),
        [
            ("", set()),
            (" , ,", set()),
            ("catatonit", {"catatonit"}),
            (" gpg-agent,\n ssh ,ssh", {"gpg-agent", "ssh"}),
        ],
    )
    def test_names(self, conf: ConfigParser, value: str, names: set[str]) -> None:
        """Names are separated by commas, with any blanks around them."""
        set_workers(conf, spared_leftovers=value)
        assert find_spared_names(conf) == names

    def test_not_set(self, conf: ConfigParser) -> None:
        """Nobody is spared unless the deployment says so."""
        assert find_spared_names(conf) == set()
