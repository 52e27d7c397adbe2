"""The scenarios, each with an Airflow of its own, in the order of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.e2e.scenarios import set_failed

if TYPE_CHECKING:
    from tests.e2e.outcomes import Scenario

SCENARIOS: tuple[Scenario, ...] = (*set_failed.SCENARIOS,)
