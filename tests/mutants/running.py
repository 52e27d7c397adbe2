"""Run the tests that are to find a mutant, in a copy of an environment that has the mutant in it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patches.errors import PatchError
from patches.rules import TESTS
from tests.harness.environments import Environment, clean_env, name_python
from tests.harness.processes import kill_inside
from tests.mutants.mutant import PACKAGE
from tests.sdk.running import make_options
from tests.upstream.results import BROKEN, read_report
from tests.upstream.suites import FINISHED, quote_end

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.mutants.mutant import Mutant
    from tests.upstream.results import Result

TIME_LIMIT = 240
"""Seconds for the tests of one mutant; those that hang are found."""

CONTROL_TIME_LIMIT = 1800
"""The same for all tests without a mutant."""

MEMORY_LIMIT = 4 << 30
"""Bytes of address space for each process: a mock that is called for ever keeps every call."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    found_by: str | None
    """The test that has failed, or what else has happened; None if it has survived."""
    said: str = ""
    """The first line of what that test says."""

    @property
    def found(self) -> bool:
        """Whether it has not survived."""
        return self.found_by is not None


def find_broken(environment: Environment, mutants: Iterable[Mutant]) -> list[str]:
    """Return the tests that fail without any mutant, and so can find none."""
    modules = sorted({path for mutant in mutants for path in mutant.paths})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        status = run_tests(environment, folder, map(str, modules), CONTROL_TIME_LIMIT)
        if status not in FINISHED:
            raise PatchError(
                f"The tests do not run without a mutant (status {status}):\n{quote_end(folder / 'log')}"
            )
        return list(list_broken(folder))


def run_mutant(mutant: Mutant, environment: Environment, broken: Sequence[str]) -> Outcome:
    """Plant a mutant in a copy of an environment, and run its tests but those that are broken anyhow."""
    with tempfile.TemporaryDirectory(dir=environment.folder.parent, prefix="mutant-") as name:
        folder = Path(name).resolve()
        planted = plant(mutant, environment, folder)
        options = ["--exitfirst", *(f"--deselect={test}" for test in broken), *map(str, mutant.paths)]
        status = run_tests(planted, folder, options, TIME_LIMIT)
        if status is None:
            return Outcome(f"its tests did not end within {TIME_LIMIT} s")
        if status < 0:
            return Outcome(f"it has ended pytest by {signal.Signals(-status).name}")
        if status not in FINISHED:
            # A fixture or an import has failed where pytest cannot blame a test.
            return Outcome(f"pytest exited {status}: {quote_end(folder / 'log').splitlines()[-1]}")
        for test, result in list_broken(folder).items():
            return Outcome(test, result.message)
        return Outcome(None)


def plant(mutant: Mutant, environment: Environment, folder: Path) -> Environment:
    """Return a copy of an environment that differs in one file. The others are hard links, and never written."""
    shutil.copytree(environment.folder / "venv", folder / "venv", symlinks=True, copy_function=os.link)
    [module] = (folder / "venv").glob(f"lib/python*/site-packages/{PACKAGE}/{mutant.file}")
    source = module.read_text()
    for compiled in module.parent.glob(f"__pycache__/{module.stem}.*"):
        compiled.unlink()
    module.unlink()
    module.write_text(mutant.mutate(source))
    return Environment(environment.release, folder, name_python(folder))


def run_tests(environment: Environment, folder: Path, options: Iterable[str], limit: float) -> int | None:
    """Run pytest in a folder; return its status, None if it did not end in time."""
    with (folder / "log").open("wb") as output:
        # In a session of its own: a mutant may signal what it takes for another's.
        process = subprocess.Popen(
            [environment.python, "-m", "pytest", *make_options(folder), *options],
            cwd=folder,
            env=clean_env(folder, python=environment.python),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.wait()
        # Its supervisors and their tasks run on.
        kill_inside(folder)


def list_broken(folder: Path) -> dict[str, Result]:
    """Return what the tests that have failed say, by ids that pytest takes."""
    results = read_report(folder / "report.xml")
    return {str(TESTS / name): result for name, result in results.items() if result.outcome in BROKEN}
