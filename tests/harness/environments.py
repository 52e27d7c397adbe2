"""Virtual environments with one released Airflow, stock or with the patched wheel installed over it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uv import find_uv_bin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patches.releases import Release

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "environments"
# Every supported release runs on it, so results compare across releases.
PREFERRED_PYTHON = "3.11"
INSTALLED_ONLY = ("--no-python-downloads", "--python-preference", "system")
QUERY_TIMEOUT = 60
INSTALL_TIMEOUT = 900
STAMP = "finished"
QUOTED_LINES = 12


class EnvironmentFailedError(RuntimeError):
    """The environment could not be made; the message quotes the end of uv's output."""


class NoInterpreterError(EnvironmentFailedError):
    """No installed interpreter serves the release: what needed it was not run, which is not a pass."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`, whose interpreter is `python`."""

    release: Release
    folder: Path
    python: Path

    @property
    def stamp(self) -> Path:
        """The file that says that the environment was finished."""
        return self.folder / STAMP


def create_environment(
    release: Release,
    *,
    packages: Sequence[str] = (),
    wheel: Path | None = None,
    python: str | None = None,
) -> Environment:
    """Return an environment with the release's core and SDK at exact versions and `packages`, all as of its day.

    `wheel` is installed over the stock SDK, as users do. `python` is anything that `uv python find` takes; without
    it, any installed interpreter serves that the release supports. An environment that exists with the same inputs
    is used again; one that was made with an older wheel is removed.

    Raises NoInterpreterError, or EnvironmentFailedError when something cannot be installed.
    """
    interpreter = find_interpreter(release, python)
    kind, digest = name_environment(release, interpreter, packages, wheel)
    folder = CACHE / f"{kind}-{digest}"
    environment = Environment(release, folder, folder / "venv" / "bin" / "python")
    while not hold_finished(environment):
        build(environment, interpreter, packages, wheel)
    remove_outdated(kind, keep=folder)
    return environment


def clean_env(folder: Path, *, python: Path | None = None) -> dict[str, str]:
    """Return the variables for a run that inherits nothing: a home, a temporary folder and AIRFLOW_HOME in `folder`.

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


def find_interpreter(release: Release, python: str | None = None) -> Path:
    """Return the interpreter asked for, else the preferred one, else any that the release supports."""
    requests = [python] if python else [PREFERRED_PYTHON, str(release.python)]
    for request in requests:
        found = run_uv("python", "find", "--system", *INSTALLED_ONLY, request, timeout=QUERY_TIMEOUT)
        if found.returncode == 0:
            return Path(found.stdout.strip())
    raise NoInterpreterError(
        f"SDK {release.sdk} needs Python {requests[-1]} and none is installed; `uv python install` can install one."
    )


def name_environment(
    release: Release, interpreter: Path, packages: Sequence[str], wheel: Path | None
) -> tuple[str, str]:
    """Return what an environment is for, and a digest of what has been installed for it."""
    query = "import sys; print('{}.{}'.format(*sys.version_info))"
    version = subprocess.check_output([interpreter, "-c", query], text=True, timeout=QUERY_TIMEOUT).strip()
    asked = json.dumps([str(interpreter), release.airflow, str(release.as_of), *packages])
    flavour = "teardown" if wheel else "stock"
    kind = f"{release.sdk}-{version}-{flavour}-{shorten(asked.encode())}"
    return kind, shorten(wheel.read_bytes() if wheel else b"")


def shorten(content: bytes) -> str:
    """Return a digest that is short enough for a folder's name."""
    return hashlib.sha256(content).hexdigest()[:10]


def hold_finished(environment: Environment) -> bool:
    """Keep the environment from being removed while this process lives; False if it is not there to be kept."""
    try:
        descriptor = os.open(environment.folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if environment.stamp.exists() and is_same_folder(descriptor, environment.folder):
        return True  # the descriptor stays open, and with it the lock
    os.close(descriptor)
    return False


def build(environment: Environment, interpreter: Path, packages: Sequence[str], wheel: Path | None) -> None:
    """Make the environment, unless another process has just done so."""
    folder = environment.folder
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever held the lock may have finished the environment, or removed it.
        if environment.stamp.exists() or not is_same_folder(descriptor, folder):
            return
        install(environment, interpreter, packages, wheel)
        environment.stamp.touch()
    finally:
        os.close(descriptor)


def install(environment: Environment, interpreter: Path, packages: Sequence[str], wheel: Path | None) -> None:
    """Create the virtual environment anew and fill it."""
    release = environment.release
    pins = [f"apache-airflow-core=={release.airflow}", f"apache-airflow-task-sdk=={release.sdk}"]
    target = ["--python", str(environment.python)]
    check_uv(
        "venv", "--clear", *INSTALLED_ONLY, "--python", str(interpreter), str(environment.folder / "venv")
    )
    check_uv("pip", "install", *target, "--exclude-newer", str(release.as_of), *pins, *packages)
    if wheel:
        check_uv(
            "pip",
            "install",
            *target,
            "--no-deps",
            "--reinstall-package",
            "apache-airflow-task-sdk",
            str(wheel),
        )


def remove_outdated(kind: str, *, keep: Path) -> None:
    """Remove the environments made for the same use from other wheels, except those in use by some process."""
    for folder in CACHE.glob(f"{kind}-*"):
        if folder == keep:
            continue
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / STAMP).unlink(missing_ok=True)  # first: what is half removed is not finished
            shutil.rmtree(folder)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def is_same_folder(descriptor: int, folder: Path) -> bool:
    """Tell whether the open folder is still the one at its path, and was not removed while we waited."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def check_uv(*arguments: str) -> None:
    """Run uv; raise EnvironmentFailedError with the end of its output when it fails."""
    finished = run_uv(*arguments, timeout=INSTALL_TIMEOUT)
    if finished.returncode != 0:
        tail = "\n".join(finished.stderr.strip().splitlines()[-QUOTED_LINES:])
        raise EnvironmentFailedError(f"`uv {' '.join(arguments)}` failed:\n{tail}")


def run_uv(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run uv and capture its output; raise EnvironmentFailedError when it takes too long."""
    try:
        return subprocess.run(
            [find_uv_bin(), *arguments], capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFailedError(f"`uv {' '.join(arguments)}` took longer than {timeout} s.") from None
