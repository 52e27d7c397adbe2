"""What the bench prints and writes."""

from __future__ import annotations

import json
import math
import os
import platform
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.bench.series import Series


def make_table(title: str, measured: Sequence[Series]) -> Table:
    """Return one row for each series, figure by figure."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("n", "p50", "p99", "max", "", "p50 / baseline"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    previous: Series | None = None
    for series in measured:
        if previous is None or series.figure != previous.figure:
            if previous is not None:
                table.add_section()
            table.add_row(f"[bold]{series.figure}[/]")
            previous = None
        repeated = previous is not None and series.case == previous.case
        table.add_row("" if repeated else f"  {series.case}", *describe_series(series, measured))
        previous = series
    return table


def describe_series(series: Series, measured: Sequence[Series]) -> Iterator[str]:
    yield series.contender
    yield str(len(series.samples))
    for number in (series.median, series.p99, series.maximum):
        yield f"{number:,.{count_decimals(number)}f}"
    yield series.unit
    baseline = find_baseline(series, measured)
    yield "" if baseline is series else f"{series.median / baseline.median:.2f}"
    yield series.note


def count_decimals(number: float) -> int:
    """Return how many decimals make three digits, but never more than two."""
    return max(0, 2 - math.floor(math.log10(max(1, number))))


def find_baseline(series: Series, measured: Sequence[Series]) -> Series:
    """Return what a series is compared with: the first one of its case."""
    return next(other for other in measured if (other.figure, other.case) == (series.figure, series.case))


def write_json(file: Path, measured: Sequence[Series]) -> None:
    """Write every sample, and what they were measured on."""
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    content = {"machine": machine, "series": [series.to_json() for series in measured]}
    file.write_text(json.dumps(content, indent=1) + "\n")
