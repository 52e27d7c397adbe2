"""The figures of the bench, in the order of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.kill import measure_kill
from tests.bench.plain import measure_plain
from tests.bench.running import measure_running
from tests.bench.scale import measure_bystanders, measure_scale
from tests.bench.sweep import measure_sweep
from tests.bench.tasks import measure_noticing, measure_start
from tests.bench.timeline import measure_timeline
from tests.bench.tool import measure_tool

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.series import Series
    from tests.bench.setup import Setup

FIGURES: dict[str, Callable[[Setup], list[Series]]] = {
    "noticing": measure_noticing,
    "plain": measure_plain,
    "kill": measure_kill,
    "scale": measure_scale,
    "bystanders": measure_bystanders,
    "start": measure_start,
    "sweep": measure_sweep,
    "running": measure_running,
    "tool": measure_tool,
    "timeline": measure_timeline,
}
