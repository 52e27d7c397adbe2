"""The command line: python -m patches {wheel,check,prereleases,lint,pr,breeze}."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from patches.breeze import list_commands, run_commands
from patches.checking import check_version
from patches.checkouts import open_checkout
from patches.commands import interrupt_on_sigterm, run_parallel
from patches.errors import PatchError
from patches.linting import lint_changes
from patches.prereleases import (
    choose_rules,
    describe_trials,
    make_table,
    read_prerelease,
    refuse_surprises,
    try_changes,
)
from patches.pull_requests import Wishes, choose_release, make_pull_request
from patches.releases import all_releases, find_release
from patches.rules import load_changes
from patches.upstream import DOWNLOADS_AT_ONCE, fetch_prerelease, fetch_wheel, list_prereleases
from patches.wheels import build_wheel, prepare_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from packaging.version import Version

    from patches.prereleases import Trial
    from patches.pull_requests import PullRequest
    from patches.releases import Release
    from patches.rules import Change

INTERRUPTED = 130
# A file has no width of its own; at this one no row of a table is wrapped.
COLUMNS_IN_FILE = 200


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

    prereleases = commands.add_parser(
        "prereleases", help="try the changes on the pre-releases that the package index has"
    )
    prereleases.add_argument(
        "versions", nargs="*", metavar="VERSION", help="of Airflow or its SDK, like 3.3.0b1; all by default"
    )
    prereleases.add_argument(
        "--before",
        action="store_true",
        help="with the rules of the last release before each, as if it were tomorrow's main",
    )
    prereleases.set_defaults(run=_run_prereleases)

    lint = commands.add_parser("lint", help="check the change files without upstream at hand")
    lint.set_defaults(run=_run_lint)

    request = commands.add_parser(
        "pr", help="commit the changes on a new branch of an apache/airflow checkout"
    )
    _add_checkout(request)
    request.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CHANGE",
        help="not all changes; what they need is taken along",
    )
    request.add_argument("--branch", metavar="NAME", help="default: task-sdk-teardown, or task-sdk-CHANGE")
    request.add_argument("--number", type=int, metavar="N", help="of the pull request, for the newsfragment")
    request.add_argument("--format-patch", type=Path, metavar="FILE", help="write a patch for `git am`, too")
    request.add_argument(
        "--no-types",
        action="store_true",
        help="leave out mypy, which takes a minute, and more the first time",
    )
    request.set_defaults(run=_run_pr)

    breeze = commands.add_parser("breeze", help="run upstream's own checks on a checkout, in Breeze")
    _add_checkout(breeze)
    breeze.set_defaults(run=_run_breeze)
    return parser.parse_args(arguments)


def _add_checkout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkout", type=Path, metavar="PATH", help="the top folder of the checkout")
    parser.add_argument("--line", help="like main or v3-2-test, or a version; found out by default")


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
                # What to do about it is said once, in the end.
                problems = [problem for problem in problems if problem not in error.sentences]
                problems += error.sentences
    if problems:
        raise PatchError(*problems)


def _show_progress() -> Progress:
    console = Console(soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _run_check(options: argparse.Namespace) -> None:
    print(check_version(options.version, load_changes()))


def _run_prereleases(options: argparse.Namespace) -> None:
    versions = sorted(set(map(read_prerelease, options.versions))) or list_prereleases()
    rules = {version: choose_rules(version, before=options.before) for version in versions}
    chosen = {version: release for version, release in rules.items() if release}
    if not chosen:
        raise PatchError("No rules are for a state that old: give a pre-release of a supported line.")
    changes = load_changes()
    with _show_progress() as progress:
        trials = _try_prereleases(chosen, changes, progress)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = COLUMNS_IN_FILE
    console.print(make_table(trials, changes))
    for line in describe_trials(trials):
        console.print(line, soft_wrap=True)
    if not options.before:  # what differs from the release before is no surprise
        refuse_surprises(trials)


def _try_prereleases(
    rules: dict[Version, Release], changes: Sequence[Change], progress: Progress
) -> list[Trial]:
    """Fetch each pre-release and try the changes; give up at the first that cannot be read."""

    def fetch_and_try(version: Version) -> Trial:
        return try_changes(fetch_prerelease(version), version, rules[version], changes)

    runs = run_parallel(fetch_and_try, rules, workers=DOWNLOADS_AT_ONCE)
    with contextlib.closing(runs):
        return [future.result() for _, future in progress.track(runs, len(rules), description="Trying")]


def _run_lint(_options: argparse.Namespace) -> None:
    changes = load_changes()
    lint_changes(changes)
    print(
        f"{len(changes)} changes with {sum(len(change.rules) for change in changes)} rules: no fault found."
    )


def _run_pr(options: argparse.Namespace) -> None:
    wishes = Wishes(
        line=options.line,
        only=tuple(options.only),
        branch=options.branch,
        number=options.number,
        patch_file=options.format_patch,
        types=not options.no_types,
    )
    with Console(stderr=True).status("Making the commit"):
        request = make_pull_request(options.checkout, load_changes(), wishes)
    print(_describe_request(request, options))


def _describe_request(request: PullRequest, options: argparse.Namespace) -> str:
    names = ", ".join(change.name for change in request.changes)
    rules = f"the rules for SDK {request.release.version}: {names}"
    commands = [shlex.join(command) for command in list_commands(request.release)]
    return "\n".join(
        [
            f"Commit {request.commit} on the new branch {request.branch}, with {rules}.",
            *(f"  {'A' if file in request.added else 'M'} {file}" for file in sorted(request.files)),
            *request.notices,
            *([f"As a patch: {options.format_patch}"] if options.format_patch else []),
            f"Next, in {options.checkout}:",
            *(f"  {command}" for command in ["git show", *commands, f"git push YOUR-FORK {request.branch}"]),
            "The description of the pull request is docs/pull-request.md.",
        ]
    )


def _run_breeze(options: argparse.Namespace) -> None:
    checkout = open_checkout(options.checkout)
    release, _ = choose_release(checkout, options.line)
    run_commands(checkout.folder, list_commands(release))


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
