"""How long it takes to end trees of up to 5,000 processes, alone on the machine and among many others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from tests.bench.drawing import draw_scale
from tests.bench.series import Series
from tests.bench.trees import allow_pidfds, start_processes
from tests.bench.ways import name_ways

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.setup import Setup

ROUNDS = 3
SIZES, QUICK_SIZES = (10, 100, 1000, 5000), (10,)
BYSTANDERS, QUICK_BYSTANDERS = (0, 1000, 10_000), (10,)
SIZE_AMONG_BYSTANDERS = 100


def measure_scale(setup: Setup) -> list[Series]:
    """Measure until the last process has ended, beside other ways to end a tree."""
    sizes = QUICK_SIZES if setup.quick else SIZES
    allow_pidfds(2 * max(sizes))  # whoever ends what is left holds it once more
    rounds = count_rounds(setup)
    ways = name_ways(setup)
    results: dict[tuple[int, str], list[tuple[float, int]]] = {
        (size, way): [] for size in sizes for way in ways
    }
    for number in range(rounds):
        for done, ((size, way), measured) in enumerate(results.items(), 1):
            measured.append(ways[way](size))
            setup.on_progress((number + done / len(results)) / rounds)
    series = [
        describe("Ending a tree", f"{size:,} processes", way, measured)
        for (size, way), measured in results.items()
    ]
    draw_scale(series, sizes, setup.folder / "scale.svg")
    return series


def measure_bystanders(setup: Setup) -> list[Series]:
    """Measure the same for one size, while processes run that have nothing to do with it."""
    crowds = QUICK_BYSTANDERS if setup.quick else BYSTANDERS
    allow_pidfds(max(crowds))
    figure = f"Ending {SIZE_AMONG_BYSTANDERS} processes among others"
    series = []
    for done, bystanders in enumerate(crowds, 1):
        with start_processes(bystanders) if bystanders else nullcontext():
            results: dict[str, list[tuple[float, int]]] = {}
            for _ in range(count_rounds(setup)):
                for way, end in name_ways(setup).items():
                    results.setdefault(way, []).append(end(SIZE_AMONG_BYSTANDERS))
        series += [
            describe(figure, f"{bystanders:,} others", way, measured) for way, measured in results.items()
        ]
        setup.on_progress(done / len(crowds))
    return series


def count_rounds(setup: Setup) -> int:
    return 1 if setup.quick else ROUNDS


def describe(figure: str, case: str, way: str, results: Sequence[tuple[float, int]]) -> Series:
    samples = [seconds * 1000 for seconds, _ in results]
    left = max(left for _, left in results)
    return Series(figure, case, way, samples, note=f"{left} left" if left else "")
