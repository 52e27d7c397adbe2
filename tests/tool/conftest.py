"""What the tests of the tool share."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from patches.releases import ROOT
from tests.harness.checkouts import isolate_git
from tests.tool.made_up import ADDED, TEST

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


@pytest.fixture
def isolated_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the configuration of whoever runs the tests out of them."""
    environment = isolate_git()
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM"):
        monkeypatch.setenv(name, environment[name])


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a folder of our whole files and tests: `files` and `tests` in it."""
    for name, constant, file in (("files", "SOURCES", ADDED), ("tests", "TESTS", TEST)):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("BYE = 1\n")
        monkeypatch.setattr(f"patches.pull_requests.{constant}", tmp_path / name)
    return tmp_path
