"""The command line: python -m tests.upstream [VERSION...]."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from patches.checkouts import open_checkout
from patches.commands import interrupt_on_sigterm
from patches.environments import NoInterpreterError
from patches.pull_requests import choose_release
from patches.releases import find_release, last_of_lines
from tests.harness.consoles import UNUSABLE, explains_failures, open_console
from tests.harness.wheels import DIST, build_patched_wheel
from tests.upstream.checkouts import SDK, build_sdk, export_parent
from tests.upstream.judging import Original, judge_release
from tests.upstream.report import print_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from patches.releases import Release
    from tests.upstream.judging import Verdict

DEFAULT_SUITE = "tests/task_sdk/execution_time"
REGRESSED = 1
# A file has no width of its own; at this one no cell of the table is cut.
COLUMNS_IN_FILE = 100


@explains_failures()
def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every release asked for was tested and none regressed, 1 if one did, 2 if one was not tested."""
    return run(parse_arguments(arguments), open_console(COLUMNS_IN_FILE))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nox -s upstream --",
        description="Run upstream's own tests, unmodified, on the stock wheel and on the patched one, and compare.",
    )
    parser.add_argument(
        "versions",
        nargs="*",
        metavar="VERSION",
        help="of Airflow or its SDK; the last of every line by default",
    )
    parser.add_argument(
        "--suite",
        default=DEFAULT_SUITE,
        metavar="TESTS",
        help="path or node id in upstream's sdist; default: %(default)s",
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="test this wheel, not the one built here")
    parser.add_argument(
        "--checkout",
        type=Path,
        metavar="PATH",
        help="compare the SDK in a checkout of apache/airflow with the commit before, by the tests of that",
    )
    options = parser.parse_args(arguments)
    if options.checkout and (options.versions or options.wheel):
        parser.error("--checkout says the version, and what to test: give it alone")
    if options.wheel and len(options.versions) != 1:
        parser.error("--wheel belongs to one release: name its version")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    """Judge the releases one after the other, for upstream's tests measure time; return the exit status."""
    if options.checkout:
        return run_checkout(options, console)
    releases = list(dict.fromkeys(map(find_release, options.versions))) or last_of_lines()
    verdicts: list[Verdict] = []
    not_run: dict[Release, str] = {}
    with show_progress(console) as progress:
        for release in releases:
            try:
                wheel = options.wheel or build_patched_wheel(release, DIST)
                verdicts.append(judge_release(release, wheel, options.suite, progress))
            except NoInterpreterError as error:
                not_run[release] = str(error)
    print_report(console, verdicts, not_run)
    if any(verdict.regressions for verdict in verdicts):
        return REGRESSED
    # Without versions given, one line that no interpreter here serves is no failure; none at all is.
    return UNUSABLE if not_run and (options.versions or not verdicts) else 0


def run_checkout(options: argparse.Namespace, console: Console) -> int:
    """Judge the SDK in a checkout, among the dependencies of the release that is nearest; return the exit status."""
    checkout = open_checkout(options.checkout)
    release, notices = choose_release(checkout, None)
    for notice in notices:
        console.print(notice)
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(export_parent(checkout.folder))
        stock, patched = (
            build_sdk(folder, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            for folder in (parent, checkout.folder)
        )
        progress = stack.enter_context(show_progress(console))
        verdict = judge_release(release, patched, options.suite, progress, Original(stock, parent / SDK))
    print_report(console, [verdict], {})
    return REGRESSED if verdict.regressions else 0


def show_progress(console: Console) -> Progress:
    """Show what runs now and since when; on a terminal alone, for a log gets a line for every run that has ended."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
