"""What every figure gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.environments import Environment


@dataclass(frozen=True)
class Setup:
    """The two sides of one release, and how long to measure them."""

    stock: Environment
    patched: Environment
    quick: bool
    """Few samples: enough to see that the bench works."""
    on_progress: Callable[[float], object]
    """Gets the part of the figure that is done, from 0 to 1."""

    @property
    def sides(self) -> dict[str, Environment]:
        """The environments by the name of the contender, what is compared with first."""
        return {"stock": self.stock, "patched": self.patched}
