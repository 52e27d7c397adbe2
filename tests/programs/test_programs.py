"""The parts of the session; what becomes of the programs is for `nox -s programs` to say."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from patches.errors import PatchError
from patches.releases import find_release
from tests.harness.consoles import UNUSABLE
from tests.harness.namespaces import UNSHARE_NETWORK, find_refusal
from tests.harness.processes import find_marked, make_cookie
from tests.harness.real.running import Result, end_namespace
from tests.programs import __main__ as command_line
from tests.programs.__main__ import main
from tests.programs.program import SHELL, WAYS, Program
from tests.programs.report import find_failures, list_exceptions, make_table, sum_up, write_json
from tests.programs.running import Outcome, Run, describe, plan
from tests.programs.table import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

RELEASE = find_release("3.1.8")
MADE_UP = Program("sleeper", "sleep 600 &", stays={"sleep": "no reason"}, stays_after=("fails",))
SET_TO_FAILED, _, RUNNER_KILLED, FAILS, SUPERVISOR_KILLED = WAYS
RESULT = Result(seconds=0.1, seconds_to_nothing=0.0, events=[{"event": "ready"}])


def test_names() -> None:
    """No two programs have the same name."""
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_script(program: Program) -> None:
    """Every script is one that the shell understands."""
    subprocess.run(["bash", "-n", "-c", program.text], check=True)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_what_may_stay(program: Program) -> None:
    """Only a program that may leave something says after which ways, and these are ways."""
    assert set(program.stays_after) <= {way.name for way in WAYS}
    assert program.stays or not program.stays_after


def test_what_is_missing() -> None:
    """A program that the machine has not is named with all that it lacks."""
    program = Program("x", needs=("sh", "no-such-tool", "no-such-tool-either"))
    assert list(program.list_missing()) == ["no-such-tool", "no-such-tool-either"]


def test_what_is_not_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program that is not run is named in one line, with the reason; with none left that is an error."""
    absent = Program("absent", needs=("no-such-tool",))
    large, public = Program("large", large=True), Program("public", public=True)
    monkeypatch.setattr(command_line, "PROGRAMS", (MADE_UP, absent, large, public))
    console = Console(width=100)
    assert command_line.choose(None, console, large=False, private=False) == [MADE_UP]
    assert capsys.readouterr().out.splitlines() == [
        "Not run: absent. It needs no-such-tool.",
        "Not run: large. It is a large download: --large has it made.",
        "Not run: public. It would listen on every network.",
    ]
    assert command_line.choose(None, console, large=True, private=True) == [MADE_UP, large, public]
    with pytest.raises(PatchError):
        command_line.choose(["absent"], console, large=True, private=True)


def test_case() -> None:
    """A task that is to fail is freed, and nobody asks it to end; the others are ended as the way says."""
    cases = [way.make_case(MADE_UP, {"DATA": "here"}, everything=True) for way in WAYS]
    assert [(case.end, case.to) for case in cases if not case.free] == [
        ("409", "supervisor"),
        ("SIGTERM", "supervisor"),
        ("SIGKILL", "runner"),
        ("SIGKILL", "supervisor"),
    ]
    assert {case.task for case in cases} == {SHELL}
    assert all(
        case.settings["DATA"] == "here" and "sleep 600 &" in case.settings["PROGRAM"] for case in cases
    )


def test_plan() -> None:
    """Every program is ended in every way, stock beside patched."""
    runs = plan([MADE_UP], WAYS[:1])
    assert runs == [Run(MADE_UP, WAYS[0], patched=False), Run(MADE_UP, WAYS[0], patched=True)]


def test_outcome() -> None:
    """What is left counts by name; the id of a try is none."""
    result = replace(RESULT, left=[(7, "sleep"), (6, "airflow worker -- 0123")])
    assert describe(SET_TO_FAILED, result) == Outcome(("airflow worker", "sleep"), 0.1)


@pytest.mark.parametrize(
    ("changes", "supervisor"),
    [
        ({"hung": True}, "hung"),
        ({"exception": "ValueError"}, "crashed: ValueError"),
        ({"killed_by": 15}, "died of signal 15"),
    ],
)
def test_supervisor(changes: dict[str, object], supervisor: str) -> None:
    """A supervisor that does not return is said to be wrong."""
    assert describe(RUNNER_KILLED, replace(RESULT, **changes)).supervisor == supervisor  # type: ignore[arg-type]


def test_supervisor_that_is_killed() -> None:
    """Where it was killed on purpose nothing is wrong, and the time is that until nothing was left."""
    result = replace(RESULT, killed_by=9, seconds=None, seconds_to_nothing=0.4)
    assert describe(SUPERVISOR_KILLED, result) == Outcome((), 0.4)


def test_program_that_was_never_there() -> None:
    """Of a task that has ended before its program was there nothing can be said, and that is a failure on either side."""
    outcome = describe(FAILS, replace(RESULT, events=[]))
    assert outcome.problem
    for patched in (False, True):
        assert len(list(find_failures({Run(MADE_UP, FAILS, patched): outcome}))) == 1


def test_what_fails() -> None:
    """The patched side may leave what is documented, after the ways for which it is, and nothing else; stock may leave all."""
    left = Outcome(("sleep",), 0.1)
    assert not list(find_failures({Run(MADE_UP, SET_TO_FAILED, patched=False): left}))
    assert not list(find_failures({Run(MADE_UP, FAILS, patched=True): left}))
    [failure] = find_failures({Run(MADE_UP, SET_TO_FAILED, patched=True): left})
    assert failure == "sleeper, set to failed, patched: left 1 (sleep)"
    [failure] = find_failures({Run(MADE_UP, FAILS, patched=True): Outcome(("sh", "sleep"))})
    assert "sh" in failure
    [failure] = find_failures({Run(MADE_UP, FAILS, patched=True): Outcome((), None, "hung")})
    assert "hung" in failure


def test_report(tmp_path: Path) -> None:
    """Stock is beside patched, what is documented has its reason, and a file has all that was seen."""
    outcomes = {
        Run(MADE_UP, FAILS, patched=False): Outcome(("sh", "sleep", "sleep"), None, "hung"),
        Run(MADE_UP, FAILS, patched=True): Outcome(("sleep",), 0.25),
    }
    console = Console(width=150)
    with console.capture() as capture:
        console.print(make_table(RELEASE, outcomes))
    [row] = [line for line in capture.get().splitlines() if "sleeper" in line]
    assert "3 (sh, 2 sleep); hung" in row
    assert row.rstrip().endswith("0.2")
    assert list(list_exceptions(outcomes)) == ["Of sleeper the patched side leaves sleep: no reason."]
    assert list(sum_up(outcomes)) == [
        "Stock: 3 processes left by 1 of 1 tasks, 1 supervisors crashed, hung or died.",
        "Patched: 1 processes left by 1 of 1 tasks, 0 supervisors crashed, hung or died.",
    ]
    write_json(tmp_path / "outcomes.json", outcomes)
    assert [row["side"] for row in json.loads((tmp_path / "outcomes.json").read_text())] == [
        "stock",
        "patched",
    ]


def test_namespace_ends() -> None:
    """With the first process of a namespace all others there have ended when it returns."""
    if refusal := find_refusal(network=True):
        pytest.skip(f"not run: there is no PID namespace here: {refusal}")
    with make_cookie() as cookie:
        script = f"setsid --fork sh -c 'echo; sleep 600; : {cookie}' & wait; sleep 600; : {cookie}"
        with subprocess.Popen([*UNSHARE_NETWORK, "sh", "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            end_namespace(process)
            process.wait()
        assert find_marked(cookie) == []


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are asked for are listed, and none is run."""
    assert main(["--list", "--program", "multiprocessing, fork"]) == 0
    assert "multiprocessing, fork" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--program", "nobody"], ["9.9.9"]])
def test_unknown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A program or a version that is not known gets one sentence, and a status of its own."""
    assert main(arguments) == UNUSABLE
    assert len(capsys.readouterr().err.splitlines()) == 1
