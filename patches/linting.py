"""What can be said of the change files without upstream at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import Version

from patches.errors import PatchError
from patches.releases import all_releases
from patches.rules import PAGE_FOLDER, PAGES, SOURCES, TESTS, find_edits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from packaging.specifiers import Specifier, SpecifierSet

    from patches.releases import Release
    from patches.rules import Change, Rule

# Upstream has these, too; here they let the tests import one another.
UPSTREAM_PACKAGES = {"task_sdk/__init__.py", "task_sdk/execution_time/__init__.py"}


def lint_changes(
    changes: Sequence[Change], sources: Path = SOURCES, tests: Path = TESTS, pages: Path = PAGES
) -> None:
    """Raise a PatchError with a sentence for every fault of the change files."""
    files = {item.name for change in changes for item in (*change.files, *change.shared)}
    modules = {item.name for change in changes for item in change.tests}
    docs = {item.name for change in changes for item in change.docs}
    problems = [
        *_compare_claims(files, "files", _list_files(sources, "**/*.py"), sources),
        *_compare_claims(modules, "tests", _list_files(tests, "**/*.py") - UPSTREAM_PACKAGES, tests),
        *_compare_claims(docs, "docs", _list_files(pages, f"{PAGE_FOLDER}**/*.rst"), pages),
    ]
    for change in changes:
        for item in (*change.needs, *change.files, *change.shared, *change.tests, *change.docs):
            problems += _find_gaps(f"{item.name} in change {change.name}", item.releases)
        for rule in change.rules:
            problems += _lint_rule(rule)
    if problems:
        raise PatchError(*problems)


def _list_files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}


def _compare_claims(claimed: set[str], key: str, there: set[str], folder: Path) -> Iterator[str]:
    for file in sorted(there - claimed):
        yield f"{file} belongs to no change: name it under {key} in the change that brings it."
    for file in sorted(claimed - there):
        yield f"{file}, which a change names under {key}, is not below {folder}."


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
        yield from _find_gaps(f"Rule {rule.id} ({rule.origin})", specifiers)


def _find_gaps(where: str, specifiers: SpecifierSet) -> Iterator[str]:
    """Find the bounds that leave a supported pre-release on neither side: 1.4.0b2 is not <1.4, and not >=1.4."""
    for specifier in specifiers:
        for release in all_releases():
            if _bound_cuts_off(specifier, release):
                yield (
                    f"{where} says {specifier}, which is ambiguous for {release.version}: bound "
                    "it by a pre-release, like 1.4.0b1."
                )


def _bound_cuts_off(specifier: Specifier, release: Release) -> bool:
    version = Version(release.version)
    if not version.is_prerelease or specifier.operator not in {"<", ">="}:
        return False
    return Version(specifier.version) == Version(version.base_version)
