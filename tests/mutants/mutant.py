"""A bug to plant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patches.errors import PatchError
from patches.releases import ROOT
from patches.rules import TESTS

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE = "airflow/sdk/execution_time/teardown"
SOURCES = ROOT / "task-sdk" / "src" / PACKAGE
MODULES = TESTS / "task_sdk" / "execution_time" / "teardown"


class StaleMutantError(PatchError):
    """A mutant does not apply exactly once: the code that it was for is another by now."""


@dataclass(frozen=True)
class Mutant:
    """A change of one file that its tests have to find."""

    name: str
    file: str
    """Below task-sdk/src/airflow/sdk/execution_time/teardown."""
    old: str
    """What is replaced; it is there exactly once."""
    new: str
    breaks: str
    """What goes wrong with it, in a few words."""
    modules: tuple[str, ...]
    """The test modules that are to find it, below task-sdk/tests/task_sdk/execution_time/teardown."""
    version: str = "1.3.2"
    """The SDK on which its tests run."""

    def mutate(self, source: str) -> str:
        """Return the source with the bug; raise StaleMutantError if it cannot be planted."""
        count = source.count(self.old)
        if count != 1 or self.old == self.new:
            raise StaleMutantError(
                f"The mutant {self.name} is stale: {self.file} has its text {count} times; "
                "write it anew in tests/mutants/table.py, or remove it."
            )
        return source.replace(self.old, self.new)

    @property
    def source(self) -> Path:
        """The file that it changes."""
        return SOURCES / self.file

    @property
    def paths(self) -> list[Path]:
        """The paths of its test modules."""
        return [MODULES / module for module in self.modules]
