"""How long a task takes to end once the API answers its heartbeat with 409, for each kind of process that it has started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patches.releases import find_release
from tests.bench.series import Series
from tests.harness.environments import create_environment
from tests.harness.shapes import BY_NAME, SHAPES
from tests.harness.supervised import run_supervised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.setup import Setup
    from tests.harness.environments import Environment
    from tests.harness.shapes import Shape
    from tests.harness.supervised import Outcome

ROUNDS = 3
QUICK_SHAPES = [BY_NAME["virtualenv"]]
UPSTREAM_FIXED = "1.3.2"
"""The first release with upstream's own fix of issue 65505: whoever improves on stock improves on this one."""


def measure_kill(setup: Setup) -> list[Series]:
    """Measure from the 409 to the return of wait(), or its exception."""
    contenders = {"stock": setup.stock, "patched": setup.patched}
    if setup.stock.release.version != UPSTREAM_FIXED:
        fixed = create_environment(find_release(UPSTREAM_FIXED))
        contenders = {"stock": setup.stock, f"stock {fixed.release.airflow}": fixed, "patched": setup.patched}
    shapes, rounds = (QUICK_SHAPES, 1) if setup.quick else (SHAPES, ROUNDS)
    outcomes = run_rounds(setup, contenders, shapes, rounds)
    return [describe(shape, contender, outcomes[shape, contender]) for shape, contender in outcomes]


def run_rounds(
    setup: Setup, contenders: dict[str, Environment], shapes: Sequence[Shape], rounds: int
) -> dict[tuple[Shape, str], list[Outcome]]:
    outcomes: dict[tuple[Shape, str], list[Outcome]] = {
        (shape, contender): [] for shape in shapes for contender in contenders
    }
    for number in range(rounds):
        for done, ((shape, contender), measured) in enumerate(outcomes.items(), 1):
            measured.append(run_supervised(contenders[contender], shape, env=setup.settings))
            setup.on_progress((number + done / len(outcomes)) / rounds)
    return outcomes


def describe(shape: Shape, contender: str, outcomes: Sequence[Outcome]) -> Series:
    samples = [outcome.seconds * 1000 for outcome in outcomes]
    return Series(
        "Killing: 409 until wait() returns", shape.name, contender, samples, note=name_faults(outcomes)
    )


def name_faults(outcomes: Sequence[Outcome]) -> str:
    """Say what was left and what became of the supervisor, if anything is wrong."""
    left = max(len(outcome.left) for outcome in outcomes)
    failed = sum(not outcome.returned for outcome in outcomes)
    faults = {f"{left} left": left, f"{failed} crashed or hung": failed}
    return ", ".join(fault for fault, count in faults.items() if count)
