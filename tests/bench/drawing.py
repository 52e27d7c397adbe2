"""The pictures, drawn from what was measured."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from tests.bench.series import Series
    from tests.bench.timeline import Life, Timeline

# Text stays text, and the same data give the same file.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NO_DATE = {"Date": None}
WIDTH_INCHES = 8.0
ROW_INCHES = 0.24
FRAME_INCHES = 0.8
SCALE_HEIGHT_INCHES = 4.5

GREY, BLUE, RED, GREEN = "#6e7781", "#0969da", "#cf222e", "#1a7f37"
COLOURS = {"cgroup.kill": GREY, "psutil's recipe": BLUE, "killpg": RED, "patched": GREEN}
BAR_HEIGHT = 0.6
SUPERVISOR, RUNNER = "supervisor", "task runner"


def draw_timelines(timelines: Sequence[Timeline], file: Path) -> None:
    """Draw one panel for each side, with every process as a bar from birth to death."""
    rows = [len(timeline.lives) for timeline in timelines]
    height = sum(rows) * ROW_INCHES + len(rows) * FRAME_INCHES
    with new_picture(file, height) as figure:
        panels = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
        end = max(timeline.watched_until for timeline in timelines)
        for panel, timeline in zip(panels, timelines, strict=True):
            draw_timeline(panel, timeline)
        panels[-1].set_xlim(min(life.born for timeline in timelines for life in timeline.lives[1:]), end)
        panels[-1].set_xlabel("seconds from the 409")


def draw_timeline(panel: Axes, timeline: Timeline) -> None:
    task_end = next(life.died for life in timeline.lives if life.name == RUNNER)
    left = sum(math.isinf(life.died) for life in timeline.lives)
    for row, life in enumerate(timeline.lives):
        draw_life(panel, row, life, task_end, timeline.watched_until)
    panel.axvline(0, color="black", linewidth=1, linestyle="--")
    panel.set_yticks(range(len(timeline.lives)), [life.name for life in timeline.lives])
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.set_title(
        f"{timeline.contender}: {left} left; the supervisor {timeline.verdict}",
        loc="left",
        color=RED if left else GREEN,
        fontweight="bold",
    )


def draw_life(panel: Axes, row: int, life: Life, task_end: float, watched_until: float) -> None:
    """Draw a bar, red from the end of the task on; one that was left has an arrow at its edge."""
    died = min(life.died, watched_until)
    rightful = died if life.name == SUPERVISOR else min(died, task_end)
    colour = {SUPERVISOR: GREY, RUNNER: GREEN}.get(life.name, BLUE)
    panel.barh(row, rightful - life.born, left=life.born, height=BAR_HEIGHT, color=colour)
    panel.barh(row, died - rightful, left=rightful, height=BAR_HEIGHT, color=RED)
    if math.isinf(life.died):
        panel.plot(died, row, marker=">", color=RED, clip_on=False)
    elif life.name == RUNNER:
        panel.plot(died, row, marker="X", color="black", clip_on=False)


def draw_scale(measured: Sequence[Series], sizes: Sequence[int], file: Path) -> None:
    """Draw the median time against the size of the tree, both logarithmic, one line for each contender."""
    with new_picture(file, SCALE_HEIGHT_INCHES) as figure:
        axes = figure.subplots()
        for contender in dict.fromkeys(series.contender for series in measured):
            medians = [series.median for series in measured if series.contender == contender]
            incomplete = any(series.note for series in measured if series.contender == contender)
            axes.plot(
                sizes,
                medians,
                marker="o",
                color=COLOURS[contender],
                linestyle=":" if incomplete else "-",
                label=f"{contender} (does not end all)" if incomplete else contender,
            )
        axes.set(xscale="log", yscale="log", xlabel="processes, a third of them in sessions of their own")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_ylabel("milliseconds until all have ended")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False)


@contextmanager
def new_picture(file: Path, height: float) -> Iterator[Figure]:
    """Give a figure to draw on, and write it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        yield figure
        figure.savefig(file, metadata=NO_DATE)
