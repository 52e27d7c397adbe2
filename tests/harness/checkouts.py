"""Checkouts of apache/airflow, as far as a release's sdist goes: it is the task-sdk folder of one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.version import Version

from patches.pull_requests import NEWSFRAGMENTS
from tests.harness.archives import extract

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY = {"NAME": "A Contributor", "EMAIL": "contributor@example.org"}
TIMEOUT = 60
"""Seconds."""
# What the roots of all lines ask for. Those of release branches select nothing, so that it comes on top of ruff's default.
RULES = """
    "ASYNC", "B004", "B006", "B007", "B017", "B019", "B028", "D1", "D2", "D213", "D3", "D400", "D401", "D402", "D403", "D412", "D419",
    "E", "G", "I", "ISC", "LOG", "PGH004", "PGH005", "PT", "RET505", "RET506", "RET507", "RET508", "RUF006", "RUF015", "RUF019",
    "RUF100", "S101", "SIM300", "TC", "TID25", "TRY002", "UP", "W",
"""
LATER_RULES = """
    "B012", "PLW0120", "PLW0127", "PLW0128", "PLW0129", "PLW0131", "PLW0133", "PLW0177", "PLW0211", "PLW0245", "PLW0406", "PLW0602",
    "PLW0604", "PLW0642", "PLW0711", "PLW1501", "PLW1507", "PLW1508", "PLW1509", "PLW1510", "PLW1641", "PLW2101", "PLW2901",
    "PLW3301", "SIM107",
"""
MAIN_RULES = (
    '"B", "D1", "D2", "D3", "D40", "E", "F", "G", "I", "ISC", "LOG", "PGH", "PT", "RET50", "TC", "UP", "W"'
)
IGNORED = """
    "ASYNC110", "COM812", "COM819", "D100", "D102", "D103", "D104", "D105", "D107", "D203", "D206", "D212", "D300", "E111", "E114",
    "E117", "E501", "E731", "PT007", "PT013", "PT019", "Q000", "Q001", "Q002", "Q003", "TC003", "W191",
"""
MAIN_IGNORED = '"D404", "D405", "D406", "D407", "D408", "D409", "ISC004", "LOG004"'
RUFF_SETTINGS = """\
[tool.ruff]
line-length = 110

[tool.ruff.lint]
{select}
extend-select = [{rules}{added}]
ignore = [{ignored}]

[tool.ruff.format]
docstring-code-format = true

[tool.ruff.lint.isort]
combine-as-imports = true
known-first-party = ["airflow"]
required-imports = ["from __future__ import annotations"]
section-order = ["future", "standard-library", "third-party", "first-party", "local-folder", "testing"]

[tool.ruff.lint.isort.sections]
testing = ["dev", "tests_common", "tests"]

[tool.ruff.lint.flake8-pytest-style]
fixture-parentheses = false
mark-parentheses = false

[tool.ruff.lint.flake8-type-checking]
exempt-modules = ["typing", "typing_extensions"]
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
# More than one hook may need a ruff; the one of that name lints.
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


@dataclass(frozen=True)
class Root:
    """What the root of a line asks for: the ruff that it pins, and where its rules are not those of all lines."""

    ruff: str
    select: str = ""
    added: str = ""
    ignored: str = ""


# As v3-0-test was in July 2025, and main in September 2025 and in March 2026, with the ruff that the branches of 3.0 to 3.2 pin in
# autumn 2026; that of 3.3 is taken to be as that of 3.2. Since July 2026 main selects its rules, and its ruff is a newer one, which
# knows `extend-banned-api`.
ROOTS = {
    "1.0": Root("0.15.5", added='"SIM105"', ignored='"PT006", "PT011"'),
    "1.1": Root("0.15.5", ignored='"PT006", "PT011", "SIM105", "UP038"'),
    "1.2": Root("0.15.5", added=LATER_RULES, ignored='"SIM105"'),
    "1.3": Root("0.15.5", added=LATER_RULES, ignored='"SIM105"'),
    "1.4": Root("0.17.6", select=f"select = [{MAIN_RULES}]", added=LATER_RULES, ignored=MAIN_IGNORED),
}


def unpack_checkout(sdist: Path, folder: Path) -> Path:
    """Make a repository with one commit of an sdist and a root for its line, and return its folder."""
    with tarfile.open(sdist) as archive:
        extract(archive, folder)
    (unpacked,) = folder.iterdir()
    version = Version(unpacked.name.rpartition("-")[2])
    unpacked.rename(folder / "task-sdk")
    (folder / NEWSFRAGMENTS).mkdir(parents=True)
    (folder / NEWSFRAGMENTS / "config.toml").touch()
    root = ROOTS[f"{version.major}.{version.minor}"]
    (folder / "pyproject.toml").write_text(write_ruff_settings(root) + MYPY_SETTINGS)
    (folder / ".pre-commit-config.yaml").write_text(write_hooks(root.ruff))
    commit_all(folder)
    return folder


def write_ruff_settings(root: Root) -> str:
    """Return what a root's pyproject.toml says to ruff."""
    return RUFF_SETTINGS.format(
        select=root.select, rules=RULES, added=root.added, ignored=IGNORED + root.ignored
    )


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
