"""Every mutant of the table can be planted. Whether the tests find it is for `nox -s mutants` to say."""

from __future__ import annotations

import functools

import pytest

from patches.releases import find_release
from patches.rules import load_changes, select_names
from tests.mutants.mutant import PACKAGE, Mutant, StaleMutantError
from tests.mutants.table import MUTANTS


@functools.cache
def list_files(version: str) -> tuple[set[str], set[str]]:
    """Return our sources and test modules that are for a release."""
    release = find_release(version)
    changes = load_changes()
    files = {name for change in changes for name in select_names(change.files, release)}
    return files, {name for change in changes for name in select_names(change.tests, release)}


each = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@each
def test_it_applies(mutant: Mutant) -> None:
    """Its text is in the sources exactly once, and what comes of it compiles."""
    source = mutant.source.read_text()
    compile(mutant.mutate(source), mutant.file, "exec")


@each
def test_it_is_tested(mutant: Mutant) -> None:
    """The release on which it is planted has the file, and the test modules that are to find it."""
    files, tests = list_files(mutant.version)
    assert f"{PACKAGE}/{mutant.file}" in files
    assert mutant.modules
    assert {f"task_sdk/execution_time/{module}" for module in mutant.modules} <= tests
    assert all(path.is_file() for path in mutant.paths)


def test_names() -> None:
    """No two have the same name."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("source", ["", "twice, twice"])
def test_stale(source: str) -> None:
    """What is not there, or not once, is an error that names the mutant."""
    mutant = Mutant("M00", "child_stop.py", "twice", "once", "nothing", ("test_child_stop.py",))
    with pytest.raises(StaleMutantError, match="M00"):
        mutant.mutate(source)
