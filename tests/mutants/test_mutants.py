"""Every mutant of the table can be planted. Whether the tests find it is for `nox -s mutants` to say."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from patches.releases import find_release
from patches.rules import load_changes, select_names
from tests.harness.consoles import UNUSABLE
from tests.harness.environments import Environment, name_python
from tests.mutants.__main__ import main
from tests.mutants.mutant import PACKAGE, Mutant, StaleMutantError
from tests.mutants.running import plant
from tests.mutants.table import MUTANTS

if TYPE_CHECKING:
    from pathlib import Path

MADE_UP = Mutant("M00", "stop_request.py", "twice", "once", "nothing", ("test_stop_request.py",))


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
    assert {f"task_sdk/execution_time/teardown/{module}" for module in mutant.modules} <= tests
    assert all(path.is_file() for path in mutant.paths)


def test_names() -> None:
    """No two have the same name."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("source", ["", "twice, twice"])
def test_stale(source: str) -> None:
    """What is not there, or not once, is an error that names the mutant."""
    with pytest.raises(StaleMutantError, match="M00"):
        MADE_UP.mutate(source)


def test_copy(tmp_path: Path) -> None:
    """The mutant is in a copy, without the bytecode of the original, which stays what it was."""
    site_packages = f"venv/lib/python3.11/site-packages/{PACKAGE}"
    original = tmp_path / "original" / site_packages / MADE_UP.file
    compiled = original.parent / "__pycache__" / "stop_request.cpython-311.pyc"
    compiled.parent.mkdir(parents=True)
    original.write_text("do it twice")
    compiled.touch()
    environment = Environment(
        find_release("1.3.2"), tmp_path / "original", name_python(tmp_path / "original")
    )
    planted = plant(MADE_UP, environment, tmp_path / "copy")
    copy = tmp_path / "copy" / site_packages
    assert planted.python.is_relative_to(tmp_path / "copy")
    assert (copy / MADE_UP.file).read_text() == "do it once"
    assert original.read_text() == "do it twice"
    assert compiled.exists()
    assert not list((copy / "__pycache__").iterdir())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is listed with what it breaks, and none is run."""
    assert main(["--list", MUTANTS[0].name]) == 0
    assert capsys.readouterr().out == f"{MUTANTS[0].name}: {MUTANTS[0].breaks}\n"


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that no mutant has gets one sentence, and a status of its own."""
    assert main(["nobody"]) == UNUSABLE
    assert "--list" in capsys.readouterr().err
