"""Random process trees, ended in random ways: nothing is left, and nobody else is harmed; `nox -s random` tries more of them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING
from unittest.mock import Mock

import psutil
import pytest

from patches.releases import ROOT
from tests.harness.consoles import UNUSABLE
from tests.random_trees.__main__ import main
from tests.random_trees.driving import Driver, DriverFailedError, start_driver
from tests.random_trees.examples import Example, Outcome, Script, Step
from tests.random_trees.exploring import WrongEndError, check, explore
from tests.random_trees.model import tell_fates

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

NOBODY = 65534
EXAMPLES = 200
DEFAULT_EXAMPLES = 60
SEED = 1

# Those that a few examples show, from a seed that has them early; the others of bugs.py want more time.
FAULTS_OF_BUGS = [
    ("ignore-mark", "is left", SEED),
    pytest.param("leave-stopped", "it took", SEED, marks=pytest.mark.everything),
    pytest.param("never-kill", "is left", SEED, marks=pytest.mark.everything),
    ("take-siblings", "was harmed", SEED),
    pytest.param("never-notice", "hangs", SEED, marks=pytest.mark.everything),
    ("sweep-successes", "was harmed", SEED),
    pytest.param("ignore-start", "is left", 3, marks=pytest.mark.everything),
]
NEED_STRANGERS = {"ignore-start"}
TRIES = 20
"""Of an example whose end depends on who gets a number first; one in three or so shows the fault."""


def test_trees_end_as_told(pytestconfig: pytest.Config) -> None:
    """Every tree ends as the model says, and the bystanders live on."""
    with start_driver() as driver:
        explore(driver, EXAMPLES if pytestconfig.getoption("everything") else DEFAULT_EXAMPLES, SEED)


DETACHED: Step = {"fork": {"id": 1, "steps": ["setsid", "orphan"], "then": "stay"}}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param({"id": 0, "steps": [DETACHED, "reset"], "then": "stay"}, id="runner-lifts-mark"),
        pytest.param({"id": 0, "steps": ["limit", DETACHED], "then": "stop"}, id="stopped-runner-sets-limit"),
    ],
)
def test_orphan_that_was_left(script: Script) -> None:
    """What the trees have found once: a runner without a supervisor, and without the mark that it was given."""
    with start_driver() as driver:
        check(driver, Example(script, "orphaned"))


def test_task_within_a_task_within_a_task() -> None:
    """What only a supervisor knows that only another supervisor knows may be ended, or stay."""
    gone_out: list[Step] = ["limit", "orphan", "setsid"]
    innermost: Script = {"id": 5, "steps": gone_out, "then": "stay"}
    runner: Script = {"id": 4, "steps": [{"fork": innermost}], "then": "stay"}
    within: Script = {"id": 3, "steps": gone_out, "then": "supervise", "inner": runner}
    outer: Script = {"id": 2, "steps": [{"fork": within}], "then": "stay"}
    supervisor: Script = {"id": 1, "steps": [], "then": "supervise", "inner": outer}
    fates = tell_fates(Example({"id": 0, "steps": [{"fork": supervisor}], "then": "stay"}, "409"))
    assert [fates[number] for number in range(6)] == ["ends", "ends", "ends", "either", "either", "either"]


@pytest.mark.parametrize(("bug", "fault", "seed"), FAULTS_OF_BUGS)
def test_planted_bug_is_found(bug: str, fault: str, seed: int) -> None:
    """An SDK with a bug ends some tree otherwise, in the way of this bug."""
    with start_driver(bugs=[bug]) as driver:
        if driver.refusal and bug in NEED_STRANGERS:
            pytest.skip(f"not run: there are no strangers, {driver.refusal}")
        with pytest.raises(WrongEndError, match=fault):
            explore(driver, EXAMPLES, seed, simplify=False)


ENDED = Outcome(hung=False, alive=[], harmed=[], seconds=0.5)


def test_harmed_stranger_is_found() -> None:
    """An SDK that takes the session of a collected runner for the task's harms whoever has got that number."""
    heir: Step = {"fork": {"id": 1, "steps": ["setsid"], "then": "heir"}}
    example = Example({"id": 0, "steps": [heir], "then": "stay"}, "409")
    with start_driver(bugs=["count-collected"]) as driver:
        if driver.refusal:
            pytest.skip(f"not run: there are no strangers, {driver.refusal}")
        with pytest.raises(WrongEndError, match=r"stranger .* was harmed"):
            check_often(driver, example)


def check_often(driver: Driver, example: Example) -> None:
    for _ in range(TRIES):
        check(driver, example)


def test_dead_driver_is_told() -> None:
    """A driver that has died before it gets an example ends the search with its own output."""
    example = Example({"id": 0, "steps": [], "then": "stay"}, "409")
    with start_driver() as driver:
        (process,) = psutil.Process().children()
        process.kill()
        process.wait()
        with pytest.raises(DriverFailedError, match="no answer"):
            driver.run(example)


def test_failed_driver_ends_the_search() -> None:
    """Nothing is tried on a driver that has failed: each further example would wait for it."""
    driver = Mock(spec=Driver)
    driver.run.side_effect = DriverFailedError("no answer")
    with pytest.raises(DriverFailedError):
        explore(driver, EXAMPLES, SEED)
    assert driver.run.call_count == 1


def test_lack_of_strangers_is_told(mocker: MockerFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there can be no PID namespace the search goes on, and says what it does not show."""
    driver = Mock(spec=Driver, refusal="Operation not permitted")
    driver.run.return_value = ENDED
    mocker.patch("tests.random_trees.__main__.start_driver", return_value=nullcontext(driver))

    assert main(["--examples", "1"]) == 0

    assert "No strangers take numbers that are free: Operation not permitted" in capsys.readouterr().out


def test_namespace_is_refused_to_a_user() -> None:
    """Whoever may not open a PID namespace is told why, and stays where it is."""
    code = (
        "import os; from tests.random_trees.strangers import find_refusal\n"
        f"os.geteuid() or os.setuid({NOBODY})\n"
        "print(find_refusal())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )

    assert "Operation not permitted" in result.stdout


@pytest.mark.parametrize("arguments", [["9.9.9"], ["--bug", "nonsense"]], ids=" ".join)
def test_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A version that is not supported and a bug that is not there get one sentence, and the exit status 2."""
    assert main(arguments) == UNUSABLE

    message = capsys.readouterr().err
    assert arguments[-1] in message
    assert len(message.splitlines()) == 1
