"""What the checks of a checkout run with: its own ruff, and a release for mypy; made once, in .cache."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from patches.commands import find_tool, run_command
from patches.errors import PatchError
from patches.releases import PROJECT, ROOT
from patches.upstream import explain_failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from packaging.version import Version

    from patches.releases import Release

RUFFS = ROOT / ".cache" / "ruff"
RELEASES = ROOT / ".cache" / "types"
# What the tests that go upstream import beside the SDK.
TEST_PACKAGES = ("pytest", "pytest-mock")
# Every supported release runs on it, so results compare across releases.
PREFERRED_PYTHON = "3.11"
INSTALLED_ONLY = ("--no-python-downloads", "--python-preference", "system")
QUERY_TIMEOUT = 60
INSTALL_TIMEOUT = 900


class EnvironmentFailedError(PatchError):
    """The environment could not be made; the message ends with uv's own."""


class NoInterpreterError(EnvironmentFailedError):
    """No installed interpreter serves the release: what needed it was not run, which is not a pass."""


def fetch_ruff(version: Version, cache: Path = RUFFS) -> Path:
    """Return the ruff of a version, downloaded unless it is in the cache."""
    folder = cache / str(version)
    if not folder.is_dir():
        with _fill_folder(folder) as made:
            _install_ruff(version, made)
    return folder / "bin" / "ruff"


def install_release(release: Release, cache: Path = RELEASES) -> Path:
    """Return the interpreter of an environment with a release and what our tests import, made unless it is in the cache."""
    folder = cache / "-".join([release.version, *TEST_PACKAGES])
    if not folder.is_dir():
        interpreter = find_interpreter(release)
        with _fill_folder(folder) as made:
            check_uv("venv", *INSTALLED_ONLY, "--python", str(interpreter), str(made))
            python = str(made / "bin" / "python")
            options = ["--python", python, "--exclude-newer", release.as_of]
            check_uv("pip", "install", *options, *pin_release(release), *TEST_PACKAGES)
    return folder / "bin" / "python"


def pin_release(release: Release) -> list[str]:
    """Return the requirements of a release's SDK, and of the core that belongs to it."""
    return [f"apache-airflow-core=={release.airflow}", f"{PROJECT}=={release.version}"]


def find_interpreter(release: Release, python: str | None = None) -> Path:
    """Return the interpreter asked for, else the preferred one, else any that the release supports."""
    requests = [python] if python else [PREFERRED_PYTHON, release.python]
    for request in requests:
        found = run_uv("python", "find", "--system", *INSTALLED_ONLY, request, timeout=QUERY_TIMEOUT)
        if found.returncode == 0:
            return Path(found.stdout.strip())
    raise NoInterpreterError(
        f"No Python {requests[-1]} is installed for SDK {release.version}: `uv python install` can install one."
    )


def check_uv(*arguments: str) -> None:
    """Run uv; raise EnvironmentFailedError with its last lines when it fails."""
    result = run_uv(*arguments, timeout=INSTALL_TIMEOUT)
    if result.returncode:
        raise EnvironmentFailedError(
            f"An environment could not be made, for uv says: {_find_error(result.stderr)}"
        )


def run_uv(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run uv and capture its output; raise EnvironmentFailedError after `timeout` seconds."""
    try:
        return subprocess.run(
            [find_tool("uv"), *arguments], capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFailedError(
            f"`uv {' '.join(arguments)}` took longer than {timeout} s: try again."
        ) from None


def _find_error(stderr: str) -> str:
    """Return uv's error in one line, without the progress before it."""
    before, error, message = stderr.partition("error:")
    return " ".join((message if error else before).split())


@contextlib.contextmanager
def _fill_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to make, which is moved to its place when the block succeeds: it is there whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".make-", dir=folder.parent) as work:
            made = Path(work, "made")
            yield made
            made.replace(folder)
    except OSError as error:
        if not folder.is_dir():  # another process has made the same
            raise EnvironmentFailedError(f"{folder} could not be made: {error.strerror}.") from None


def _install_ruff(version: Version, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    # pip does not clean up when it is interrupted: its temporary files go with the folder.
    result = run_command(
        [*command, "--target", str(folder), f"ruff=={version}"], environment={"TMPDIR": str(folder.parent)}
    )
    if result.returncode:
        reason = explain_failure(f"ruff {version}", result.stderr.decode(errors="replace"))
        raise EnvironmentFailedError(reason)
