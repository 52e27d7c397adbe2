"""An unprivileged user that may become another one by a real sudo, and a place on disk that both may enter; for root alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from patches.errors import PatchError
from patches.releases import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# The system's own interpreter, for others may not see one in root's home.
PYTHON = "/usr/bin/python3"
# Every system has these, and nobody else runs as them.
WORKER, OTHER = "daemon", "nobody"
SUDOERS = Path("/etc/sudoers.d/task-sdk-teardown-test")
SUDOERS_MODE = 0o440
ADMIN_PATH = os.pathsep.join(["/usr/sbin", "/sbin", os.defpath])


class UnsuitableSystemError(PatchError):
    """What it takes to be several users is not there; the message says what is missing."""


def check_users() -> None:
    """Raise UnsuitableSystemError unless this process may become other users, and these use sudo."""
    if os.geteuid() != 0:
        raise UnsuitableSystemError(
            "Tasks of another user need root, which alone may start a worker as another user."
        )
    for tool in ("sudo", "visudo"):
        find_admin_tool(tool)


def find_admin_tool(name: str) -> str:
    """Return the path of a tool of the sudo package; raise UnsuitableSystemError if there is none."""
    tool = shutil.which(name, path=ADMIN_PATH)
    if tool is None:
        raise UnsuitableSystemError(
            f"There is no {name}, and tasks of another user need it: `apt-get install sudo` gets it on Debian and Ubuntu."
        )
    return tool


@contextmanager
def permit(commands: str, *, defaults: Sequence[str] = ()) -> Iterator[None]:
    """Let the worker run commands, a Cmnd_Spec of sudoers(5), as the other user, and nothing else; with `defaults` for it."""
    visudo = find_admin_tool("visudo")
    directory = os.open(SUDOERS.parent, os.O_RDONLY)
    try:
        # What one run forbids another would permit.
        fcntl.flock(directory, fcntl.LOCK_EX)
        with tempfile.NamedTemporaryFile("w") as file:
            file.writelines(f"Defaults:{WORKER} {default}\n" for default in defaults)
            file.write(f"{WORKER} ALL=({OTHER}) NOPASSWD: {commands}\n")
            file.flush()
            subprocess.run([visudo, "--check", "--quiet", f"--file={file.name}"], check=True)
            try:
                shutil.copyfile(file.name, SUDOERS)
                SUDOERS.chmod(SUDOERS_MODE)
                yield
            finally:
                SUDOERS.unlink(missing_ok=True)
    finally:
        os.close(directory)


@contextmanager
def make_place(folders: Sequence[str]) -> Iterator[Path]:
    """Yield a folder that everybody may enter, with the modules of the repository that are in `folders`."""
    with tempfile.TemporaryDirectory(prefix="another-user-") as name:
        place = Path(name)
        place.chmod(0o755)
        for folder in folders:
            (place / folder).mkdir(parents=True, exist_ok=True)
            for module in (ROOT / folder).glob("*.py"):
                shutil.copy(module, place / folder)
        yield place
