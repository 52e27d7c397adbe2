"""The releases of apache-airflow-task-sdk that pyproject.toml lists as supported."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from patches.errors import PatchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "apache-airflow-task-sdk"


@dataclass(frozen=True)
class Release:
    """A released SDK: its versions, its Python range, and the sha256 of its wheel and its sdist."""

    version: str
    airflow: str
    python: str
    as_of: str
    """The day, YYYY-MM-DD, as of which its dependencies resolve to what they were when it came out."""
    wheel: str
    sdist: str

    @property
    def oldest_python(self) -> tuple[int, int]:
        """The first Python that it runs on, as (major, minor)."""
        bounds = [Version(spec.version) for spec in SpecifierSet(self.python) if spec.operator == ">="]
        oldest = max(bounds)
        return oldest.major, oldest.minor


@functools.cache
def all_releases() -> tuple[Release, ...]:
    """Return every supported release, in the table's order."""
    return tuple(
        Release(
            version=version,
            airflow=row["airflow"],
            python=row["python"],
            as_of=row["as-of"],
            wheel=row["wheel"],
            sdist=row["sdist"],
        )
        for version, row in _read_settings()["releases"].items()
    )


def last_of_lines() -> list[Release]:
    """Return the last release of every line (1.0, 1.1, ...)."""
    return [find_release(version) for version in _read_settings()["lines"]]


def local_version() -> str:
    """Return what follows the plus sign in the version of a patched wheel."""
    return str(_read_settings()["local-version"])


def find_release(version: str) -> Release:
    """Return the supported release with this Airflow or SDK version."""
    for release in all_releases():
        if version in (release.version, release.airflow):
            return release
    supported = ", ".join(release.airflow for release in all_releases())
    raise PatchError(
        f"{version} is not a supported release: give an Airflow version out of {supported}, or the version of the "
        "SDK that belongs to it (1.N.P to 3.N.P)."
    )


def find_nearest(version: Version) -> Release | None:
    """Return the release whose rules fit a state of upstream's code that goes by a version, which need not be supported.

    It is the first release of the version's line that is not before it, as 1.2.0 is for 1.2.0b1, or else the last of
    the line, or else the newest of all. Nothing fits what is before all lines.
    """
    line = [
        release for release in all_releases() if Version(release.version).release[:2] == version.release[:2]
    ]
    for release in line:
        if Version(release.version) >= version:
            return release
    if line:
        return line[-1]
    newest = last_of_lines()[-1]
    return newest if version > Version(newest.version) else None


def name_sdk_version(version: str) -> str:
    """Return the SDK version that an Airflow or SDK version means, in or out of the table."""
    try:
        number = Version(version)
    except InvalidVersion:
        raise PatchError(f"{version!r} is not a version: give one like 3.1.8 or 1.1.8.") from None
    return re.sub(r"^3\.", "1.", str(number))


def name_airflow_version(sdk_version: str) -> str:
    """Return the Airflow version that an SDK version belongs to."""
    return re.sub(r"^1\.", "3.", sdk_version)


@functools.cache
def _read_settings() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = project["tool"]["teardown"]
    return settings
