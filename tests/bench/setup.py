"""What every figure gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.harness.environments import Environment


# Airflow's settings where it doesn't matter how long the supervisor waits for what does not come.
HASTE = {"AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1", "AIRFLOW__WORKERS__SOCKET_CLEANUP_TIMEOUT": "1"}


@dataclass(frozen=True)
class Setup:
    """The two sides of one release, and how long to measure them."""

    stock: Environment
    patched: Environment
    quick: bool
    """Few samples: enough to see that the bench works."""
    on_progress: Callable[[float], object]
    """Gets the part of the figure that is done, from 0 to 1."""
    folder: Path
    """Takes the pictures."""

    @property
    def sides(self) -> dict[str, Environment]:
        """The environments by the name of the contender, what is compared with first."""
        return {"stock": self.stock, "patched": self.patched}

    @property
    def settings(self) -> dict[str, str]:
        """Settings of Airflow that make a quick run quick, and leave others alone."""
        return HASTE if self.quick else {}
