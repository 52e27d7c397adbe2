"""Whether the changes apply to a release, in the table of pyproject.toml or not."""

from __future__ import annotations

import datetime as dt
import tempfile
import zipfile
from dataclasses import replace
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import TYPE_CHECKING

from patches.releases import Release, all_releases, name_airflow_version, name_sdk_version
from patches.rules import compute_patch
from patches.upstream import download, fetch_wheel, hash_file, sdist_name, wheel_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patches.rules import Change


def check_version(version: str, changes: Sequence[Change]) -> str:
    """Say that the changes apply to an Airflow or SDK version, or raise a PatchError with what does not.

    For a release that the table lacks, the answer includes the line to add.
    """
    sdk_version = name_sdk_version(version)
    for release in all_releases():
        if release.version == sdk_version:
            _check_wheel(fetch_wheel(release), release, changes)
            return f"All changes apply to SDK {sdk_version}."
    line = _check_newcomer(sdk_version, changes)
    return (
        f"All changes apply to SDK {sdk_version}. To support it, add to pyproject.toml, with the day on which it came out "
        f"as its as-of:\n{line}"
    )


def _check_newcomer(version: str, changes: Sequence[Change]) -> str:
    with tempfile.TemporaryDirectory() as work:
        wheel = download(wheel_name(version), version, None, Path(work))
        release = Release(
            version=version,
            airflow=name_airflow_version(version),
            python=_read_python_range(wheel),
            as_of=dt.datetime.now(dt.timezone.utc).date().isoformat(),
            wheel=hash_file(wheel),
            sdist="",
        )
        _check_wheel(wheel, release, changes)
        sdist = download(sdist_name(version), version, None, Path(work))
        return _format_row(replace(release, sdist=hash_file(sdist)))


def _check_wheel(wheel: Path, release: Release, changes: Sequence[Change]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        compute_patch(zipfile.Path(archive), release, changes)


def _read_python_range(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = BytesHeaderParser().parsebytes(archive.read(name))
    return ",".join(sorted(headers["Requires-Python"].replace(" ", "").split(","), reverse=True))


def _format_row(release: Release) -> str:
    return (
        f'"{release.version}" = {{ airflow = "{release.airflow}", python = "{release.python}", '
        f'as-of = "{release.as_of}", wheel = "{release.wheel}", sdist = "{release.sdist}" }}'
    )
