"""Unpacking archives, out of which nothing may reach beyond the folder that it goes into."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def extract(archive: tarfile.TarFile, folder: Path, members: Iterable[tarfile.TarInfo] | None = None) -> None:
    """Extract an archive, or some of its members, into a folder."""
    # Security releases of the older Pythons have the filter, too; whoever has none trusts the archive.
    archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _path: member)
    archive.extractall(folder, members)  # noqa: S202 - see above
