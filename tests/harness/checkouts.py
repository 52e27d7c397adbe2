"""Checkouts of apache/airflow, as far as a release's sdist goes: it is the task-sdk folder of one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING

from patches.pull_requests import NEWSFRAGMENTS
from tests.harness.archives import extract

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY = {"NAME": "A Contributor", "EMAIL": "contributor@example.org"}
TIMEOUT = 60
"""Seconds."""
# Asks for about what upstream asks for.
RUFF_SETTINGS = """\
[tool.ruff]
line-length = 110

[tool.ruff.lint]
select = ["B", "D1", "D2", "D3", "D40", "E", "F", "G", "I", "ISC", "LOG", "PGH", "PT", "RET50", "RUF100", "TC", "UP", "W"]
extend-select = [
    "PLE1205", "PLW01", "PLW02", "PLW04", "PLW0602", "PLW0604", "PLW0642", "PLW07", "PLW15", "PLW1641", "PLW21", "PLW2901",
    "PLW33", "RUF006", "RUF015", "RUF019", "S101", "SIM105", "SIM107", "SIM300", "TID251", "TID252", "TRY002",
]
ignore = ["D100", "D102", "D103", "D104", "D105", "D107", "D203", "D212", "D404", "D405", "D406", "D407", "D408", "D409"]
extend-ignore = ["E501", "E731", "ISC004", "LOG004", "PT007", "PT013", "PT019", "TC003"]

[tool.ruff.lint.isort]
known-first-party = ["airflow", "tests_common"]
required-imports = ["from __future__ import annotations"]
"""
# But for its plugins, which no index has in the version of the checkout, and what is about the layout of the output.
MYPY_SETTINGS = """\

[tool.mypy]
disable_error_code = ["annotation-unchecked"]
explicit_package_bases = true
ignore_missing_imports = true
mypy_path = ["$MYPY_CONFIG_FILE_DIR/task-sdk/src", "$MYPY_CONFIG_FILE_DIR/task-sdk/tests"]
namespace_packages = true
no_implicit_optional = true
warn_redundant_casts = true
"""
# More than one hook may need a ruff; that of the name lints.
HOOKS = """\
repos:
  - repo: https://example.org/hooks
    rev: 0123456789abcdef0123456789abcdef01234567  # frozen: v1.2.3
    hooks:
      - id: mend-spaces
  - repo: local
    hooks:
      - id: list-operators
        entry: ./list_operators.py
        additional_dependencies: ['rich>=12', 'ruff==0.0.1']
      - id: ruff
        entry: ruff check --force-exclude
        additional_dependencies: ['ruff=={ruff}']
      - id: ruff-format
        entry: ./ruff_format.py
"""


def unpack_checkout(sdist: Path, folder: Path) -> Path:
    """Make a repository with one commit of an sdist, and return its folder."""
    with tarfile.open(sdist) as archive:
        extract(archive, folder)
    (unpacked,) = folder.iterdir()
    unpacked.rename(folder / "task-sdk")
    (folder / NEWSFRAGMENTS).mkdir(parents=True)
    (folder / NEWSFRAGMENTS / "config.toml").touch()
    (folder / "pyproject.toml").write_text(RUFF_SETTINGS + MYPY_SETTINGS)
    commit_all(folder)
    return folder


def write_hooks(ruff: str) -> str:
    """Return what a root's .pre-commit-config.yaml says of ruff, whose version it pins as upstream's does."""
    return HOOKS.format(ruff=ruff)


def commit_all(folder: Path) -> None:
    """Commit everything in a folder, which becomes a repository if it is none."""
    git(folder, "init", "--quiet", "--initial-branch", "main")
    for key, value in IDENTITY.items():
        git(folder, "config", f"user.{key.lower()}", value)
    git(folder, "add", "--all", "--force")  # an sdist's .gitignore is for its builders
    git(folder, "commit", "--quiet", "--message", "Import")


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, out of reach of the user's configuration, and return what it printed."""
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=isolate_git(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        check=True,
    ).stdout


def isolate_git() -> dict[str, str]:
    """Return an environment in which git reads the configuration of its repository alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return inherited | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def record_state(folder: Path) -> tuple[str, ...]:
    """Return all that a command which fails must leave alone: HEAD, references, status, and every file's content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".git" not in path.relative_to(folder).parts:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_mode} ".encode())
            digest.update(path.read_bytes())
    return (
        (folder / ".git" / "HEAD").read_text(),
        git(folder, "for-each-ref"),
        git(folder, "stash", "list"),
        git(folder, "status", "--porcelain", "--ignored"),
        git(folder, "ls-files", "--stage"),
        digest.hexdigest(),
    )
