"""What mypy has against a commit, with a checkout's own settings."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from patches.checkouts import export_files
from patches.commands import find_tool, run_command
from patches.environments import install_release
from patches.errors import PatchError
from patches.rules import write_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patches.checkouts import Checkout
    from patches.releases import Release

# mypy's exit statuses when it came to its end: it has found nothing, or something.
CHECKED = (0, 1)
ERRORS_SHOWN = 20
MENTIONED_LINE = re.compile(r"on line \d+")


class NoTypesError(PatchError):
    """Mypy could not run."""


def check_types(checkout: Checkout, files: Mapping[str, bytes], release: Release) -> None:
    """Raise a PatchError that lists what mypy has against the modules of a commit and had not against them before.

    What they import comes from the checkout, or else from the release. Raises a NoTypesError where there are no settings,
    or mypy does not take them, and an EnvironmentFailedError where the release cannot be installed.
    """
    if b"[tool.mypy]" not in (checkout.read("pyproject.toml") or b""):
        raise NoTypesError("The checkout has no settings for mypy.")
    python = install_release(release)
    modules = [file for file in files if file.endswith(".py")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "checkout")
        export_files(checkout, folder)
        before = _find_errors(folder, [file for file in modules if (folder / file).exists()], python)
        write_files(folder, {file: files[file] for file in modules})
        errors = list((_find_errors(folder, modules, python) - before).elements())
    if errors:
        more = [f"And {len(errors) - ERRORS_SHOWN} more."] if len(errors) > ERRORS_SHOWN else []
        raise PatchError(
            *errors[:ERRORS_SHOWN],
            *more,
            "Mypy says that with the checkout's settings, and not of the files before: mend these files where this "
            "repository has them (task-sdk/, patches/changes/), and run this again, or leave mypy out with --no-types.",
        )


def _find_errors(folder: Path, modules: list[str], python: Path) -> Counter[str]:
    """Return what mypy has against modules, without the lines' numbers, which move."""
    if not modules:
        return Counter()
    cache = folder.with_name("cache")
    options = ["--python-executable", str(python), "--cache-dir", str(cache)]
    command = [find_tool("mypy"), *options, "--output", "json", "--no-error-summary", *modules]
    result = run_command(command, folder=folder)
    # It goes on without settings that it cannot read, and says so on stderr.
    if result.returncode not in CHECKED or result.stderr:
        said = (result.stderr or result.stdout).decode(errors="replace")
        raise NoTypesError(f"Mypy says: {' '.join(said.split())}")
    found = map(json.loads, result.stdout.splitlines())
    # What they import has been checked elsewhere, and more of it is read after the commit than before.
    return Counter(
        f"{error['file']}: {MENTIONED_LINE.sub('elsewhere', error['message'])}  [{error['code']}]"
        for error in found
        if error["severity"] == "error" and error["file"] in modules
    )
