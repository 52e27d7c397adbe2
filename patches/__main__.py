"""The command line: python -m patches {wheel,check,lint}."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from patches.checking import check_version
from patches.commands import interrupt_on_sigterm, run_parallel
from patches.errors import PatchError
from patches.linting import lint_changes
from patches.releases import all_releases, find_release
from patches.rules import load_changes
from patches.upstream import DOWNLOADS_AT_ONCE, fetch_wheel
from patches.wheels import build_wheel, prepare_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patches.releases import Release
    from patches.rules import Change

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, or 1 after a sentence on stderr, or 130 when interrupted."""
    options = _parse_arguments(arguments)
    try:
        options.run(options)
    except PatchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: nothing was left half-written.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m patches", description="Patches the SDK of Airflow 3.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    wheel = commands.add_parser("wheel", help="build patched wheels")
    wheel.add_argument("versions", nargs="*", metavar="VERSION", help="of Airflow or its SDK; all by default")
    wheel.add_argument("--output", type=Path, default=Path("dist"), metavar="FOLDER", help="default: dist")
    wheel.set_defaults(run=_run_wheel)

    check = commands.add_parser(
        "check", help="say whether the changes apply to a release, even an unlisted one"
    )
    check.add_argument("version", metavar="VERSION", help="of Airflow or its SDK")
    check.set_defaults(run=_run_check)

    lint = commands.add_parser("lint", help="check the change files without upstream at hand")
    lint.set_defaults(run=_run_lint)
    return parser.parse_args(arguments)


def _run_wheel(options: argparse.Namespace) -> None:
    # A dict: the same release may be named twice, by its Airflow and by its SDK version.
    releases = list(dict.fromkeys(map(find_release, options.versions))) or list(all_releases())
    changes = load_changes()
    prepare_output(options.output)
    with _show_progress() as progress:
        wheels = _fetch_wheels(releases, progress)
        _build_wheels(wheels, changes, options.output, progress)


def _fetch_wheels(releases: Sequence[Release], progress: Progress) -> dict[Release, Path]:
    """Fetch the wheels, and give up at the first that fails: without a network all of them would."""
    fetches = run_parallel(fetch_wheel, releases, workers=DOWNLOADS_AT_ONCE)
    with contextlib.closing(fetches):
        return {
            release: future.result()
            for release, future in progress.track(fetches, len(releases), description="Downloading")
        }


def _build_wheels(
    wheels: dict[Release, Path], changes: Sequence[Change], output: Path, progress: Progress
) -> None:
    """Build what can be built, and report what cannot in the end."""

    def build(release: Release) -> Path:
        return build_wheel(release, wheels[release], changes, output)

    problems: list[str] = []
    builds = run_parallel(build, wheels, workers=os.cpu_count() or 1)
    with contextlib.closing(builds):
        for release, future in progress.track(builds, len(wheels), description="Building"):
            try:
                progress.console.print(f"Airflow {release.airflow}: {future.result()}")
            except PatchError as error:
                problems += error.sentences
    if problems:
        raise PatchError(*problems)


def _show_progress() -> Progress:
    console = Console(soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _run_check(options: argparse.Namespace) -> None:
    print(check_version(options.version, load_changes()))


def _run_lint(_options: argparse.Namespace) -> None:
    changes = load_changes()
    lint_changes(changes)
    print(
        f"{len(changes)} changes with {sum(len(change.rules) for change in changes)} rules: no fault found."
    )


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
