"""Upstream's wheels and sdists: downloaded by pip, checked by hash, kept in .cache/upstream."""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from patches.commands import run_command
from patches.errors import PatchError
from patches.releases import PROJECT, ROOT

if TYPE_CHECKING:
    from patches.releases import Release

CACHE = ROOT / ".cache" / "upstream"
# What the table has no sha256 of; pip has checked the one that the index states.
PRERELEASES = ROOT / ".cache" / "prereleases"
DOWNLOADS_AT_ONCE = 4


def fetch_wheel(release: Release, cache: Path = CACHE) -> Path:
    """Return the release's wheel with the table's sha256, downloaded unless it is in the cache."""
    return _fetch(wheel_name(release.version), release.version, release.wheel, cache)


def fetch_sdist(release: Release, cache: Path = CACHE) -> Path:
    """Return the release's sdist with the table's sha256, downloaded unless it is in the cache."""
    return _fetch(sdist_name(release.version), release.version, release.sdist, cache)


def fetch_prerelease(version: Version, cache: Path = PRERELEASES) -> Path:
    """Return the wheel of a version that the table need not have, downloaded unless it is in the cache."""
    cached = cache / wheel_name(str(version))
    return cached if cached.is_file() else download(cached.name, str(version), None, cache)


def list_prereleases() -> list[Version]:
    """Return the pre-releases that the package index has, in order."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", "--ignore-requires-python", PROJECT]
    result = run_command(command)
    listing = re.search(r"^Available versions: (.+)$", result.stdout.decode(), re.MULTILINE)
    if result.returncode or listing is None:
        # pip does not tell an index that has none from one that does not answer.
        raise PatchError(
            f"The package index gave no list of the versions of {PROJECT}: check the network, the proxy and pip's "
            f"configuration; pip says: {_find_error(result.stderr.decode(errors='replace'))}"
        )
    versions = map(Version, listing[1].split(", "))
    return sorted(version for version in versions if version.is_prerelease)


def wheel_name(version: str) -> str:
    """Return the file name of a version's wheel."""
    return f"{PROJECT.replace('-', '_')}-{version}-py3-none-any.whl"


def sdist_name(version: str) -> str:
    """Return the file name of a version's sdist."""
    return f"{PROJECT.replace('-', '_')}-{version}.tar.gz"


def download(name: str, version: str, sha256: str | None, folder: Path) -> Path:
    """Download one file of a version into a folder, whole or not at all.

    Without a sha256 the one that the index states is what pip checks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as work:
            _run_pip_download(name, version, sha256, Path(work))
            Path(work, name).replace(folder / name)
    except OSError as error:
        raise PatchError(f"{folder} cannot take the download: {error.strerror}.") from None
    return folder / name


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def explain_failure(name: str, stderr: str) -> str:
    """Say in one sentence what pip's messages about a file or a version mean."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"The package index served a {name} whose sha256 is not the one in pyproject.toml; it was not kept: "
            "find out who changed it before you go on."
        )
    if "(from versions: none)" in stderr or "connection broken" in stderr:
        return (
            f"{name} could not be downloaded, for the package index did not answer: check the network, the proxy and "
            "pip's configuration."
        )
    if "No matching distribution found" in stderr:
        return f"The package index has no {name}: check the version."
    return f"{name} could not be downloaded; pip says: {_find_error(stderr)}"


def _fetch(name: str, version: str, sha256: str, cache: Path) -> Path:
    cached = cache / name
    if not cached.is_file():
        return download(name, version, sha256, cache)
    found = hash_file(cached)
    if found != sha256:
        raise PatchError(
            f"{cached} is not what upstream released (its sha256 is {found}, pyproject.toml says {sha256}): "
            "delete it and try again."
        )
    return cached


def _run_pip_download(name: str, version: str, sha256: str | None, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    pinned_hash = f" --hash=sha256:{sha256}" if sha256 else ""
    requirements.write_text(f"{PROJECT}=={version}{pinned_hash}\n", encoding="utf-8")
    kind = ["--only-binary", ":all:"] if name.endswith(".whl") else ["--no-binary", PROJECT]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
    # pip does not clean up when it is interrupted: its temporary files go with the folder.
    result = run_command(
        [*command, *kind, "--dest", str(folder), "--requirement", str(requirements)],
        environment={"TMPDIR": str(folder)},
    )
    if result.returncode or not (folder / name).is_file():
        raise PatchError(explain_failure(name, result.stderr.decode(errors="replace")))


def _find_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()
    return " ".join(errors[-1:]) or "nothing"
