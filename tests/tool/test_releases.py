"""The table of supported releases."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from patches import releases
from patches.errors import PatchError
from patches.releases import Release, find_release


@pytest.mark.parametrize("version", ["3.1.8", "1.1.8"])
def test_finds_release_by_either_version(version: str) -> None:
    """A release goes by the version of Airflow and by that of its SDK."""
    assert (find_release(version).airflow, find_release(version).version) == ("3.1.8", "1.1.8")


@pytest.mark.parametrize("version", ["3.0.5", "2.11.0", "", "latest"])
def test_refuses_unknown_release(version: str) -> None:
    """The message says which releases there are."""
    with pytest.raises(PatchError, match=r"is not a supported release: .*3\.0\.0, .*3\.3\.2"):
        find_release(version)


@pytest.mark.parametrize("release", releases.all_releases(), ids=lambda release: release.version)
def test_rows_are_complete(release: Release) -> None:
    """A row pairs 1.N.P with 3.N.P and has a date, a Python range and two hashes."""
    assert release.airflow == releases.name_airflow_version(release.version)
    assert releases.name_sdk_version(release.airflow) == release.version
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", release.as_of)
    assert release.oldest_python >= (3, 9)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (release.wheel, release.sdist))


def test_lines_end_with_their_last_release() -> None:
    """For each line the table's last release is the one that upstream's suites run on."""
    last = {Version(release.version).release[:2]: release for release in releases.all_releases()}
    assert releases.last_of_lines() == list(last.values())


def test_documents_name_the_local_version() -> None:
    """A command that is copied from a document installs the wheel that is built."""
    documents = [releases.ROOT / "README.md", *(releases.ROOT / "docs").glob("*.md")]
    named = {
        document.name: set(re.findall(r"\bteardown\.\d+", document.read_text("utf-8")))
        for document in documents
    }
    assert named["README.md"]
    assert {name for name, versions in named.items() if versions - {releases.local_version()}} == set()


@pytest.mark.parametrize("release", releases.all_releases(), ids=lambda release: release.version)
def test_local_version_satisfies_exact_pin(release: Release) -> None:
    """Whoever pins the SDK to a release accepts the patched one."""
    pin = Requirement(f"{releases.PROJECT}=={release.version}").specifier
    assert pin.contains(f"{release.version}+{releases.local_version()}", prereleases=True)
