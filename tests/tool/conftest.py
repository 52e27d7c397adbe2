"""What the tests of the tool share."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from patches.releases import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a copy of what the tool consists of."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("patches", "task-sdk"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", clone)
    return clone
