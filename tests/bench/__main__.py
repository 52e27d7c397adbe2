"""The command line: python -m tests.bench [--quick] [VERSION]."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from patches.commands import interrupt_on_sigterm
from patches.releases import find_release
from patches.wheels import prepare_output
from tests.bench.figures import FIGURES
from tests.bench.report import make_table, write_json
from tests.bench.setup import Setup
from tests.harness.consoles import explains_failures, open_console
from tests.harness.supervised import SupervisorFailedError
from tests.harness.wheels import DIST, build_patched_wheel, install_both

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.progress import TaskID

    from patches.releases import Release
    from tests.bench.series import Series

DEFAULT_VERSION = "3.1.8"
# A file has no width of its own; at this one no row of the table is wrapped.
COLUMNS_IN_FILE = 130


@explains_failures(SupervisorFailedError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 after a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__)
    parser.add_argument(
        "version", nargs="?", default=DEFAULT_VERSION, metavar="VERSION", help="of Airflow or its SDK"
    )
    parser.add_argument("--quick", action="store_true", help="few samples: whether it works, not how fast")
    parser.add_argument(
        "--figure", action="append", choices=list(FIGURES), dest="figures", help="only this; may be repeated"
    )
    options = parser.parse_args(arguments)
    console = open_console(COLUMNS_IN_FILE)
    began = time.monotonic()
    release = find_release(options.version)
    folder = DIST / f"bench-{release.airflow}"
    prepare_output(folder)
    measured = measure(release, options.figures or list(FIGURES), folder, console, quick=options.quick)
    console.print(make_table(f"Airflow {release.airflow}", measured))
    console.print(f"Every sample, and the pictures: {folder}", soft_wrap=True, highlight=False)
    console.print(f"Took {time.monotonic() - began:.0f} s.")
    return 0


def measure(
    release: Release, figures: Sequence[str], folder: Path, console: Console, *, quick: bool
) -> list[Series]:
    """Build, install and measure, with progress; write each figure into the folder when it is whole."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    measured: list[Series] = []
    with Progress(*columns, console=console) as progress:
        installing = progress.add_task(f"Installing Airflow {release.airflow}, stock and patched", total=2)
        wheel = build_patched_wheel(release, DIST)
        environments = install_both(release, wheel, lambda: progress.advance(installing))
        for name in figures:
            bar = progress.add_task(f"Measuring: {name}", total=1)
            setup = Setup(
                stock=environments[False],
                patched=environments[True],
                quick=quick,
                on_progress=functools.partial(show_part, progress, bar),
                folder=folder,
            )
            figure = FIGURES[name](setup)
            write_json(folder / f"{name}.json", figure)
            measured += figure
    return measured


def show_part(progress: Progress, bar: TaskID, part: float) -> None:
    progress.update(bar, completed=part)


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
