"""How long the first start of a process looks for orphans, alone on the machine and among many others."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from patches.commands import run_command
from patches.errors import PatchError
from patches.releases import ROOT
from tests.bench.scale import BYSTANDERS, QUICK_BYSTANDERS
from tests.bench.series import Series
from tests.bench.tasks import to_ms
from tests.bench.trees import start_processes
from tests.harness.environments import clean_env

if TYPE_CHECKING:
    from tests.bench.setup import Setup
    from tests.harness.environments import Environment

LOOKS, QUICK_LOOKS = 100, 5
CONTENDERS = {"listing": "a listing of /proc", "look": "patched"}


def measure_sweep(setup: Setup) -> list[Series]:
    """Measure a look that finds none, as nearly every one does, beside the listing of /proc that is part of it."""
    crowds = QUICK_BYSTANDERS if setup.quick else BYSTANDERS
    series = []
    for done, bystanders in enumerate(crowds, 1):
        with start_processes(bystanders) if bystanders else nullcontext():
            timings = look(setup.patched, QUICK_LOOKS if setup.quick else LOOKS)
        series += [
            Series("Looking for orphans", f"{bystanders:,} others", contender, to_ms(timings[name]))
            for name, contender in CONTENDERS.items()
        ]
        setup.on_progress(done / len(crowds))
    return series


def look(environment: Environment, rounds: int) -> dict[str, list[int]]:
    """Return the nanoseconds of each kind, measured by a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        variables = clean_env(Path(folder), python=environment.python) | {"PYTHONPATH": os.fspath(ROOT)}
        result = run_command(
            [os.fspath(environment.python), "-m", "tests.bench.looker", str(rounds)], environment=variables
        )
    if result.returncode:
        raise PatchError(result.stderr.decode(errors="replace").strip())
    # What a release logs when it is imported stands before.
    *_, last = result.stdout.splitlines()
    timings: dict[str, list[int]] = json.loads(last)
    return timings
