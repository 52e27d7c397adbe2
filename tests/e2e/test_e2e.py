"""A real Airflow whose tasks are set to failed: the patched one ends everything, and the stock one shows why."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, NoReturn

import pytest
from rich.console import Console

from patches.errors import PatchError
from patches.releases import find_release
from tests.e2e.__main__ import choose, main, run_scenario
from tests.e2e.deployment import EXECUTORS, Installation, check_tools, install, prepare_database
from tests.e2e.outcomes import AT_ONCE, Outcome, judge_signals
from tests.e2e.report import Result, find_failures
from tests.e2e.scenarios import SCENARIOS
from tests.e2e.scenarios.load import KILLED, TASKS, judge_states
from tests.e2e.servers import ServerFailedError
from tests.harness import users
from tests.harness.environments import Environment
from tests.harness.lines import mark_rest, skips_without_interpreter
from tests.harness.wheels import build_patched_wheel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.deployment import Executor

VERSION = "3.1.8"
SET_FAILED = next(scenario for scenario in SCENARIOS if scenario.name == "set-failed")

Sides = dict[bool, Environment]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Return the stock environment under False and the patched one under True."""
    release = find_release(VERSION)
    wheel = build_patched_wheel(release, tmp_path_factory.mktemp("dist"))
    with skips_without_interpreter():
        return {False: install(release, None), True: install(release, wheel)}


@pytest.fixture(scope="module")
def database(sides: Sides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_database(sides[False], tmp_path_factory.mktemp("setup"))


@pytest.mark.parametrize("executor", mark_rest(EXECUTORS, "local".__eq__))
@pytest.mark.parametrize("patched", mark_rest([False, True], bool), ids=["stock", "patched"])
def test_tasks_set_to_failed(
    sides: Sides, database: Path, executor: Executor, tmp_path: Path, *, patched: bool
) -> None:
    """Of tasks that are set to failed the patched SDK leaves nothing, with on_kill done and the log telling it.

    The stock SDK leaves processes behind, and its supervisors crash: otherwise this would prove nothing.
    """
    try:
        check_tools([executor])
    except PatchError as error:
        pytest.skip(f"not run: {error}")
    outcome = SET_FAILED.run(Installation(sides[patched], patched, database, tmp_path / "logs"), executor)

    if patched:
        assert drop_timing(outcome) == []
        assert outcome.left == []
    else:
        assert len(outcome.left) >= 4
        assert any("tracebacks" in problem for problem in outcome.problems)


def drop_timing(outcome: Outcome) -> list[str]:
    """Return the problems other than what came late, which busy processors cause, too."""
    late = ("the last slot was free after", *(f"{task} ended late" for task in AT_ONCE))
    return [problem for problem in outcome.problems if not problem.startswith(late)]


def make_outcome(problems: list[str]) -> Outcome:
    return Outcome(started=1, left=[], seconds=1.0, states={}, problems=problems)


def test_failed_scenario_is_told() -> None:
    """A patched side with a problem fails the run, and so does a stock side that shows nothing."""
    well = make_outcome(problems=[])
    ill = make_outcome(problems=["left of bash: bash (4711)"])

    assert not list(find_failures([Result(SET_FAILED, "local", patched=True, outcome=well)]))
    assert list(find_failures([Result(SET_FAILED, "local", patched=True, outcome=ill)]))
    assert list(find_failures([Result(SET_FAILED, "local", patched=False, outcome=well)]))


@pytest.mark.parametrize("error", [ServerFailedError, TimeoutError])
def test_scenario_that_breaks_off_is_told(tmp_path: Path, error: type[Exception]) -> None:
    """It is a problem of its own side, and what comes after it is run."""

    def break_off(_installation: Installation, _executor: Executor) -> NoReturn:
        raise error("scheduler ended\nwith a long log")

    environment = Environment(find_release(VERSION), tmp_path, tmp_path)
    installation = Installation(environment, patched=True, database=tmp_path, logs=tmp_path)
    said = io.StringIO()
    outcome = run_scenario(SET_FAILED._replace(run=break_off), installation, "local", Console(file=said))
    assert outcome.problems == ["broken off: scheduler ended"]
    assert "with a long log" in said.getvalue()


@pytest.mark.parametrize(
    ("signals", "problems"),
    [
        ({1: "SIGKILL", 2: "SIGTERM"}, 0),
        ({1: "SIGKILL", 2: "SIGTERM", 3: "SIGTERM"}, 0),
        ({1: "SIGKILL", 2: "SIGTERM", 3: "SIGKILL"}, 1),
        ({1: "SIGKILL", 2: "SIGKILL"}, 1),
        ({1: "SIGKILL", 3: "SIGTERM"}, 1),
        ({}, 1),
    ],
)
def test_wrong_signals_are_told(signals: dict[int, str], problems: int) -> None:
    """Who is due must be named with its signal; of the others any may have needed another SIGTERM, and none SIGKILL."""
    named = [{"pid": pid, "signal": signal} for pid, signal in signals.items()]
    assert len(list(judge_signals(named, {1: "SIGKILL", 2: "SIGTERM"}))) == problems


def test_wrong_state_under_load_is_told() -> None:
    """A task that was killed and has succeeded is a problem, and so is one that is missing."""
    due: dict[int, str | None] = {index: "failed" if index in KILLED else "success" for index in range(TASKS)}
    missing = {index: state for index, state in due.items() if index}

    assert list(judge_states(due)) == []
    assert list(judge_states({**due, KILLED[1]: "success"})) == [
        f"many {KILLED[1]} is success and not failed"
    ]
    assert list(judge_states(missing)) == [f"there are {TASKS - 1} tasks and not {TASKS}"]


@pytest.mark.parametrize("arguments", [["9.9.9"], ["kubernetes"]], ids=" ".join)
def test_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is neither a supported version nor an executor gets one sentence, and the exit status 2."""
    assert main(arguments) == 2

    message = capsys.readouterr().err
    assert arguments[0] in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("lack", ["root", "sudo"])
def test_scenario_beyond_this_system(
    lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever asks for tasks of another user without being root, or without sudo, is told so in one sentence."""
    monkeypatch.setattr(os, "geteuid", lambda: 1 if lack == "root" else 0)
    monkeypatch.setattr(users, "ADMIN_PATH", str(tmp_path))

    assert main(["--scenario", "another-user", "local"]) == 2

    message = capsys.readouterr().err
    assert lack in message
    assert len(message.splitlines()) == 1


def test_scenarios_beyond_this_system_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for no scenario gets those that can be run, and is told which cannot."""
    monkeypatch.setattr(users, "ADMIN_PATH", str(tmp_path))
    errors = Console(file=io.StringIO(), soft_wrap=True)

    names = [scenario.name for scenario in choose(None, errors)]

    assert "set-failed" in names
    assert "another-user" not in names
    assert isinstance(errors.file, io.StringIO)
    assert "Not run: another-user." in errors.file.getvalue()
