"""Look for orphans in the environment of a patched release: `python -m tests.bench.looker ROUNDS`, the repository on PYTHONPATH.

Prints a JSON object: the nanoseconds that each look took, and each listing of /proc, which no look can do without. Python 3.9 and
the packages of the environment.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import psutil

from airflow.sdk.execution_time.teardown.orphans import find_orphans

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS: dict[str, Callable[[], object]] = {"listing": psutil.pids, "look": find_orphans}


def measure(way: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    way()
    return time.perf_counter_ns() - began


def main() -> None:
    rounds = range(int(sys.argv[1]))
    measured = [{name: measure(way) for name, way in WAYS.items()} for _ in rounds]
    sys.stdout.write(json.dumps({name: [each[name] for each in measured] for name in WAYS}) + "\n")


if __name__ == "__main__":
    main()
