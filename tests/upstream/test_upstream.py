"""The comparison of upstream's tests: what it makes of reports, and that it finds a wheel that is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.progress import Progress

from patches.releases import find_release
from patches.rules import load_changes
from patches.upstream import fetch_wheel
from patches.wheels import build_wheel
from tests.harness.consoles import UNUSABLE
from tests.harness.environments import Environment
from tests.upstream import judging, suites
from tests.upstream.__main__ import REGRESSED, main
from tests.upstream.judging import judge_release
from tests.upstream.results import Result, compare_results, read_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.upstream.judging import Verdict
    from tests.upstream.results import Outcome

PYTEST_TIMEOUT = 60
# The slowest test of the suite below takes 1.2 s where kill() works, and hangs where it does not.
TIMEOUT_ON_STOCK, TIMEOUT_WHERE_BROKEN = 20, 6

VERSION = "1.1.8"
SUITE = f"{suites.SUPERVISOR_TESTS}::TestWatchedSubprocessKill"
BROKEN_BY_DEAF_KILL = (
    "test_kill_process_custom_signal",
    "test_kill_escalation_path[SIGTERM-escalates-to-SIGKILL]",
)
DEAF_KILL = """\
change: deaf-kill
what: The supervisor's kill() signals nobody.
why: A harness that does not notice is worth nothing.
upstream: Not there.
files: []
tests: []
---
id: deaf-kill
language: python
message: Let kill() do nothing.
note: The methods that other classes have of this name stay.
metadata: {file: airflow/sdk/execution_time/supervisor.py}
rule:
  kind: function_definition
  has: {field: name, regex: ^kill$}
  inside:
    kind: class_definition
    has: {field: name, regex: ^WatchedSubprocess$}
    stopBy: end
fix: |-
  def kill(self, *_args, **_kwargs):
      pass
"""
# A module with a test for every outcome, and one that cannot be collected.
MODULE = """\
import pytest

def test_passes(): pass
def test_skips(): pytest.skip("on purpose")
def test_fails(): assert 1 == 2

@pytest.mark.xfail
def test_fails_as_expected(): assert False

@pytest.fixture
def ending_badly():
    yield
    raise OSError("in teardown")

def test_ends_badly(ending_badly): pass
def test_fails_and_ends_badly(ending_badly): assert False

class TestOuter:
    class TestInner:
        @pytest.mark.parametrize("value", ["a.b::c"])
        def test_passes(self, value): pass
"""
UNCOLLECTABLE = "raise ImportError('of what is not there')\n"


def test_reports_are_read_by_node_id(tmp_path: Path) -> None:
    """Every test has the id and the outcome that pytest prints; the worse one if it has two."""
    write_tests(tmp_path / "tests")
    results = read_report(write_report(tmp_path))
    assert {name: result.outcome for name, result in results.items()} == {
        "tests/test_outcomes.py::test_passes": "passed",
        "tests/test_outcomes.py::test_skips": "skipped",
        "tests/test_outcomes.py::test_fails": "failed",
        "tests/test_outcomes.py::test_fails_as_expected": "xfailed",
        "tests/test_outcomes.py::test_ends_badly": "error",
        "tests/test_outcomes.py::test_fails_and_ends_badly": "error",
        "tests/test_outcomes.py::TestOuter::TestInner::test_passes[a.b::c]": "passed",
        "tests/test_uncollectable.py": "error",
    }
    assert results["tests/test_outcomes.py::test_fails"].message == "assert 1 == 2"


def write_tests(folder: Path) -> None:
    folder.mkdir()
    (folder / "test_outcomes.py").write_text(MODULE, encoding="utf-8")
    (folder / "test_uncollectable.py").write_text(UNCOLLECTABLE, encoding="utf-8")


def write_report(folder: Path) -> Path:
    """Run the tests in a folder with the options that upstream's are run with, as far as these are pytest's own."""
    report = folder / "report.xml"
    options = ["--continue-on-collection-errors", "-o", "junit_family=xunit1", f"--junit-xml={report}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder), *options]
    subprocess.run([*command, "tests"], cwd=folder, check=False, capture_output=True, timeout=PYTEST_TIMEOUT)
    return report


@pytest.mark.parametrize(
    ("stock", "patched"),
    [
        ("passed", "failed"),
        ("passed", "error"),
        ("passed", "skipped"),
        ("passed", None),
        ("skipped", "failed"),
        ("xfailed", "failed"),
        (None, "error"),
    ],
)
def test_change_for_the_worse_is_a_regression(stock: Outcome | None, patched: Outcome | None) -> None:
    """A test that is sound on stock must be run on patched and be sound there; no test may be broken there alone."""
    assert compare_results(report_one(stock), report_one(patched)).regressions == ["a test"]


@pytest.mark.parametrize(
    ("stock", "patched"),
    [
        ("passed", "passed"),
        ("failed", "passed"),
        ("failed", "error"),
        ("failed", None),
        ("skipped", "skipped"),
        ("skipped", None),
        ("xfailed", "passed"),
        ("passed", "xfailed"),
        (None, "passed"),
    ],
)
def test_other_changes_are_no_regressions(stock: Outcome | None, patched: Outcome | None) -> None:
    """What is broken on stock, or expected to fail, is upstream's own."""
    assert compare_results(report_one(stock), report_one(patched)).regressions == []


def report_one(outcome: Outcome | None) -> dict[str, Result]:
    return {} if outcome is None else {"a test": Result(outcome)}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Result]]:
    """Stand in for the environments: every run takes its results from the front of this list."""
    results: list[dict[str, Result]] = []
    monkeypatch.setattr(
        judging, "install_suite", lambda release, *_arguments: Environment(release, Path(), Path())
    )
    monkeypatch.setattr(judging, "run_suite", lambda *_arguments, **_options: results.pop(0))
    return results


def report_each(*outcomes: Outcome) -> list[dict[str, Result]]:
    return [report_one(outcome) for outcome in outcomes]


def judge_runs() -> Verdict:
    return judge_release(find_release(VERSION), Path("a.whl"), "tests", Progress(disable=True))


def test_difference_that_always_shows_again_is_believed(runs: list[dict[str, Result]]) -> None:
    """A test that fails on patched and in both repeats has regressed."""
    runs += report_each("passed", "failed", "failed", "failed")
    verdict = judge_runs()
    assert (verdict.regressions, verdict.passing_again) == (["a test"], [])


def test_difference_is_repeated_no_more_than_needed(runs: list[dict[str, Result]]) -> None:
    """Once no difference has shown again, nothing is left to find out."""
    runs += report_each("passed", "failed", "passed", "failed")
    assert judge_runs().regressions == []
    assert runs == [report_one("failed")]


def test_difference_that_does_not_always_show_again_is_told(runs: list[dict[str, Result]]) -> None:
    """A test that fails twice and passes in the second repeat is no regression, and is listed nevertheless."""
    runs += report_each("passed", "failed", "failed", "passed")
    verdict = judge_runs()
    assert (verdict.regressions, verdict.passing_again) == ([], ["a test"])


def test_test_that_is_not_repeated_is_no_pass(runs: list[dict[str, Result]]) -> None:
    """A suspect that a repeat skips or lacks has not been cleared."""
    runs += [report_one("passed"), report_one("failed"), {}, report_one("skipped")]
    assert judge_runs().regressions == ["a test"]


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the reports apart from those of a real run."""
    monkeypatch.setattr(suites, "REPORTS", tmp_path / "reports")
    return tmp_path / "reports"


def test_run_without_a_test_is_an_error(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A suite that is not there is never a pass: the command says what pytest said, and where all of it is."""
    status = main(
        [VERSION, "--suite", "tests/no_such_file.py", "--wheel", str(fetch_wheel(find_release(VERSION)))]
    )
    message = capsys.readouterr().err
    assert status == UNUSABLE
    assert "file or directory not found: tests/no_such_file.py" in message
    assert str(reports / f"{VERSION}-stock.log") in message


@pytest.fixture
def deaf_wheel(tmp_path: Path) -> Path:
    """Build a wheel whose supervisor does not end its task."""
    (tmp_path / "10-deaf-kill.yml").write_text(DEAF_KILL, encoding="utf-8")
    release = find_release(VERSION)
    return build_wheel(release, fetch_wheel(release), load_changes(tmp_path), tmp_path)


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for tests that hang no longer than needed, and once more at the most."""
    run_suite = suites.run_suite

    def run_impatiently(environment: Environment, selection: Sequence[str], name: str, *others: Any) -> Any:
        timeout = TIMEOUT_ON_STOCK if name.endswith("stock") else TIMEOUT_WHERE_BROKEN
        monkeypatch.setattr(suites, "TEST_TIMEOUT", timeout)
        return run_suite(environment, selection, name, *others)

    monkeypatch.setattr(judging, "run_suite", run_impatiently)
    monkeypatch.setattr(judging, "REPEATS", 1)


@pytest.mark.everything
@pytest.mark.usefixtures("reports", "impatience")
def test_broken_wheel_is_found(deaf_wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wheel that breaks what upstream tests fails the command, which names the tests, hanging ones included."""
    status = main([VERSION, "--suite", SUITE, "--wheel", str(deaf_wheel)])
    report = capsys.readouterr().out
    assert status == REGRESSED
    assert re.search(rf"^SDK {VERSION}: \d+ broken by the patches:$", report, re.MULTILINE)
    for test in BROKEN_BY_DEAF_KILL:
        assert f"  {SUITE}::{test}\n    failed: " in report
