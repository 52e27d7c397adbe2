"""The demo tells which tasks have ended as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.demo.told import describe
from tests.harness.real.running import Case, Result
from tests.harness.supervised import KILL_GRACE

ENDED = Result(seconds=0.1, seconds_to_nothing=0.0, states=["failed"])


@pytest.mark.parametrize(
    ("end", "result", "right"),
    [
        ("SIGTERM", ENDED, True),
        ("409", replace(ENDED, states=[]), True),
        ("SIGTERM", replace(ENDED, states=["success"]), False),
        ("SIGTERM", replace(ENDED, states=[]), False),
        ("SIGTERM", replace(ENDED, left=[(1, "python")]), False),
        ("SIGTERM", replace(ENDED, seconds=KILL_GRACE), False),
        ("SIGTERM", replace(ENDED, seconds=None, hung=True, states=[]), False),
        ("409", replace(ENDED, seconds=None, killed_by=15, states=[]), False),
    ],
)
def test_wrong_ends_are_told(end: str, result: Result, *, right: bool) -> None:
    """Right is a task that is gone within the grace, and of which the API hears that it has failed, unless it said so."""
    assert describe(Case("sleeps", end), result).right is right


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (ENDED, "returned, 0.1 s"),
        (replace(ENDED, seconds=None, hung=True), "still ran after 8 s"),
        (replace(ENDED, seconds=None, killed_by=15), "died of SIGTERM"),
        (replace(ENDED, exception="ValueError"), "crashed"),
    ],
)
def test_what_became_of_the_supervisor_is_said(result: Result, said: str) -> None:
    """A supervisor that did not return is told apart from one that did."""
    assert describe(Case("sleeps", "SIGTERM"), result).supervisor == said
