"""Random process trees, ended in random ways: nothing is left, and nobody else is harmed; `nox -s random` tries more of them."""

from __future__ import annotations

import pytest

from tests.random_trees.driving import start_driver
from tests.random_trees.exploring import WrongEndError, explore

EXAMPLES = 200
SEED = 1

# Those that a few examples show; the others of bugs.py want more time.
BUGS = ["ignore-mark", "leave-stopped", "never-kill", "take-siblings"]


def test_trees_end_as_told() -> None:
    """Every tree ends as the model says, and the bystanders live on."""
    with start_driver() as driver:
        explore(driver, EXAMPLES, SEED)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    """An SDK with a bug ends some tree otherwise."""
    with start_driver(bugs=[bug]) as driver, pytest.raises(WrongEndError):
        explore(driver, EXAMPLES, SEED, simplify=False)
