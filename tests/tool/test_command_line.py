"""The command line, run in a copy of the repository without a cache: messages, exit statuses, interrupts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import zipfile
from typing import TYPE_CHECKING

import pytest

from patches.__main__ import main
from patches.releases import all_releases, find_release
from patches.rules import ADVICE
from patches.upstream import fetch_wheel, wheel_name
from patches.wheels import patched_name
from tests.tool import made_up
from tests.tool.running import TIMEOUT, interrupt, start

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

BUILT_BEFORE_INTERRUPT = 2
NOBODY = 65534


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Have file permissions apply to root, too."""
    former = os.geteuid()
    if former == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(former)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wheel", "3.0.5"], "3.0.5 is not a supported release"),
        (["wheel", "3.1.8", "nonsense"], "nonsense is not a supported release"),
        (["check", "nonsense"], "'nonsense' is not a version"),
    ],
)
def test_refuses_unknown_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """A version that is none gives one sentence on stderr and status 1, and not even a folder is made."""
    if arguments[0] == "wheel":
        arguments = [*arguments, "--output", str(tmp_path / "dist")]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert (out, err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


def test_refuses_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that cannot be written is named before anything is downloaded or built."""
    tmp_path.chmod(0o555)
    with without_privileges():
        assert main(["wheel", "3.1.8", "--output", str(tmp_path)]) == 1
    assert f"{tmp_path} cannot take the wheels (Permission denied)" in capsys.readouterr().err


def test_builds_named_releases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line tells of each wheel; a release that is named twice is built once."""
    assert main(["wheel", "3.0.6", "1.0.6", "3.3.2", "--output", str(tmp_path)]) == 0
    wheels = [patched_name(find_release(version)) for version in ("3.0.6", "3.3.2")]
    assert capsys.readouterr().out.splitlines() == [
        f"Airflow 3.0.6: {tmp_path / wheels[0]}",
        f"Airflow 3.3.2: {tmp_path / wheels[1]}",
    ]
    diffs = [wheel.replace(".whl", ".diff") for wheel in wheels]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(wheels + diffs)


def test_builds_what_can_be_built(clone: Path) -> None:
    """A rule that does not match in some releases is reported for each, and the others are built all the same."""
    rule = made_up.write_rule(metadata="releases: '!=1.3.1'")
    made_up.write_change(clone / "patches" / "changes", rule.replace(made_up.FILE, "airflow/sdk/absent.py"))
    (clone / ".cache" / "upstream").mkdir(parents=True)
    for version in ("1.2.2", "1.3.1", "1.3.2"):
        shutil.copy(fetch_wheel(find_release(version)), clone / ".cache" / "upstream")
    with start(clone, "wheel", "1.3.2", "1.3.1", "1.2.2") as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    *failures, advice = stderr.splitlines()
    assert [failure.partition(":")[0] for failure in failures] == [
        f"Rule say-moin (10-politeness.yml) on airflow/sdk/absent.py of SDK {version}"
        for version in ("1.3.2", "1.2.2")
    ]
    assert advice == ADVICE
    assert stdout.startswith("Airflow 3.3.1: ")
    wheel = clone / "dist" / patched_name(find_release("1.3.1"))
    assert set((clone / "dist").iterdir()) == {wheel, wheel.with_suffix(".diff")}


def test_lint_passes(clone: Path) -> None:
    """The lint needs no upstream: it passes in a fresh clone."""
    with start(clone, "lint") as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stderr) == (0, "")
    assert "no fault found" in stdout


def test_refuses_damaged_cache(clone: Path) -> None:
    """A wheel that changed in the cache stops the build, and the message says which file to delete."""
    cached = clone / ".cache" / "upstream" / wheel_name("1.1.8")
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"damaged")
    with start(clone, "wheel", "3.1.8") as process:
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert f"{cached} is not what upstream released" in stderr
    assert not list((clone / "dist").iterdir())


def test_gives_up_at_the_first_failed_download(clone: Path) -> None:
    """Without a network one sentence says so, not one for each release, and nothing is left behind."""
    with contextlib.closing(made_up.listen()) as server:
        url = name_url(server)
    with start(clone, "wheel", **made_up.confine_pip(url)) as process:
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "check the network" in stderr
    assert stderr.count("\n") == 1
    assert_nothing_left(clone)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [["wheel", "3.1.8", "3.3.2"], ["check", "1.9.0"]])
def test_interrupted_download_leaves_nothing(
    clone: Path, tmp_path: Path, signum: signal.Signals, arguments: list[str]
) -> None:
    """An interrupt during a download that hangs ends it at once, pip included, and no half file stays."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with made_up.listen() as server:
        environment = made_up.confine_pip(name_url(server)) | {"TMPDIR": str(temporary)}
        with start(clone, *arguments, **environment) as process:
            connection, _ = server.accept()
            with connection:
                assert "Interrupted" in interrupt(process, signum)
    assert_nothing_left(clone)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_whole_wheels_only(clone: Path, signum: signal.Signals) -> None:
    """After an interrupt there are whole wheels with their diffs, or none, and no temporary folder."""
    cache = clone / ".cache" / "upstream"
    cache.mkdir(parents=True)
    for release in all_releases():
        shutil.copy(fetch_wheel(release), cache)
    with start(clone, "wheel") as process:
        assert process.stdout is not None
        for _ in range(BUILT_BEFORE_INTERRUPT):
            process.stdout.readline()
        assert "Interrupted" in interrupt(process, signum)
    wheels = list((clone / "dist").glob("*.whl"))
    assert BUILT_BEFORE_INTERRUPT <= len(wheels) < len(all_releases())
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            assert archive.testzip() is None
    expected = {path.name for wheel in wheels for path in (wheel, wheel.with_suffix(".diff"))}
    assert {path.name for path in (clone / "dist").iterdir()} == expected


def name_url(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}/"


def assert_nothing_left(clone: Path) -> None:
    left = [path for folder in ("dist", ".cache") for path in (clone / folder).rglob("*") if path.is_file()]
    assert not left
