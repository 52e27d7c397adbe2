"""The ruff and the mypy that a checkout asks for: which of them run, what they refuse, and what is said without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patches import environments
from patches.__main__ import main
from patches.commands import find_tool
from patches.pull_requests import Wishes, make_pull_request
from patches.rules import load_changes
from patches.type_checking import ERRORS_SHOWN
from tests.harness.checkouts import git, write_hooks
from tests.tool import made_up
from tests.tool.made_up import (
    ADDED,
    SDK_FILE,
    make_checkout,
    refuse,
    write_change,
    write_rule,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patches.pull_requests import PullRequest
    from patches.releases import Release
    from patches.rules import Change

pytestmark = pytest.mark.usefixtures("isolated_git")

ADDED_FILE = f"task-sdk/src/{ADDED}"
HOOKS = ".pre-commit-config.yaml"
RUFF = {"ruff.toml": '[lint]\nextend-select = ["I"]\n'}
MYPY = {
    "pyproject.toml": """\
[tool.mypy]
check_untyped_defs = true
explicit_package_bases = true
mypy_path = ["$MYPY_CONFIG_FILE_DIR/task-sdk/src"]
namespace_packages = true
pretty = true
"""
}
# A ruff that has nothing against anything, and a style of its own.
FAKE_RUFF = """\
#!/bin/sh
case " $* " in
*" concise "*) cat > /dev/null ;;
*) sed s/BYE/ADIEU/ ;;
esac
"""
FAKE_VERSION = "0.0.7"
# Found by ruff 0.16 and later, unless rules are selected.
BLIND = "try:\n    BYE = 1\nexcept Exception:\n    BYE = 2\n"
OLDER_RUFF = "0.15.5"
TIMEOUT = 60
"""Seconds."""


@pytest.fixture
def changes(tmp_path: Path, sources: Path) -> list[Change]:
    """Return one change, which edits a file and brings one, in the folder `sources`."""
    write_change(tmp_path / "changes", write_rule(), files=f"[{ADDED}]")
    return load_changes(tmp_path / "changes")


@pytest.fixture
def ruffs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the tool a cache of its own for ruff."""
    cache = tmp_path / "ruffs"
    monkeypatch.setattr("patches.styling.fetch_ruff", lambda version: environments.fetch_ruff(version, cache))
    return cache


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have pip ask an index that has a made-up ruff, and nothing else."""
    pack_ruff(tmp_path / "index" / "ruff")
    with made_up.serve_index(tmp_path / "index") as url:
        made_up.use_index(monkeypatch, url)
        yield


def pack_ruff(folder: Path) -> None:
    """Write the wheel of a made-up ruff into a folder."""
    folder.mkdir(parents=True)
    tree = folder.parent.with_name("ruff-tree")
    files = {
        "data/scripts/ruff": FAKE_RUFF,
        "dist-info/METADATA": f"Metadata-Version: 2.1\nName: ruff\nVersion: {FAKE_VERSION}\n",
        "dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    for name, text in files.items():
        file = tree / f"ruff-{FAKE_VERSION}.{name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tree / f"ruff-{FAKE_VERSION}.data/scripts/ruff").chmod(0o755)
    command = [sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)


def own_ruff() -> str:
    """Return the version of the ruff that is installed here."""
    command = [find_tool("ruff"), "--version"]
    return subprocess.check_output(command, text=True, timeout=TIMEOUT).split()[1]


def request_styled(folder: Path, changes: list[Change], hooks: str | None) -> PullRequest:
    """Commit in a new checkout that has hooks."""
    files = RUFF if hooks is None else RUFF | {HOOKS: hooks}
    return make_pull_request(make_checkout(folder, files=files), changes, Wishes())


def find_notices(request: PullRequest, word: str) -> list[str]:
    return [notice for notice in request.notices if word in notice]


def test_runs_the_pinned_ruff(
    tmp_path: Path, changes: list[Change], ruffs: Path, index: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ruff of the checkout's hook fixes and formats; it is downloaded once."""
    request = request_styled(tmp_path / "checkout", changes, write_hooks(FAKE_VERSION))
    assert request.files[ADDED_FILE] == b"ADIEU = 1\n"
    assert find_notices(request, "uff") == []
    assert [path.name for path in ruffs.iterdir()] == [FAKE_VERSION]
    made_up.use_dead_index(monkeypatch)
    request = request_styled(tmp_path / "again", changes, write_hooks(FAKE_VERSION))
    assert request.files[ADDED_FILE] == b"ADIEU = 1\n"


@pytest.mark.parametrize("pinned", [True, False])
def test_own_ruff_needs_no_index(
    tmp_path: Path, changes: list[Change], ruffs: Path, monkeypatch: pytest.MonkeyPatch, *, pinned: bool
) -> None:
    """The same version is not fetched, nor is anything where no hooks are, and there is nothing to say."""
    made_up.use_dead_index(monkeypatch)
    request = request_styled(tmp_path / "checkout", changes, write_hooks(own_ruff()) if pinned else None)
    assert request.files[ADDED_FILE] == b"BYE = 1\n"
    assert find_notices(request, "uff") == []
    assert not ruffs.exists()


def test_says_that_pinned_ruff_cannot_be_had(
    tmp_path: Path, changes: list[Change], ruffs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, ours has checked the style; one notice says so and why, and the cache has no part of it."""
    made_up.use_dead_index(monkeypatch)
    request = request_styled(tmp_path / "checkout", changes, write_hooks(FAKE_VERSION))
    assert request.files[ADDED_FILE] == b"BYE = 1\n"
    (notice,) = find_notices(request, "uff")
    assert notice == (
        f"Ruff {own_ruff()} has checked the style, which need not be the checkout's own. ruff {FAKE_VERSION} could "
        "not be downloaded, for the package index did not answer: check the network, the proxy and pip's "
        "configuration."
    )
    assert list(ruffs.iterdir()) == []


@pytest.mark.usefixtures("index", "ruffs")
def test_says_that_there_is_no_such_ruff(tmp_path: Path, changes: list[Change]) -> None:
    """So it is where the index has other versions alone."""
    request = request_styled(tmp_path / "checkout", changes, write_hooks("0.0.8"))
    (notice,) = find_notices(request, "uff")
    assert notice.endswith(" The package index has no ruff 0.0.8: check the version.")


@pytest.mark.usefixtures("ruffs")
def test_refusal_says_which_ruff_it_was(
    tmp_path: Path, changes: list[Change], sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that another ruff has found may be none to the checkout's."""
    made_up.use_dead_index(monkeypatch)
    (sources / "files" / ADDED).write_text("print(undefined)\n")
    checkout = make_checkout(tmp_path / "checkout", files=RUFF | {HOOKS: write_hooks(FAKE_VERSION)})
    fault, said, _ = refuse(checkout, changes, Wishes()).splitlines()
    assert fault.startswith(f"{ADDED_FILE}: F821 ")
    assert said.startswith(f"Ruff {own_ruff()} has checked the style")


@pytest.mark.parametrize(
    "hooks",
    [
        "{",
        "\0",
        "",
        "- a list",
        "repos: nonsense\n",
        "repos: []\n",
        "repos: [{hooks: [{id: ruff}]}]\n",
        "repos: [{hooks: [{id: ruff, additional_dependencies: [7]}]}]\n",
        "repos: [{hooks: [{id: ruff, additional_dependencies: [ruff>=1]}]}]\n",
        "repos: [{hooks: [{id: ruff, additional_dependencies: [ruff==1, ruff==2]}]}]\n",
        write_hooks("soon"),
    ],
)
@pytest.mark.usefixtures("ruffs")
def test_says_that_no_ruff_is_pinned(tmp_path: Path, changes: list[Change], hooks: str) -> None:
    """Hooks that cannot be read, or name no version, are no reason to refuse: ours is used, and one notice says so."""
    request = request_styled(tmp_path / "checkout", changes, hooks)
    assert request.files[ADDED_FILE] == b"BYE = 1\n"
    (notice,) = find_notices(request, "uff")
    assert notice == (
        f"Ruff {own_ruff()} has checked the style, which need not be the checkout's own. {HOOKS} does not name a "
        "version of it."
    )


def test_older_ruff_has_fewer_rules_by_default(tmp_path: Path, changes: list[Change], sources: Path) -> None:
    """Where no rules are selected, newer versions find what upstream has never asked for: the pinned one decides."""
    (sources / "files" / ADDED).write_text(BLIND)
    unpinned = make_checkout(tmp_path / "unpinned", files=RUFF)
    assert "BLE001" in refuse(unpinned, changes, Wishes())
    request = request_styled(tmp_path / "pinned", changes, write_hooks(OLDER_RUFF))
    assert request.files[ADDED_FILE].decode() == BLIND


@pytest.fixture
def release_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have mypy look for packages in the environment of the tests."""
    monkeypatch.setattr("patches.type_checking.install_release", lambda _release: Path(sys.executable))


TYPED = Wishes(types=True)


@pytest.mark.usefixtures("release_here")
def test_refuses_new_type_errors(tmp_path: Path, changes: list[Change], sources: Path) -> None:
    """What mypy has against a file of ours is said with the file, one sentence each, and nothing is committed."""
    (sources / "files" / ADDED).write_text('BYE: int = "bye"\n')
    checkout = make_checkout(tmp_path / "checkout", files=MYPY)
    error, advice = refuse(checkout, changes, TYPED).splitlines()
    assert error.startswith(f"{ADDED_FILE}: Incompatible types in assignment (")
    assert error.endswith("  [assignment]")
    assert "mend these files where this repository has them" in advice
    assert advice.endswith("or leave mypy out with --no-types.")


@pytest.mark.usefixtures("release_here")
def test_refuses_type_error_in_edited_file(tmp_path: Path) -> None:
    """So is what an edit adds to a file of upstream's, which knows the types of what it calls."""
    write_change(tmp_path / "changes", write_rule(fix="say(7, name)"))
    said = 'def say(word: str, name: str) -> None: ...\n\n\ndef greet(name: str) -> None:\n    say("hallo", name)\n'
    checkout = make_checkout(tmp_path / "checkout", files=MYPY | {SDK_FILE: said})
    error, _ = refuse(checkout, load_changes(tmp_path / "changes"), TYPED).splitlines()
    assert error.startswith(f'{SDK_FILE}: Argument 1 to "say" has incompatible type "int"')


@pytest.mark.usefixtures("release_here")
def test_lists_some_of_many_type_errors(tmp_path: Path, changes: list[Change], sources: Path) -> None:
    """A list that is too long to read is cut, and says so."""
    lines = [f'BYE_{number}: int = "bye"\n' for number in range(ERRORS_SHOWN + 3)]
    (sources / "files" / ADDED).write_text("".join(lines))
    checkout = make_checkout(tmp_path / "checkout", files=MYPY)
    *errors, more, _ = refuse(checkout, changes, TYPED).splitlines()
    assert (len(errors), more) == (ERRORS_SHOWN, "And 3 more.")


@pytest.mark.usefixtures("release_here")
def test_type_errors_of_upstreams_may_move(tmp_path: Path) -> None:
    """What mypy had against a file before is no reason to refuse, though its line, or one that it names, is another."""
    write_change(tmp_path / "changes", write_rule("{pattern: LOUD = 1}", '"QUIET = 0\\nLOUD = 1"'))
    faulty = "LOUD = 1\n\n\ndef greet() -> None:\n    say()\n\n\ndef greet() -> None:\n    say()\n"
    checkout = make_checkout(tmp_path / "checkout", files=MYPY | {SDK_FILE: faulty})
    request = make_pull_request(checkout, load_changes(tmp_path / "changes"), TYPED)
    assert request.files[SDK_FILE].decode() == f"QUIET = 0\n{faulty}"
    assert find_notices(request, "types") == []


@pytest.mark.usefixtures("release_here")
def test_errors_in_other_files_do_not_count(tmp_path: Path, changes: list[Change], sources: Path) -> None:
    """What only our file imports, and mypy reads after the commit alone, is upstream's business."""
    (sources / "files" / ADDED).write_text("from airflow.sdk import faulty\n\nBYE = faulty.WORD\n")
    other = {"task-sdk/src/airflow/sdk/faulty.py": 'WORD: int = "word"\n'}
    checkout = make_checkout(tmp_path / "checkout", files=MYPY | other)
    assert find_notices(make_pull_request(checkout, changes, TYPED), "types") == []


@pytest.mark.parametrize(
    ("settings", "notice"),
    [
        ("", "Left out: the check of the types. The checkout has no settings for mypy."),
        ('[tool.mypy]\nplugins = ["absent.py"]\n', "Left out: the check of the types. Mypy says: "),
        ("[tool.mypy]\nno_such = 1\n", "Left out: the check of the types. Mypy says: "),
    ],
)
@pytest.mark.usefixtures("release_here")
def test_says_that_types_were_not_checked(
    tmp_path: Path, changes: list[Change], settings: str, notice: str
) -> None:
    """Without settings, or with some that mypy does not take, the commit is made, and its user is told so."""
    checkout = make_checkout(tmp_path / "checkout", files={"pyproject.toml": settings})
    (said,) = find_notices(make_pull_request(checkout, changes, TYPED), "types")
    assert said.startswith(notice)
    assert "\n" not in said


def test_says_that_release_cannot_be_installed(
    tmp_path: Path, changes: list[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network there is no release to check with: the commit is made, one notice says why, and nothing stays."""
    releases = tmp_path / "releases"

    def install(release: Release) -> Path:
        return environments.install_release(release, releases)

    monkeypatch.setattr("patches.type_checking.install_release", install)
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    checkout = make_checkout(tmp_path / "checkout", files=MYPY)
    (said,) = find_notices(make_pull_request(checkout, changes, TYPED), "types")
    assert said.startswith(
        "Left out: the check of the types. An environment could not be made, for uv says: "
    )
    assert "\n" not in said
    assert list(releases.iterdir()) == []


def test_says_that_there_is_no_interpreter(
    tmp_path: Path, changes: list[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an interpreter that the release supports, likewise."""

    def fail(release: Release) -> Path:
        raise environments.NoInterpreterError(f"No Python is installed for SDK {release.version}.")

    monkeypatch.setattr("patches.environments.find_interpreter", fail)
    monkeypatch.setattr(
        "patches.type_checking.install_release",
        lambda release: environments.install_release(release, tmp_path / "releases"),
    )
    checkout = make_checkout(tmp_path / "checkout", files=MYPY)
    assert find_notices(make_pull_request(checkout, changes, TYPED), "types") == [
        "Left out: the check of the types. No Python is installed for SDK 1.3.2."
    ]


@pytest.mark.usefixtures("release_here")
def test_command_checks_types_unless_told_otherwise(
    tmp_path: Path,
    changes: list[Change],
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By default a type error is refused; with --no-types mypy does not run, and a notice says so."""
    monkeypatch.setattr("patches.__main__.load_changes", lambda: changes)
    (sources / "files" / ADDED).write_text('BYE: int = "bye"\n')
    checkout = make_checkout(tmp_path / "checkout", files=MYPY)
    assert main(["pr", str(checkout)]) == 1
    out, err = capsys.readouterr()
    assert (out, ADDED_FILE in err) == ("", True)
    assert main(["pr", str(checkout), "--no-types"]) == 0
    assert "Left out: the check of the types, with --no-types.\n" in capsys.readouterr().out
    assert git(checkout, "branch", "--show-current") == "task-sdk-politeness\n"
