"""How long it takes to build wheels from downloads that are there."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import TYPE_CHECKING

from patches.commands import run_command
from patches.errors import PatchError
from patches.releases import ROOT, all_releases
from patches.upstream import fetch_wheel
from tests.bench.series import Series

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.setup import Setup

ROUNDS = 3


def measure_tool(setup: Setup) -> list[Series]:
    """Measure `nox -s wheel` within its environment: one wheel, and all of them."""
    release = setup.stock.release
    cases = {"one": [release.version]}
    if not setup.quick:
        for other in all_releases():
            fetch_wheel(other)
        cases[f"all {len(all_releases())}"] = []
    rounds = 1 if setup.quick else ROUNDS
    samples: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case, versions in cases.items():
            samples[case].append(time_build(versions))
        setup.on_progress((number + 1) / rounds)
    return [
        Series("Building patched wheels", case, "patches", measured, unit="s")
        for case, measured in samples.items()
    ]


def time_build(versions: Sequence[str]) -> float:
    """Build into an empty folder; return the seconds."""
    with tempfile.TemporaryDirectory(prefix="bench-") as output:
        began = time.monotonic()
        result = run_command(
            [sys.executable, "-m", "patches", "wheel", "--output", output, *versions],
            environment={"PYTHONPATH": str(ROOT)},
        )
        seconds = time.monotonic() - began
    if result.returncode:
        raise PatchError(result.stderr.decode(errors="replace").strip())
    return seconds
