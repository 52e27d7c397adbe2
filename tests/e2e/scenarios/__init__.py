"""The scenarios, each with an Airflow of its own, in the order of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.e2e.scenarios import (
    another_user,
    cleared,
    interrupted,
    killed,
    load,
    raises,
    set_failed,
    shut_down,
    stolen,
    warm,
)

if TYPE_CHECKING:
    from tests.e2e.outcomes import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    *set_failed.SCENARIOS,
    *raises.SCENARIOS,
    *cleared.SCENARIOS,
    *shut_down.SCENARIOS,
    *killed.SCENARIOS,
    *warm.SCENARIOS,
    *stolen.SCENARIOS,
    *another_user.SCENARIOS,
    *interrupted.SCENARIOS,
    *load.SCENARIOS,
)
