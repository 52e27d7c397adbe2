"""The patched wheels of all supported releases, built from upstream's."""

from __future__ import annotations

import base64
import collections
import csv
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from typing import TYPE_CHECKING, Any

import pytest

from patches.commands import find_tool
from patches.errors import PatchError
from patches.releases import all_releases, find_release, last_of_lines, local_version
from patches.rules import SOURCES, apply_changes, compute_patch, load_changes, select_names
from patches.upstream import fetch_wheel
from patches.wheels import build_wheel
from tests.harness.environments import create_environment
from tests.tool import made_up
from tests.tool.made_up import load, write_rule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from patches.releases import Release
    from patches.rules import Patch

    Build = Callable[[Release], Path]

TIMEOUT = 120
"""Seconds."""
EACH_RELEASE = pytest.mark.parametrize("release", all_releases(), ids=lambda release: release.version)
EACH_LINE = pytest.mark.parametrize("release", last_of_lines(), ids=lambda release: release.version)
# Upstream's own settings as far as they concern a single file.
UPSTREAM_STYLE = [
    *("--isolated", "--line-length=110", "--select=D202,E4,E7,E9,F,I,W", "--output-format=json"),
    *("--config", "lint.isort.combine-as-imports=true"),
    *("--config", 'lint.isort.known-first-party=["airflow"]'),
    *("--config", 'lint.isort.required-imports=["from __future__ import annotations"]'),
]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function that builds the wheel of a release once."""
    output = tmp_path_factory.mktemp("dist")
    return functools.cache(lambda release: build_wheel(release, fetch_wheel(release), load_changes(), output))


def read_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpack_code(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("airflow/")])
    return folder


def read_code(wheel: Path) -> dict[str, bytes]:
    return {name: content for name, content in read_wheel(wheel).items() if name.startswith("airflow/")}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, check=True, capture_output=True, text=True, timeout=TIMEOUT
    )
    return result.stdout


def count_violations(folder: Path) -> collections.Counter[str]:
    """Count what ruff finds below a folder, by rule and by file."""
    command = [find_tool("ruff"), "check", "--exit-zero", *UPSTREAM_STYLE, str(folder)]
    found = json.loads(run(*command))
    return collections.Counter(
        f"{os.path.relpath(fault['filename'], folder)}: {fault['code']}" for fault in found
    )


def list_unformatted(folder: Path) -> set[str]:
    """Return the files below a folder that ruff would format otherwise."""
    command = [find_tool("ruff"), "format", "--diff", "--isolated", "--line-length", "110", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert result.returncode in (0, 1), result.stderr  # 2 says that it could not run
    return {line.split(str(folder))[-1] for line in result.stdout.splitlines() if line.startswith("+++ ")}


@EACH_RELEASE
def test_every_release_builds(build: Build, release: Release) -> None:
    """Every rule matches as often as it says in every supported release, and the name says what it is."""
    wheel = build(release)
    assert wheel.name == f"apache_airflow_task_sdk-{release.version}+{local_version()}-py3-none-any.whl"


@EACH_RELEASE
def test_changes_only_what_the_notice_says(build: Build, release: Release) -> None:
    """The code differs from upstream's in the files that the notice lists, and nowhere else."""
    before, after = read_code(fetch_wheel(release)), read_code(build(release))
    assert not before.keys() - after.keys()
    notice = find_in_dist_info(build(release), "licenses/NOTICE.teardown").decode()
    changed, added = (
        {line.split()[0] for line in section.splitlines()[1:]} for section in notice.split("\n\n")[1:3]
    )
    assert changed == {name for name in before if before[name] != after[name]}
    assert added == after.keys() - before.keys()
    assert "airflow/sdk/execution_time/supervisor.py" in changed


@EACH_RELEASE
def test_changed_files_are_marked(build: Build, release: Release) -> None:
    """Each changed file says so in its header, as Apache-2.0 §4b asks; untouched ones and ours do not."""
    before, after = read_code(fetch_wheel(release)), read_code(build(release))
    mark = f"# Modified by task-sdk-teardown ({local_version()}); see NOTICE.teardown in the dist-info."
    marked = {name for name, content in after.items() if mark.encode() in content}
    assert marked == {name for name in before if before[name] != after[name]}
    for name in marked:
        header, _, _ = after[name].decode().partition(mark)
        assert all(line.startswith("#") for line in header.splitlines())


@EACH_RELEASE
def test_diff_makes_the_wheel_from_upstream(build: Build, release: Release, tmp_path: Path) -> None:
    """The diff beside the wheel, applied by git to upstream's code, gives the wheel's code."""
    tree = unpack_code(fetch_wheel(release), tmp_path)
    run("git", "apply", "--whitespace=error-all", build(release).with_suffix(".diff"), cwd=tree)
    patched = {
        path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()
    }
    assert patched == read_code(build(release))


@EACH_RELEASE
def test_record_is_right(build: Build, release: Release) -> None:
    """RECORD lists each file once, with its true size and sha256."""
    files = read_wheel(build(release))
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(files[record].decode()))}
    assert rows.pop(record) == ("", "")
    assert rows == {
        name: (f"sha256={encode_digest(content)}", str(len(content)))
        for name, content in files.items()
        if name != record
    }


@EACH_RELEASE
def test_keeps_metadata_and_licence(build: Build, release: Release) -> None:
    """Of upstream's dist-info everything stays, but for the version."""
    before, after = (
        BytesParser().parsebytes(find_in_dist_info(wheel, "METADATA"))
        for wheel in (fetch_wheel(release), build(release))
    )
    assert after["Version"] == f"{before['Version']}+{local_version()}"
    del before["Version"], after["Version"]
    assert after.items() == before.items()
    assert after.get_payload() == before.get_payload()
    upstream = read_wheel(fetch_wheel(release))
    for name in upstream:
        if "/licenses/" in name or name.endswith("/WHEEL"):
            assert find_in_dist_info(build(release), name.partition(".dist-info/")[2]) == upstream[name]


@EACH_RELEASE
def test_style_is_as_good_as_before(build: Build, release: Release, tmp_path: Path) -> None:
    """The patched code breaks no rule of upstream's style that the stock code keeps."""
    stock = count_violations(unpack_code(fetch_wheel(release), tmp_path / "stock"))
    patched = count_violations(unpack_code(build(release), tmp_path / "patched"))
    assert not patched - stock


@EACH_RELEASE
def test_format_is_as_good_as_before(build: Build, release: Release, tmp_path: Path) -> None:
    """Upstream's formatter wants no other changes than it wants in upstream's own files."""
    stock = list_unformatted(unpack_code(fetch_wheel(release), tmp_path / "stock"))
    patched = list_unformatted(unpack_code(build(release), tmp_path / "patched"))
    assert not patched - stock


@EACH_RELEASE
def test_comments_go_with_their_code(build: Build, release: Release) -> None:
    """No edit leaves a comment, or half of one, whose code it has taken."""
    stock, patched = (read_code(wheel) for wheel in (fetch_wheel(release), build(release)))
    loose = {name: find_loose_comments(patched[name]) - find_loose_comments(stock[name]) for name in stock}
    assert {name: comments for name, comments in loose.items() if comments} == {}


def find_loose_comments(code: bytes) -> collections.Counter[bytes]:
    """Return the comments that an empty line follows."""
    lines = code.split(b"\n")
    pairs = zip(lines, lines[1:], strict=False)
    return collections.Counter(
        line for line, following in pairs if line.lstrip()[:1] == b"#" and not following
    )


def test_style_check_sees_a_violation(tmp_path: Path) -> None:
    """The comparison above would notice an import in the wrong place."""
    (tmp_path / "sorted.py").write_text("from __future__ import annotations\n\nimport os\nimport sys\n")
    assert count_violations(tmp_path) == {"sorted.py: F401": 2}
    (tmp_path / "sorted.py").write_text("from __future__ import annotations\n\nimport sys\nimport os\n")
    assert count_violations(tmp_path) == {"sorted.py: F401": 2, "sorted.py: I001": 1}


def test_format_check_sees_a_difference(tmp_path: Path) -> None:
    """The comparison of the formats would notice a file that is not formatted, and a formatter that cannot run."""
    (tmp_path / "neat.py").write_text("x = [1, 2]\n")
    (tmp_path / "untidy.py").write_text("x = [1,2]\n")
    assert list_unformatted(tmp_path) == {"/untidy.py"}
    (tmp_path / "untidy.py").write_text("x = [")
    with pytest.raises(AssertionError, match=r"untidy\.py"):
        list_unformatted(tmp_path)


@EACH_LINE
def test_is_reproducible(build: Build, release: Release, tmp_path: Path) -> None:
    """A second build is identical byte by byte, whatever the umask and the time are."""
    former = os.umask(0o077)
    try:
        again = build_wheel(release, fetch_wheel(release), load_changes(), tmp_path)
    finally:
        os.umask(former)
    for suffix in (".whl", ".diff"):
        assert again.with_suffix(suffix).read_bytes() == build(release).with_suffix(suffix).read_bytes()


def test_installs_over_stock(build: Build, tmp_path: Path) -> None:
    """Installed over upstream's wheel it shows its local version to pip and upstream's to the API."""
    release = find_release("1.1.8")
    run(find_tool("uv"), "venv", "--python", sys.executable, tmp_path)
    python = tmp_path / "bin" / "python"
    for wheel in (fetch_wheel(release), build(release)):
        run(find_tool("uv"), "pip", "install", "--no-deps", "--python", python, wheel)
    query = (
        "import airflow.sdk, importlib.metadata as metadata;"
        "print(metadata.version('apache-airflow-task-sdk'), airflow.sdk.__version__)"
    )
    assert run(python, "-c", query).split() == [f"1.1.8+{local_version()}", "1.1.8"]
    installed = next((tmp_path / "lib").glob("python*/site-packages"))
    code = read_code(build(release))
    assert {name: (installed / name).read_bytes() for name in code} == code


def test_satisfies_every_dependency(build: Build) -> None:
    """In an environment with the whole of Airflow, which pins the SDK exactly, pip and uv find nothing amiss."""
    release = find_release("3.1.8")
    airflow = f"apache-airflow=={release.airflow}"
    environment = create_environment(release, packages=[airflow], wheel=build(release))
    run(find_tool("uv"), "pip", "check", "--python", environment.python)
    run(sys.executable, "-m", "pip", "--python", environment.python, "check")


def test_rule_that_does_not_match_leaves_nothing(tmp_path: Path) -> None:
    """A wheel whose patching fails is not written, not even in part."""
    output = tmp_path / "dist"
    output.mkdir()
    upstream = made_up.pack_wheel(tmp_path / "upstream", "1.9.0")
    changes = load(tmp_path / "changes", write_rule("{pattern: absent()}", "x"))
    with pytest.raises(PatchError, match="0 matches instead of 1"):
        build_wheel(made_up.release("1.9.0"), upstream, changes, output)
    assert not list(output.iterdir())


def test_refuses_code_that_lacks_what_rules_rely_on() -> None:
    """Before 1.2.2 upstream does not forget the sockets that it closes: rules that leave that to it do not match."""
    exit_event = [change for change in load_changes() if change.name == "exit-event"]
    with zipfile.ZipFile(fetch_wheel(find_release("1.2.1"))) as archive, pytest.raises(PatchError) as refusal:
        compute_patch(zipfile.Path(archive), find_release("1.2.2"), exit_event)
    refused = [sentence.split()[1] for sentence in refusal.value.sentences if sentence.startswith("Rule")]
    assert refused == ["leave-selector-open", "close-selector-after-loop"]


def test_refuses_wheel_with_unexplained_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that differs from upstream's in a file that no change names is not written."""

    def apply_and_stray(tree: Path, *arguments: Any) -> Patch:
        (tree / "airflow" / "stray.py").touch()
        return apply_changes(tree, *arguments)

    monkeypatch.setattr("patches.wheels.apply_changes", apply_and_stray)
    output = tmp_path / "dist"
    output.mkdir()
    upstream = made_up.pack_wheel(tmp_path / "upstream", "1.9.0")
    with pytest.raises(PatchError, match=r"otherwise than the changes say: airflow/stray\.py"):
        build_wheel(made_up.release("1.9.0"), upstream, load(tmp_path / "changes", write_rule()), output)
    assert not list(output.iterdir())


def test_sources_are_packed_as_they_are(build: Build) -> None:
    """Our whole files are in the wheel byte by byte."""
    release = find_release("1.1.8")
    code = read_code(build(release))
    files = [file for change in load_changes() for file in select_names(change.files, release)]
    assert {file: code[file] for file in files} == {file: (SOURCES / file).read_bytes() for file in files}


def find_in_dist_info(wheel: Path, name: str) -> bytes:
    (content,) = (
        content for path, content in read_wheel(wheel).items() if path.endswith(f".dist-info/{name}")
    )
    return content


def encode_digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
