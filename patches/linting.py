"""What can be said of the change files without upstream at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import Version

from patches.errors import PatchError
from patches.releases import all_releases
from patches.rules import SOURCES, find_edits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from packaging.specifiers import Specifier, SpecifierSet

    from patches.releases import Release
    from patches.rules import Change, Rule


def lint_changes(changes: Sequence[Change], sources: Path = SOURCES) -> None:
    """Raise a PatchError with a sentence for every fault of the change files."""
    problems = [*_find_unclaimed_files(changes, sources), *_find_missing_files(changes, sources)]
    for change in changes:
        for rule in change.rules:
            problems += _lint_rule(rule)
    if problems:
        raise PatchError(*problems)


def _find_unclaimed_files(changes: Sequence[Change], sources: Path) -> Iterator[str]:
    claimed = {file for change in changes for file in change.files}
    for path in sorted(sources.rglob("*.py")):
        file = path.relative_to(sources).as_posix()
        if file not in claimed:
            yield f"{file} belongs to no change: name it under files in the change that brings it."


def _find_missing_files(changes: Sequence[Change], sources: Path) -> Iterator[str]:
    for change in changes:
        for file in change.files:
            if not (sources / file).is_file():
                yield f"{file} of change {change.name} is not below {sources}."


def _lint_rule(rule: Rule) -> Iterator[str]:
    try:
        find_edits(rule, b"")
        served = [release for release in all_releases() if rule.count_expected(release)]
    except PatchError as error:
        yield str(error)
    else:
        if not served:
            yield f"Rule {rule.id} ({rule.origin}) is for no supported release: remove it or mend its releases."
    for specifiers in (rule.releases, *(versions for versions, _ in rule.counts)):
        yield from _find_gaps(rule, specifiers)


def _find_gaps(rule: Rule, specifiers: SpecifierSet) -> Iterator[str]:
    """Find the bounds that leave a supported pre-release on neither side: 1.4.0b2 is not <1.4, and not >=1.4."""
    for specifier in specifiers:
        for release in all_releases():
            if _bound_cuts_off(specifier, release):
                yield (
                    f"Rule {rule.id} ({rule.origin}) says {specifier}, which is ambiguous for {release.version}: bound "
                    "it by a pre-release, like 1.4.0b1."
                )


def _bound_cuts_off(specifier: Specifier, release: Release) -> bool:
    version = Version(release.version)
    if not version.is_prerelease or specifier.operator not in {"<", ">="}:
        return False
    return Version(specifier.version) == Version(version.base_version)
