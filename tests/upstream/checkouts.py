"""Wheels of the SDK that a checkout of apache/airflow holds, and of the commit before."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from patches.commands import run_command
from patches.environments import run_uv
from patches.errors import PatchError
from tests.harness.archives import extract

if TYPE_CHECKING:
    from collections.abc import Iterator

SDK = "task-sdk"
# What the SDK's folder has links into; a checkout made of an sdist has the files themselves.
SHARED = "shared"
BUILD_TIMEOUT = 300


@contextlib.contextmanager
def export_parent(checkout: Path) -> Iterator[Path]:
    """Give a folder with the SDK as it was in the commit before the one that is checked out."""
    with tempfile.TemporaryDirectory() as name:
        archive = _run_git(checkout, "archive", "HEAD~1", SDK, *_list_shared(checkout))
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            extract(tar, Path(name))
        yield Path(name)


def build_sdk(checkout: Path, output: Path) -> Path:
    """Build the wheel of the SDK in a checkout, which stays as it is, into an empty folder."""
    result = run_uv(
        "build",
        "--wheel",
        "--no-config",
        "--out-dir",
        str(output),
        str(checkout / SDK),
        timeout=BUILD_TIMEOUT,
    )
    if result.returncode:
        raise PatchError(f"The SDK in {checkout} could not be built; uv says: {result.stderr.strip()}")
    (wheel,) = output.glob("*.whl")
    return wheel


def _list_shared(checkout: Path) -> list[str]:
    return _run_git(checkout, "ls-tree", "--name-only", "HEAD~1", SHARED).decode().split()


def _run_git(checkout: Path, *arguments: str) -> bytes:
    result = run_command(["git", "-C", str(checkout), *arguments])
    if result.returncode:
        raise PatchError(
            f"{checkout} has no commit whose predecessor has the SDK: check out a branch that `nox -s pr` has made "
            f"(git says: {result.stderr.decode(errors='replace').strip()})."
        )
    return result.stdout
