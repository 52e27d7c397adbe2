"""What the bench measures: series of samples."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Series:
    """The samples of one contender in one case of a figure."""

    figure: str
    case: str
    contender: str
    samples: list[float]
    unit: str = "ms"
    note: str = ""
    """What the samples do not say: how many processes were left, for example."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        if len(self.samples) < 2:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=100, method="inclusive")[-1]

    @property
    def maximum(self) -> float:
        return max(self.samples)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Series:
        """Return what `to_json` was called on."""
        return cls(**{field.name: entry[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return the samples with what the table shows of them."""
        return {**asdict(self), "p50": self.median, "p99": self.p99, "max": self.maximum}
