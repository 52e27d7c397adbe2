"""Random process trees, ended in random ways: nothing is left, and nobody else is harmed; `nox -s random` tries more of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import psutil
import pytest

from tests.random_trees.__main__ import UNUSABLE, main
from tests.random_trees.driving import Driver, DriverFailedError, start_driver
from tests.random_trees.examples import Example, Outcome
from tests.random_trees.exploring import WrongEndError, check, explore

EXAMPLES = 200
SEED = 1

# Those that a few examples show; the others of bugs.py want more time.
FAULTS_OF_BUGS = [
    ("ignore-mark", "is left"),
    ("leave-stopped", "it took"),
    ("never-kill", "is left"),
    ("take-siblings", "was harmed"),
]


def test_trees_end_as_told() -> None:
    """Every tree ends as the model says, and the bystanders live on."""
    with start_driver() as driver:
        explore(driver, EXAMPLES, SEED)


@pytest.mark.parametrize(("bug", "fault"), FAULTS_OF_BUGS)
def test_planted_bug_is_found(bug: str, fault: str) -> None:
    """An SDK with a bug ends some tree otherwise, in the way of this bug."""
    with start_driver(bugs=[bug]) as driver, pytest.raises(WrongEndError, match=fault):
        explore(driver, EXAMPLES, SEED, simplify=False)


LEFT = Outcome(hung=False, alive=[0], harmed=[], seconds=0.5)
TOLD = replace(LEFT, told_of_rest=True)
ENDED = replace(LEFT, alive=[])


@pytest.mark.parametrize(
    ("outcomes", "fault", "runs"),
    [
        ([TOLD, TOLD, ENDED], None, 3),
        ([TOLD, TOLD, TOLD], "is left", 3),
        ([LEFT, ENDED], "is left", 1),
        ([TOLD, LEFT], "is left", 2),
        ([replace(TOLD, harmed=["a bystander"]), ENDED], "was harmed", 1),
    ],
)
def test_only_what_is_told_is_tried_again(outcomes: list[Outcome], fault: str | None, runs: int) -> None:
    """What is left counts at once, unless the supervisor tells of it; then it counts when it does every time."""
    driver = Mock(spec=Driver)
    driver.run.side_effect = outcomes
    example = Example({"id": 0, "steps": [], "then": "stay"}, "409")
    with pytest.raises(WrongEndError, match=fault) if fault else nullcontext():
        check(driver, example)
    assert driver.run.call_count == runs


def test_dead_driver_is_told() -> None:
    """A driver that has died before it gets an example ends the search with its own output."""
    example = Example({"id": 0, "steps": [], "then": "stay"}, "409")
    with start_driver() as driver:
        (process,) = psutil.Process().children()
        process.kill()
        process.wait()
        with pytest.raises(DriverFailedError, match="no answer"):
            driver.run(example)


@pytest.mark.parametrize("arguments", [["9.9.9"], ["--bug", "nonsense"]], ids=" ".join)
def test_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A version that is not supported and a bug that is not there get one sentence, and the exit status 2."""
    assert main(arguments) == UNUSABLE

    message = capsys.readouterr().err
    assert arguments[-1] in message
    assert len(message.splitlines()) == 1
