"""Our tests pass on every line with the patched wheel, fail on its stock wheel, and upstream's tests keep passing."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from packaging.version import Version
from rich.progress import Progress

from patches.environments import NoInterpreterError
from patches.releases import find_release, last_of_lines
from tests.harness.lines import find_wanted, mark_rest, skips_without_interpreter
from tests.harness.wheels import build_patched_wheel
from tests.sdk.running import (
    FURTHER_PYTHONS,
    RUNS,
    SCENARIOS,
    Run,
    install_release,
    name_run,
    run_our_tests,
)
from tests.upstream.judging import judge_release
from tests.upstream.suites import RUNTIME_TESTS, SUPERVISOR_TESTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from patches.releases import Release
    from tests.harness.environments import Environment
    from tests.upstream.judging import Verdict
    from tests.upstream.results import Result

UNCHANGED = {
    "TestUnchanged::test_other_types_stay_in_the_group",
    "TestUnchanged::test_other_types_are_killed_alone",
    *(
        f"TestUnchanged::test_success_leaves_processes_alone[{state}]"
        for state in (None, "success", "deferred", "up_for_reschedule", "skipped")
    ),
    "TestUnchanged::test_opt_out",
    "TestUnchanged::test_log_is_silent_when_nothing_was_left",
}
# These sockets are forgotten together with the selector, by chance; the others crash the supervisor.
FORGOTTEN = {f"TestSockets::test_overdue_sockets_are_closed[{held}]" for held in ("stdout", "stderr")}
# From 1.2.2 on the loop ends with the clean-up.
NO_CRASH = FORGOTTEN | {f"TestSockets::test_overdue_sockets_are_closed[{held}]" for held in ("stdin", "logs")}
# From 1.3.1 on the runner has a process group.
GROUP = {"TestGroup::test_kill_takes_the_group_along"}
# 1.3 has handlers in the place of what the supervisor had ignored.
IGNORED = {"TestIgnoredSignal::test_stays_ignored"}
# 1.3 passes a signal on to the runner alone, and ends nothing.
SPARED = {f"TestSpared::test_member_of_the_group[{is_busy}]" for is_busy in (False, True)}
PASS_ON_STOCK = {
    "1.0.6": UNCHANGED | FORGOTTEN | IGNORED,
    "1.1.8": UNCHANGED | FORGOTTEN | IGNORED,
    "1.2.2": UNCHANGED | NO_CRASH | IGNORED,
    "1.3.2": UNCHANGED | NO_CRASH | GROUP | SPARED,
    "1.4.0b2": UNCHANGED | NO_CRASH | GROUP | IGNORED,
}
# Passes from 1.3.1 on if stock notices the exit in time, which is a matter of chance.
BY_CHANCE = {"TestGroup::test_heartbeat_conflict_takes_the_group_along"}
# Most scenarios wait in vain there, each for as long as this says, which is too short for one that passes on a busy machine.
STOCK_VARIABLES = {"TEARDOWN_TESTS_PATIENCE": "5"}
# It needs coroutines that may ask the supervisor, which SDK 1.2 was the first to have.
NEED_COROUTINES = {f"TestComms::test_{what}" for what in ("coroutine_that_has_given_up", "many_coroutines")}
# They need a private /proc, which root may have unless a sandbox forbids it. Forced counterparts run everywhere.
NEED_NAMESPACES = {
    *(
        f"TestProc::test_hidepid[{daemon}-{way}]"
        for daemon in ("be_polite", "be_deaf", "exec_shell")
        for way in ("conflict", "killed", "failed")
    ),
    *(
        f"TestHidden::test_{what}"
        for what in (
            *("entries_that_are_closed", "processes_that_are_not_listed", "text"),
            *("entries_that_open", "found_and_ended", "strangers", "supervisor", "without_pidfd", "zombie"),
        )
    ),
    *(f"TestHidden::test_no_descriptor_left[{error}]" for error in ("EMFILE", "ENFILE", "ENOMEM")),
    *(f"TestRecycledNumber::test_{who}" for who in ("leader", "leftover")),
    "TestFind::test_proc_of_another_namespace",
    "TestFindOrphans::test_namespace_within",
    "TestFindOrphans::test_proc_of_another_namespace",
    # Another user is had by root alone, too.
    "TestFindOrphans::test_other_users",
    "TestFind::test_session_recycled_between_two_looks",
    "TestOrigin::test_supervisor_in_a_namespace_within",
    "TestLook::test_namesakes_are_told_apart",
    "TestMeansToFind::test_hidden",
}

Results = dict[str, "Result"]
# Run all our tests: each line and each interpreter once. The other runs have the scenarios, which show what the edits of a
# line do on an interpreter. On the newest line the commit for upstream runs them all (test_pull_requests.py).
WHOLE: set[Run] = set(FURTHER_PYTHONS[:-1])
NEWEST: Run = (last_of_lines()[-1].version, None)
# Without --everything; an interpreter that is as likely there as any.
MAIN_RUN: Run = ("1.1.8", None)
# Upstream's, of what the rules edit.
SUITES = [
    *(
        pytest.param(
            release.version,
            SUPERVISOR_TESTS,
            marks=() if release.version == MAIN_RUN[0] else pytest.mark.everything,
        )
        for release in last_of_lines()
    ),
    *(
        pytest.param(release.version, RUNTIME_TESTS, marks=pytest.mark.everything)
        for release in last_of_lines()
        if Version(release.version) >= Version("1.4.0b1")
    ),
]


@pytest.fixture(scope="module", params=last_of_lines(), ids=lambda release: release.version)
def release(request: pytest.FixtureRequest) -> Release:
    release: Release = request.param
    return release


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def stock_results(request: pytest.FixtureRequest) -> dict[str, Results]:
    """Run the scenarios on all stock wheels at once, for most of the time they wait in vain."""
    with skips_without_interpreter():
        environments = [install_release(release) for release in find_wanted(request, "release")]

    def run_scenarios(environment: Environment) -> Results:
        results = run_our_tests(environment, *SCENARIOS, variables=STOCK_VARIABLES)
        passing = PASS_ON_STOCK[environment.release.version]
        late = [name for name in passing if results[name].outcome != "passed"]
        return results | run_our_tests(environment, *SCENARIOS, names=late) if late else results

    with ThreadPoolExecutor() as pool:
        runs = pool.map(run_scenarios, environments)
        return {
            environment.release.version: results
            for environment, results in zip(environments, runs, strict=True)
        }


@pytest.fixture(scope="module")
def patched_results(request: pytest.FixtureRequest, dist: Path) -> dict[Run, Results | NoInterpreterError]:
    """Run our tests, as many runs at a time as there are processors: half of the time they wait."""
    runs: list[Run] = find_wanted(request, "run")
    versions = {version for version, _ in runs}
    wheels = {version: build_patched_wheel(find_release(version), dist) for version in versions}

    def install_run(run: Run) -> Environment | NoInterpreterError:
        version, python = run
        try:
            return install_release(find_release(version), wheel=wheels[version], python=python)
        except NoInterpreterError as error:
            return error

    def run_tests(run: Run) -> Results | NoInterpreterError:
        environment = environments[run]
        if isinstance(environment, NoInterpreterError):
            return environment
        return run_our_tests(environment, *(() if run in whole else SCENARIOS))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        environments = dict(zip(runs, pool.map(install_run, runs), strict=True))
        whole = choose_whole({run for run in runs if not isinstance(environments[run], NoInterpreterError)})
        return dict(zip(runs, pool.map(run_tests, runs), strict=True))


def choose_whole(available: set[Run]) -> set[Run]:
    """Return the runs of all our tests: a line whose interpreter is missing has another one do it."""
    whole = WHOLE & available
    lines = {version for version, _ in {*whole, NEWEST}}
    return whole | {(version, python) for version, python in available if version not in lines}


@pytest.mark.parametrize("missing", [None, "3.9", "3.12"])
def test_every_line_and_interpreter_runs_everything(missing: str | None) -> None:
    """All our tests run on every line, and on every interpreter that is there."""
    available = {run for run in RUNS if missing is None or run[1] != missing}
    whole = {*choose_whole(available), NEWEST}
    assert {version for version, _ in whole} == {release.version for release in last_of_lines()}
    assert {python for _, python in whole} == {python for _, python in available}


def name_failures(results: Results, version: str) -> Results:
    """Return the results other than a pass, and than a skip for want of namespaces, or of coroutines that ask."""
    may_be_skipped = NEED_NAMESPACES | (NEED_COROUTINES if Version(version) < Version("1.2") else set())
    return {
        name: result
        for name, result in results.items()
        if result.outcome != "passed" and not (result.outcome == "skipped" and name in may_be_skipped)
    }


@pytest.mark.parametrize("run", mark_rest(RUNS, MAIN_RUN.__eq__), ids=name_run)
def test_our_tests_pass_on_patched(
    patched_results: dict[Run, Results | NoInterpreterError], run: Run
) -> None:
    """Our tests pass on the last of every line, also on its oldest or newest interpreter."""
    results = patched_results[run]
    if isinstance(results, NoInterpreterError):
        pytest.skip(f"not run: {results}")
    assert results
    assert name_failures(results, run[0]) == {}


@pytest.mark.everything
def test_scenarios_fail_on_stock(release: Release, stock_results: dict[str, Results]) -> None:
    """Exactly the scenarios fail on the stock wheel that the patches are for."""
    results = stock_results[release.version]
    passed = {name for name, result in results.items() if result.outcome == "passed"}
    assert passed - BY_CHANCE == PASS_ON_STOCK[release.version]
    assert {result.outcome for result in results.values()} == {"passed", "failed"}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, dist: Path) -> Iterator[dict[str, Future[dict[str, Verdict]]]]:
    """Run upstream's suites, as many releases at a time as there are processors; by version, then by suite."""

    def judge(version: str) -> dict[str, Verdict]:
        release = find_release(version)
        wheel = build_patched_wheel(release, dist)
        # The runs of a release share the names of their reports, so that they come one after the other.
        return {
            suite: judge_release(release, wheel, suite, Progress(disable=True))
            for suite in find_wanted(request, "suite", version=version)
        }

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {version: pool.submit(judge, version) for version in find_wanted(request, "version")}


@pytest.mark.parametrize(("version", "suite"), SUITES)
def test_upstreams_tests_keep_passing(
    verdicts: dict[str, Future[dict[str, Verdict]]], version: str, suite: str
) -> None:
    """Whatever passes on the stock wheel passes on the patched one."""
    with skips_without_interpreter():
        verdict = verdicts[version].result()[suite]
    assert len(verdict.patched.results) == len(verdict.stock.results)
    assert verdict.regressions == []
    assert any(result.outcome == "passed" for result in verdict.stock.results.values())
