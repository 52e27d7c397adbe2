"""Virtual environments with one released Airflow, stock or with the patched wheel installed over it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patches.environments import INSTALLED_ONLY, check_uv, find_interpreter, pin_release
from patches.releases import PROJECT, ROOT
from patches.upstream import fetch_wheel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from patches.releases import Release

CACHE = ROOT / ".cache" / "environments"
HELPERS = "task-sdk/tests"
"""The folder of the package ``task_sdk``, whose tests go upstream, and whose helpers our own programs use."""
QUERY_TIMEOUT = 60
STAMP = "finished"
LOG = "log"


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`, whose interpreter is `python`."""

    release: Release
    folder: Path
    python: Path


@dataclass(frozen=True)
class Recipe:
    """What goes into an environment."""

    release: Release
    interpreter: Path
    packages: Sequence[str]
    bare_packages: Sequence[str]
    wheel: Path | None
    flavour: str
    complete: bool
    cache: Path

    @property
    def kind(self) -> str:
        """A name shared by the environments that differ in the patched wheel alone."""
        flavour = ("complete-" if self.complete else "") + (self.flavour if self.wheel else "stock")
        inputs = [str(self.interpreter), self.release.as_of, *self.packages, "bare", *self.bare_packages]
        digest = shorten_digest(json.dumps(inputs).encode())
        return f"{self.release.version}-{query_version(self.interpreter)}-{flavour}-{digest}"

    @property
    def folder(self) -> Path:
        """Where the environment belongs."""
        suffix = f"-{shorten_digest(self.wheel.read_bytes())}" if self.wheel else ""
        return self.cache / f"{self.kind}{suffix}"


def create_environment(
    release: Release,
    *,
    packages: Sequence[str] = (),
    bare_packages: Sequence[str] = (),
    wheel: Path | None = None,
    flavour: str = "teardown",
    python: str | None = None,
    complete: bool = False,
    cache: Path = CACHE,
) -> Environment:
    """Return an environment with the release's core and SDK at exact versions and `packages`, all as of its day.

    `complete` adds what a deployment has, whose servers start from it: the apache-airflow distribution with the
    providers that it needs, and bytecode, without which every `airflow` command takes three times as long.
    `bare_packages` are installed without what they depend on. `wheel` is installed over the stock SDK, as users do.
    `python` is anything that `uv python find` takes; without it, any installed interpreter serves that the release
    supports. An environment that exists with the same content is used again; those with an older wheel of the same
    `flavour` are removed. `cache` is the folder that all of them are in.

    Raises NoInterpreterError, or EnvironmentFailedError when something cannot be installed.
    """
    interpreter = find_interpreter(release, python)
    recipe = Recipe(release, interpreter, packages, bare_packages, wheel, flavour, complete, cache)
    while not hold_finished(recipe.folder):
        build(recipe)
    if wheel:
        remove_outdated(recipe)
    return Environment(release, recipe.folder, name_python(recipe.folder))


def make_module_path(root: Path = ROOT) -> str:
    """Return the PYTHONPATH of our programs."""
    return f"{root}{os.pathsep}{root / HELPERS}"


def start_program(
    environment: Environment,
    folder: Path,
    module: str,
    *arguments: str | Path,
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a program of ours by an environment's interpreter; it inherits nothing, and what it prints is in LOG of `folder`.

    `before` is what starts it, `env` its variables besides those of `clean_env`, and `options` are Popen's.
    """
    variables = {**clean_env(folder, python=environment.python), "PYTHONPATH": make_module_path()}
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [*before, environment.python, "-m", module, *arguments],
            cwd=folder,
            env={**variables, **(env or {})},
            **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **options},
        )


def clean_env(folder: Path, *, python: Path | None = None) -> dict[str, str]:
    """Return variables for a run that inherits nothing: HOME, TMPDIR and AIRFLOW_HOME are made in `folder`.

    The folder of `python`, an interpreter, comes first on PATH.
    """
    places = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "AIRFLOW_HOME": folder / "airflow"}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    path = [str(python.parent)] if python else []
    return {
        "PATH": os.pathsep.join([*path, "/usr/local/bin", "/usr/bin", "/bin"]),
        "LANG": "C.UTF-8",
        **{name: str(place) for name, place in places.items()},
    }


def query_version(interpreter: Path) -> str:
    """Return the interpreter's version as major.minor."""
    query = "import sys; print('{}.{}'.format(*sys.version_info))"
    return subprocess.check_output([interpreter, "-c", query], text=True, timeout=QUERY_TIMEOUT).strip()


def shorten_digest(content: bytes) -> str:
    """Return a sha256 shortened for a folder's name."""
    return hashlib.sha256(content).hexdigest()[:10]


def name_python(folder: Path) -> Path:
    """Return where the interpreter of the environment in a folder is."""
    return folder / "venv" / "bin" / "python"


def hold_finished(folder: Path) -> bool:
    """Keep a finished environment from being removed while this process lives; False if there is none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if is_same_folder(descriptor, folder) and (folder / STAMP).exists():
        return True  # the descriptor stays open, and with it the lock
    os.close(descriptor)
    return False


def build(recipe: Recipe) -> None:
    """Make the environment, unless another process has just done so."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(recipe.folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # another process has just removed it as outdated
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever held the lock may have finished the environment, or removed it.
        if is_same_folder(descriptor, recipe.folder) and not (recipe.folder / STAMP).exists():
            install(recipe)
            (recipe.folder / STAMP).touch()
    finally:
        os.close(descriptor)


def install(recipe: Recipe) -> None:
    """Create the virtual environment, in place of an unfinished one, and fill it."""
    release, folder = recipe.release, recipe.folder
    pins = pin_release(release)
    if recipe.complete:
        pins.append(f"apache-airflow=={release.airflow}")
    pip_install = ["pip", "install", "--python", str(name_python(folder)), "--exclude-newer", release.as_of]
    if recipe.complete:
        pip_install.append("--compile-bytecode")
    check_uv("venv", "--clear", *INSTALLED_ONLY, "--python", str(recipe.interpreter), str(folder / "venv"))
    check_uv(*pip_install, *pins, *recipe.packages)
    if recipe.bare_packages:
        check_uv(*pip_install, "--no-deps", *recipe.bare_packages)
    # Files from uv's cache are hard links: whoever edits the SDK in place anywhere changes "stock" everywhere.
    wheel = recipe.wheel.resolve() if recipe.wheel else fetch_wheel(release)
    check_uv(*pip_install, "--no-cache", "--no-deps", "--reinstall-package", PROJECT, str(wheel))


def remove_outdated(recipe: Recipe) -> None:
    """Remove the environments with an older wheel in place of this one, unless some process holds them."""
    for folder in recipe.cache.glob(f"{recipe.kind}-*"):
        if folder == recipe.folder:
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process has just removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / STAMP).unlink(missing_ok=True)  # first: what is half removed is not finished
            shutil.rmtree(folder)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def is_same_folder(descriptor: int, folder: Path) -> bool:
    """Tell whether the open folder is still the one at this path, and was not removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
