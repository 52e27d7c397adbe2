"""What a signal to a supervisor means, as a deployment sets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from patches.releases import Release

OPTION = "AIRFLOW__WORKERS__STOP_SIGNAL_POLICY"
FINISHES_BY_DEFAULT = SpecifierSet(">=1.4.0a0", prereleases=True)


def choose(policy: Literal["stop", "finish"], release: Release) -> dict[str, str]:
    """Return the variables that have a signal mean that, none where it does by default."""
    default = "finish" if FINISHES_BY_DEFAULT.contains(release.version) else "stop"
    return {} if policy == default else {OPTION: policy}
