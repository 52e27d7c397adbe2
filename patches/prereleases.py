"""Pre-releases of the SDK, as stand-ins for states that upstream's main has had: which changes apply to them."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.version import Version
from rich.table import Column, Table

from patches.errors import PatchError
from patches.releases import all_releases, find_nearest, name_sdk_version
from patches.rules import ADVICE, add_needed, compute_patch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from patches.releases import Release
    from patches.rules import Change, Tree

# Where upstream's code differs from every supported release in more than the place of a line.
NOTES = {
    Version("1.0.0b4"): "as 1.0.0rc1; nor does the supervisor answer failed requests",
    Version("1.0.0rc1"): "the supervisor does not keep the task instance, nor has it send_msg()",
    Version("1.0.0rc2"): "the task's log does not name the signal that has ended the task",
}


@dataclass(frozen=True)
class Trial:
    """What came of the changes on a pre-release, with the rules of a release."""

    version: Version
    release: Release
    refused: tuple[str, ...] = ()
    """The changes that do not apply, even if only they and what they need are tried."""
    reasons: tuple[str, ...] = ()
    """A sentence for every rule that does not match, and every file that is in the way."""


def read_prerelease(text: str) -> Version:
    """Return the SDK version of a pre-release that is named by its Airflow or SDK version."""
    version = Version(name_sdk_version(text))
    if not version.is_prerelease:
        raise PatchError(f"{text} is no pre-release: give one like 3.3.0b1, or none to try all.")
    return version


def choose_rules(version: Version, *, before: bool = False) -> Release | None:
    """Return the release whose rules a checkout of a pre-release gets, or that of the last release before it."""
    if not before:
        return find_nearest(version)
    earlier = [release for release in all_releases() if Version(release.version) < version]
    return earlier[-1] if earlier else None


def try_changes(wheel: Path, version: Version, release: Release, changes: Sequence[Change]) -> Trial:
    """Apply the changes to a wheel, which stays as it is, with the rules of a release."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            tree = zipfile.Path(archive)
            reasons = _find_reasons(tree, release, changes)
            if not reasons:
                return Trial(version, release)
            refused = [
                change.name
                for change in changes
                if _find_reasons(tree, release, add_needed(changes, [change.name], release))
            ]
    except (zipfile.BadZipFile, zlib.error):
        raise PatchError(f"{wheel} is damaged: delete it and try again.") from None
    return Trial(version, release, tuple(refused), reasons)


def make_table(trials: Iterable[Trial], changes: Sequence[Change]) -> Table:
    """Return a table with a row for each pre-release."""
    table = Table(Column("SDK", no_wrap=True), Column("rules of", no_wrap=True), "does not apply", "note")
    for trial in trials:
        refused = "all" if len(trial.refused) == len(changes) else ", ".join(trial.refused)
        table.add_row(
            str(trial.version),
            trial.release.version,
            refused,
            NOTES.get(trial.version, "") if refused else "",
        )
    return table


def describe_trials(trials: Sequence[Trial]) -> list[str]:
    """Return the reasons of the pre-releases that do not take every change, and a last line with the numbers."""
    lines = []
    for trial in trials:
        if trial.reasons:
            lines.append(f"SDK {trial.version}, with the rules for {trial.release.version}:")
            lines += [f"  {reason}" for reason in trial.reasons]
    taken = sum(not trial.reasons for trial in trials)
    return [*lines, f"Every change applies to {taken} of {len(trials)} pre-releases."]


def refuse_surprises(trials: Iterable[Trial]) -> None:
    """Raise a PatchError with the pre-releases that do not take every change, although no note says why."""
    surprises = [str(trial.version) for trial in trials if trial.reasons and trial.version not in NOTES]
    if surprises:
        raise PatchError(
            f"No note says why changes do not apply to {', '.join(surprises)}: anchor the rules above better or, where "
            "upstream's code differs, say so under NOTES in patches/prereleases.py."
        )


def _find_reasons(tree: Tree, release: Release, changes: Sequence[Change]) -> tuple[str, ...]:
    try:
        compute_patch(tree, release, changes)
    except PatchError as error:
        # The sentences name the release whose rules these are, and not the one that they do not match.
        named = f" of SDK {release.version}"
        return tuple(sentence.replace(named, "") for sentence in error.sentences if sentence != ADVICE)
    return ()
