"""Trying the changes on pre-releases, which an index on loopback serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from packaging.version import Version

from patches import __main__ as command_line, prereleases, upstream
from patches.errors import PatchError
from patches.releases import all_releases, find_nearest, last_of_lines
from patches.rules import load_changes
from patches.upstream import hash_file, list_prereleases, wheel_name
from tests.tool import made_up
from tests.tool.made_up import FILE, INDEX_PATH, write_change, write_rule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from patches.rules import Change

VERSIONS = ("1.1.0b1", "1.2.0rc1", "1.2.0")
ABSENT = write_rule("{pattern: absent()}", "x", id="seek-the-absent")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the command a cache of its own."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(
        command_line, "fetch_prerelease", lambda version: upstream.fetch_prerelease(version, cache)
    )
    return cache


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve two pre-releases and a release to a pip that asks nobody else; give their folder."""
    served = tmp_path / "index" / INDEX_PATH
    served.mkdir(parents=True)
    for version in VERSIONS:
        made_up.pack_wheel(served, version)
    with made_up.serve_index(served.parent) as url:
        made_up.use_index(monkeypatch, url)
        yield served


@pytest.fixture
def changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """Have the command apply a change that fits, one that needs it and does not fit, and one more that fits."""
    folder = tmp_path / "changes"
    write_change(folder, write_rule(), number=10)
    write_change(folder, ABSENT, number=20, name="search", needs="[politeness]")
    whisper = write_rule("{pattern: 'say(\"HALLO\", $NAME)'}", "say($NAME)", id="whisper")
    write_change(folder, whisper, number=30, name="silence")
    changes = load_changes(folder)
    monkeypatch.setattr(command_line, "load_changes", lambda: changes)
    return changes


def use_changes(monkeypatch: pytest.MonkeyPatch, folder: Path, *rules: str) -> None:
    changes = made_up.load(folder, *rules)
    monkeypatch.setattr(command_line, "load_changes", lambda: changes)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command and return its status, what it printed, and its errors."""
    status = command_line.main(["prereleases", *arguments])
    return status, *capsys.readouterr()


def read_rows(output: str) -> list[list[str]]:
    rows = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


@pytest.mark.usefixtures("index")
def test_lists_prereleases_alone() -> None:
    """Of what the index has the pre-releases count, in order."""
    assert list_prereleases() == [Version("1.1.0b1"), Version("1.2.0rc1")]


def test_tries_all_that_the_index_has(
    index: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each pre-release has a row with the release whose rules it gets; the downloads are kept, and as upstream made them."""
    use_changes(monkeypatch, tmp_path / "changes", write_rule())
    status, output, errors = run(capsys)
    assert (status, errors) == (0, "")
    assert read_rows(output) == [["1.1.0b1", "1.1.0", "", ""], ["1.2.0rc1", "1.2.0", "", ""]]
    assert output.endswith("Every change applies to 2 of 2 pre-releases.\n")
    names = [wheel_name(version) for version in VERSIONS[:2]]
    assert sorted(path.name for path in cache.iterdir()) == names
    assert all(hash_file(cache / name) == hash_file(index / name) for name in names)


@pytest.mark.usefixtures("index", "changes", "cache")
def test_says_what_does_not_apply(capsys: pytest.CaptureFixture[str]) -> None:
    """A change that does not fit is told from those that do; its rule is named, and the status is 1."""
    status, output, errors = run(capsys, "3.2.0rc1")
    assert status == 1
    assert read_rows(output) == [["1.2.0rc1", "1.2.0", "search", ""]]
    assert output.splitlines()[-3:] == [
        "SDK 1.2.0rc1, with the rules for 1.2.0:",
        f"  Rule seek-the-absent (20-search.yml) on {FILE}: 0 matches instead of 1.",
        "Every change applies to 0 of 1 pre-releases.",
    ]
    assert errors.startswith(
        "No note says why changes do not apply to 1.2.0rc1: anchor the rules above better"
    )
    assert errors.count("\n") == 1


@pytest.mark.usefixtures("index", "changes", "cache")
def test_note_explains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a note explains is in the table with its note, and is no failure."""
    monkeypatch.setitem(prereleases.NOTES, Version("1.2.0rc1"), "it says nothing")
    status, output, errors = run(capsys, "1.2.0rc1")
    assert (status, errors) == (0, "")
    assert read_rows(output) == [["1.2.0rc1", "1.2.0", "search", "it says nothing"]]


@pytest.mark.usefixtures("index", "changes", "cache")
def test_release_before_may_differ(capsys: pytest.CaptureFixture[str]) -> None:
    """What the rules of the release before do not match is reported, and is no failure."""
    status, output, errors = run(capsys, "1.2.0rc1", "--before")
    assert (status, errors) == (0, "")
    assert "  Rule seek-the-absent (20-search.yml)" in output


@pytest.mark.usefixtures("index", "cache")
def test_tries_rules_of_the_release_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As tomorrow's main, a pre-release gets the rules that were there before its release was."""
    use_changes(
        monkeypatch,
        tmp_path / "changes",
        write_rule(metadata="releases: '<1.2.0'"),
        write_rule("{pattern: absent()}", "x", id="later", metadata="releases: '>=1.2.0'"),
    )
    assert run(capsys, "1.2.0rc1")[0] == 1
    status, output, _ = run(capsys, "1.2.0rc1", "--before")
    assert status == 0
    assert output.endswith("Every change applies to 1 of 1 pre-releases.\n")
    before = [release.version for release in all_releases() if release.version.startswith("1.1.")]
    assert read_rows(output) == [["1.2.0rc1", before[-1], "", ""]]


def test_cached_prerelease_needs_no_index(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in the cache is not downloaded again."""
    made_up.use_dead_index(monkeypatch)
    made_up.pack_wheel(cache, "1.2.0rc1")
    use_changes(monkeypatch, tmp_path / "changes", write_rule())
    assert run(capsys, "1.2.0rc1")[0] == 0


def test_says_that_index_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network there is no list, and one sentence says so."""
    made_up.use_dead_index(monkeypatch)
    status, output, errors = run(capsys)
    assert (status, output) == (1, "")
    assert errors.startswith(
        "The package index gave no list of the versions of apache-airflow-task-sdk: check"
    )
    assert errors.count("\n") == 1


@pytest.mark.usefixtures("index", "changes")
def test_says_that_prerelease_does_not_exist(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pre-release that the index lacks is named, and nothing is left in the cache."""
    status, output, errors = run(capsys, "3.2.0rc9")
    assert (status, output) == (1, "")
    assert errors == f"The package index has no {wheel_name('1.2.0rc9')}: check the version.\n"
    assert not list(cache.iterdir())


@pytest.mark.parametrize("damage", [b"no archive", None], ids=["no-archive", "cut-short"])
@pytest.mark.usefixtures("changes")
def test_refuses_damaged_download(
    cache: Path, capsys: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    """A file in the cache that is no whole wheel is named, with what to do."""
    wheel = made_up.pack_wheel(cache, "1.2.0rc1")
    wheel.write_bytes(damage or wheel.read_bytes()[:200])
    status, output, errors = run(capsys, "1.2.0rc1")
    assert (status, output, errors) == (1, "", f"{wheel} is damaged: delete it and try again.\n")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("nonsense", "'nonsense' is not a version"),
        ("3.2.0", "3.2.0 is no pre-release: give one like 3.3.0b1, or none to try all."),
        ("0.9.0b1", "No rules are for a state that old: give a pre-release of a supported line."),
    ],
)
def test_refuses_what_is_no_prerelease(
    capsys: pytest.CaptureFixture[str], version: str, message: str
) -> None:
    """Nothing is downloaded for what cannot be tried."""
    status, output, errors = run(capsys, version)
    assert (status, output) == (1, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.2.0b1", "1.2.0"),
        ("1.3.1rc2", "1.3.1"),
        ("1.0.5rc1", "1.0.6"),
        ("1.0.99rc1", "1.0.6"),
        ("1.99.0b1", last_of_lines()[-1].version),
    ],
)
def test_finds_rules_of_the_next_release(version: str, expected: str) -> None:
    """A pre-release gets the rules of what it became, or else of the last release before it."""
    release = find_nearest(Version(version))
    assert release is not None
    assert release.version == expected


def test_notes_name_prereleases() -> None:
    """Every note is for a pre-release."""
    assert all(version.is_prerelease for version in prereleases.NOTES)


def test_reads_either_version() -> None:
    """A pre-release goes by its Airflow version, too."""
    assert prereleases.read_prerelease("3.3.0b1") == prereleases.read_prerelease("1.3.0b1")
    with pytest.raises(PatchError, match="is no pre-release"):
        prereleases.read_prerelease("1.3.0")
