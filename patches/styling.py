"""The style that a checkout's own ruff configuration asks for."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from typing import TYPE_CHECKING

import yaml
from packaging.version import Version

from patches.commands import find_tool, run_command, run_parallel
from patches.environments import EnvironmentFailedError, fetch_ruff
from patches.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patches.checkouts import Checkout

CONFIGURATIONS = ("ruff.toml", ".ruff.toml")
HOOKS = ".pre-commit-config.yaml"
FAILED = 2  # ruff's exit status when it could not run; 1 means that it found something


class NoStyleError(PatchError):
    """Ruff could not run, or was not asked to."""


class NoPinError(PatchError):
    """The checkout's hooks do not say which ruff they run."""


def apply_style(checkout: Checkout, files: Mapping[str, bytes], notices: list[str]) -> dict[str, bytes]:
    """Return the files as the checkout's ruff configuration wants them.

    New files, and files that were in style before, are fixed and formatted. Others are not, for a commit must not restyle
    code that it does not change. Raises a PatchError that lists what a file is blamed for and was not
    before, and a NoStyleError where there is no configuration, or ruff does not take it.
    """
    _check_configuration(checkout)
    _, said = choose_ruff(checkout)
    styled = dict(files)
    problems: list[str] = []
    modules = [file for file in files if _is_python(file)]
    runs = run_parallel(
        lambda file: _style(checkout, file, files[file]), modules, workers=os.cpu_count() or 1
    )
    with contextlib.closing(runs):
        for file, future in runs:
            styled[file], faults = future.result()
            problems += [f"{file}: {fault}" for fault in faults]
    if problems:
        raise PatchError(
            *problems,
            *said,
            "The checkout's ruff configuration asks for that: mend these files where this repository has them "
            "(task-sdk/, patches/changes/), and run this again.",
        )
    notices += said
    return styled


@functools.cache
def choose_ruff(checkout: Checkout) -> tuple[str, tuple[str, ...]]:
    """Return the ruff that the checkout's hooks run, or else ours, and what is to be said about it."""
    ours = find_tool("ruff")
    hooks = checkout.read(HOOKS)
    if hooks is None:
        return ours, ()
    own = run_command([ours, "--version"]).stdout.decode().split()[-1]
    try:
        pin = _read_pin(hooks)
        return (ours if pin == Version(own) else str(fetch_ruff(pin))), ()
    except (NoPinError, EnvironmentFailedError) as error:
        return ours, (f"Ruff {own} has checked the style, which need not be the checkout's own. {error}",)


def _read_pin(hooks: bytes) -> Version:
    """Return the version of ruff that is installed for the hook of that name."""
    try:
        (pin,) = {
            need.removeprefix("ruff==")
            for repository in yaml.safe_load(hooks)["repos"]
            for hook in repository["hooks"]
            if hook["id"] == "ruff"
            for need in hook["additional_dependencies"]
            if need.startswith("ruff==")
        }
        return Version(pin)
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        raise NoPinError(f"{HOOKS} does not name a version of it.") from None


def style_new_file(checkout: Checkout, file: str, content: bytes) -> bytes:
    """Return what apply_style makes of a new file; without a style, or with one that fails, that is the file."""
    try:
        _check_configuration(checkout)
        return _fix(checkout, file, content) if _is_python(file) else content
    except NoStyleError:
        return content


def _style(checkout: Checkout, file: str, content: bytes) -> tuple[bytes, list[str]]:
    """Return a file in style, and the faults that remain and are new."""
    before = checkout.read(file)
    if before is None or _fix(checkout, file, before) == before:
        content = _fix(checkout, file, content)
    excused = Counter(_find_faults(checkout, file, before or b""))
    return content, list(Counter(_find_faults(checkout, file, content)) - excused)


def _is_python(file: str) -> bool:
    return file.endswith((".py", ".pyi"))


def _check_configuration(checkout: Checkout) -> None:
    project = checkout.read("pyproject.toml") or b""
    if b"[tool.ruff" not in project and not any(map(checkout.read, CONFIGURATIONS)):
        raise NoStyleError("the checkout has no ruff configuration")


def _fix(checkout: Checkout, file: str, content: bytes) -> bytes:
    fixed = _run_ruff(checkout, file, content, "check", "--fix-only", "--quiet")
    return _run_ruff(checkout, file, fixed, "format", "--quiet")


def _find_faults(checkout: Checkout, file: str, content: bytes) -> Sequence[str]:
    """Return what ruff has against a file, without the places, which move."""
    listing = _run_ruff(checkout, file, content, "check", "--quiet", "--output-format", "concise")
    return [line.partition(": ")[2] for line in listing.decode().splitlines()]


def _run_ruff(checkout: Checkout, file: str, content: bytes, *arguments: str) -> bytes:
    # By stdin, so that nothing is written into the checkout; ruff looks for the configuration where the file will be.
    command, *options = arguments
    result = run_command(
        [
            choose_ruff(checkout)[0],
            command,
            "--no-cache",
            *options,
            "--stdin-filename",
            str(checkout.folder / file),
            "-",
        ],
        stdin=content,
    )
    if result.returncode >= FAILED:
        raise NoStyleError(f"ruff says: {' '.join(result.stderr.decode(errors='replace').split())}")
    return result.stdout
