"""Patched wheels, and environments with and without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patches.releases import ROOT
from patches.rules import load_changes
from patches.upstream import fetch_wheel
from patches.wheels import build_wheel, prepare_output
from tests.harness.environments import create_environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from patches.releases import Release
    from tests.harness.environments import Environment

DIST = ROOT / "dist"


def build_patched_wheel(release: Release, folder: Path) -> Path:
    """Build the patched wheel of a release in a folder, made if it is not there, and return its path."""
    prepare_output(folder)
    return build_wheel(release, fetch_wheel(release), load_changes(), folder)


def install_both(
    release: Release, wheel: Path, on_installed: Callable[[], object]
) -> dict[bool, Environment]:
    """Return the stock environment under False and the patched one under True."""
    sides = {}
    for patched in (False, True):
        sides[patched] = create_environment(release, wheel=wheel if patched else None)
        on_installed()
    return sides
