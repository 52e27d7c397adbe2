"""The sessions: they install what they need and run one command each."""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint"]

PROJECT = nox.project.load_toml("pyproject.toml")
# Ctrl-C must leave a build the time to remove what it has begun.
INTERRUPT_TIMEOUT = 10
# The servers of an Airflow are asked to end one after the other, before they are killed.
E2E_INTERRUPT_TIMEOUT = 60
# Where there is no PID namespace, which ends at once, the tasks that run are ended in the way that they were to be.
PROGRAMS_INTERRUPT_TIMEOUT = 60


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the patched wheel of each Airflow or SDK version given, or of all supported ones, into dist/."""
    install_groups(session, "tool")
    session.run("python", "-m", "patches", "wheel", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def prereleases(session: nox.Session) -> None:
    """Say which changes apply to the SDK's pre-releases, which stand for states that upstream's main has had."""
    install_groups(session, "tool")
    session.run(
        "python", "-m", "patches", "prereleases", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT
    )


@nox.session
def pr(session: nox.Session) -> None:
    """Commit the changes on a new branch of the apache/airflow checkout given, ready for a pull request."""
    install_groups(session, "tool", "lint")  # ruff and mypy, for the checkout's own configurations
    session.run("python", "-m", "patches", "pr", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def breeze(session: nox.Session) -> None:
    """Run upstream's own checks on the checkout given, where Docker, Breeze and prek are installed."""
    install_groups(session, "tool")
    session.run("python", "-m", "patches", "breeze", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def demo(session: nox.Session) -> None:
    """Show what the stock and the patched SDK of a version (3.1.8 unless given) leave running."""
    # matplotlib draws; psutil is for the modules shared with the bench
    install_groups(session, "tool", "bench")
    session.run("python", "-m", "tests.demo", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the tool on all supported releases, and the patched SDK on the last of every line."""
    install_groups(session, "tool", "tests", "bench", "lint")  # ruff and mypy compare before and after
    session.run("pytest", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def random(session: nox.Session) -> None:
    """End 5,000 random process trees, and compare what is left with a model; --seed N repeats a run."""
    install_groups(session, "tool", "tests")
    session.run("python", "-m", "tests.random_trees", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant bugs in our sources one after the other, and say which survive the tests that go upstream."""
    install_groups(session, "tool", "tests")
    session.run("python", "-m", "tests.mutants", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def upstream(session: nox.Session) -> None:
    """Run upstream's own tests on the stock and the patched SDK of versions, or of the last of every line."""
    install_groups(session, "tool", "tests")
    session.run("python", "-m", "tests.upstream", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def e2e(session: nox.Session) -> None:
    """End tasks of a real Airflow, stock and patched, in the ways that users do; see --help for a part of it."""
    install_groups(session, "tool", "tests")
    session.run("python", "-m", "tests.e2e", *session.posargs, interrupt_timeout=E2E_INTERRUPT_TIMEOUT)


@nox.session
def programs(session: nox.Session) -> None:
    """Start real programs in tasks, end these in every way, and say what is left, stock and patched; see --help."""
    install_groups(session, "tool", "tests")
    session.run(
        "python", "-m", "tests.programs", *session.posargs, interrupt_timeout=PROGRAMS_INTERRUPT_TIMEOUT
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the stock and the patched SDK of a version (3.1.8 unless given) side by side, and draw pictures."""
    install_groups(session, "tool", "bench")
    session.run("python", "-m", "tests.bench", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types and change files, without upstream at hand."""
    install_groups(session, "tool", "tests", "bench", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy", "patches", "tests")
    session.run("mypy", "--explicit-package-bases", "task-sdk/src")
    session.run("python", "-m", "patches", "lint")


def install_groups(session: nox.Session, *groups: str) -> None:
    """Install dependency groups of pyproject.toml, at the versions of the lock file."""
    requirements = nox.project.dependency_groups(PROJECT, *groups)
    session.install("--constraint", "tests/requirements.lock", *requirements)
