"""Downloads, from indexes on loopback."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from patches.checking import check_version
from patches.errors import PatchError
from patches.rules import ADVICE
from patches.upstream import fetch_sdist, fetch_wheel, hash_file
from tests.tool import made_up
from tests.tool.made_up import FILE, INDEX_PATH, load, write_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from patches.releases import Release

    Fetch = Callable[[Release, Path], Path]

VERSION = "1.9.0"
FETCHES = pytest.mark.parametrize("fetch", [fetch_wheel, fetch_sdist])


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    """Serve a release's wheel and sdist to a pip that asks nobody else."""
    served = tmp_path / "index" / INDEX_PATH
    served.mkdir(parents=True)
    wheel = made_up.pack_wheel(served, VERSION)
    sdist = made_up.pack_sdist(served, VERSION)
    with made_up.serve_index(served.parent) as url:
        made_up.use_index(monkeypatch, url)
        yield dataclasses.replace(made_up.release(VERSION), wheel=hash_file(wheel), sdist=hash_file(sdist))


@pytest.fixture
def dead_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pip an index that nobody serves any more."""
    made_up.use_dead_index(monkeypatch)


def with_wrong_hashes(release: Release) -> Release:
    return dataclasses.replace(release, wheel="0" * 64, sdist="0" * 64)


@FETCHES
def test_downloads_once(
    release: Release, tmp_path: Path, fetch: Fetch, request: pytest.FixtureRequest
) -> None:
    """A file is downloaded whole, and later taken from the cache: no index is needed any more."""
    path = fetch(release, tmp_path / "cache")
    assert hash_file(path) in (release.wheel, release.sdist)
    assert list(path.parent.iterdir()) == [path]
    request.getfixturevalue("dead_index")
    assert fetch(release, tmp_path / "cache") == path


@FETCHES
def test_refuses_download_with_another_hash(release: Release, tmp_path: Path, fetch: Fetch) -> None:
    """What the index serves under a release's name is kept only if it is that release."""
    with pytest.raises(PatchError, match=r"apache_airflow_task_sdk-1\.9\.0.* whose sha256 is not the one"):
        fetch(with_wrong_hashes(release), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@FETCHES
def test_refuses_damaged_cache(release: Release, tmp_path: Path, fetch: Fetch) -> None:
    """A file that changed in the cache is not used; the message says which one to delete."""
    path = fetch(release, tmp_path / "cache")
    path.write_bytes(b"damaged")
    with pytest.raises(PatchError) as refusal:
        fetch(release, tmp_path / "cache")
    assert str(path) in str(refusal.value)
    assert "delete it and try again" in str(refusal.value)


@pytest.mark.usefixtures("dead_index")
@FETCHES
def test_says_that_index_does_not_answer(tmp_path: Path, fetch: Fetch) -> None:
    """Without a network the message speaks of the network, and nothing is left in the cache."""
    with pytest.raises(PatchError, match="the package index did not answer: check the network"):
        fetch(made_up.release(VERSION), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("release")
def test_says_that_version_does_not_exist(tmp_path: Path) -> None:
    """A version that the index lacks is told from an index that does not answer."""
    with pytest.raises(PatchError, match=r"The package index has no .*1\.9\.7.*: check the version"):
        check_version("3.9.7", load(tmp_path / "changes", write_rule()))


def test_refuses_cache_that_cannot_be_written(release: Release, tmp_path: Path) -> None:
    """A cache that is no folder is named."""
    (tmp_path / "cache").touch()
    with pytest.raises(PatchError, match=f"{tmp_path}/cache cannot take the download"):
        fetch_wheel(release, tmp_path / "cache")


def test_check_gives_line_for_new_release(release: Release, tmp_path: Path) -> None:
    """For a release that the table lacks and that the changes apply to, the table's line is the answer."""
    answer = check_version("3.9.0", load(tmp_path / "changes", write_rule()))
    assert answer.startswith(
        "All changes apply to SDK 1.9.0. To support it, add to pyproject.toml, with the day"
    )
    line = answer.splitlines()[1]
    assert line.startswith('"1.9.0" = { airflow = "3.9.0", python = ">=3.9,<3.99", as-of = "20')
    assert line.endswith(f'wheel = "{release.wheel}", sdist = "{release.sdist}" }}')


@pytest.mark.usefixtures("release")
def test_check_lists_rules_that_do_not_match_new_release(tmp_path: Path) -> None:
    """For a release that the changes do not apply to, each rule that fails is named."""
    rules = [write_rule("{pattern: absent()}", "x", id=name) for name in ("first", "second")]
    with pytest.raises(PatchError) as refusal:
        check_version(VERSION, load(tmp_path / "changes", *rules))
    *failures, advice = refusal.value.sentences
    assert failures == [
        f"Rule {name} (10-politeness.yml) on {FILE} of SDK 1.9.0: 0 matches instead of 1."
        for name in ("first", "second")
    ]
    assert advice == ADVICE


@pytest.mark.parametrize("version", ["latest", "3.x", ""])
def test_check_refuses_what_is_no_version(tmp_path: Path, version: str) -> None:
    """Nothing is downloaded for what cannot be a version."""
    with pytest.raises(PatchError, match="is not a version"):
        check_version(version, load(tmp_path / "changes", write_rule()))
