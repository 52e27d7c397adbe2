"""Tasks of Airflow's own task runner that are told to stop: all of them ends at once, and the truth is told.

The driver runs every case of a line at once, tests/harness/real/dags/told.py has the tasks, and the checks below look at what came of all.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from packaging.specifiers import SpecifierSet

from patches.releases import last_of_lines
from tests.harness.lines import MAIN_LINES, mark_other_versions
from tests.harness.real.running import GRACE, Case, start_driver
from tests.harness.supervised import ENDS_TASK_ON_SIGTERM
from tests.sdk.real import (
    ASYNC_TASKS,
    EVERY_LINE,
    EXEC_LINES,
    NO_HANDLER,
    STOP,
    USE_EXEC,
    find_faults_by,
    install,
    run_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.harness.environments import Environment
    from tests.harness.real.running import Driver, Result

# What ends at once takes some hundredths of a second. The grace is this long to show, on a busy machine too, that nobody waits
# for it.
SOON = GRACE - 10
SHORT_GRACE = 1
# The contract says one second more than the grace; the rest is for a busy machine, and the bench has the tight bound.
MARGIN = 1 + 19
ON_KILL_TIME = 2
# Stock supervisors wait 5 s before they kill, or for ever.
STOCK_PATIENCE = 7
RANDOM_MOMENTS = 40
SEED = 11
RANDOM_DELAY = 0.05
"""Seconds: a hundred requests take about as long."""

FINISH = {"AIRFLOW__WORKERS__STOP_SIGNAL_POLICY": "finish"}
# Earlier ones know nothing of that answer.
GONE_ENDS = SpecifierSet(">=1.2.0", prereleases=True)


@dataclass(frozen=True)
class Expected:
    """What must come of a task that is told to stop, besides what holds for all."""

    tells: tuple[str, ...] = ()
    """Events that must have been told, once each."""
    ends: str = "soon"
    """`soon`, `after the grace`, or by then at the latest: `within the grace`."""
    state: str = "failed"
    callback: str | None = "on_failure_callback"
    """What runs where the server has not refused; None for a runner that is killed."""


KILLED = Expected(ends="after the grace", callback=None)
ON_KILL = Expected(tells=("on_kill",))

TASKS = {
    "told": ON_KILL,
    "flag": ON_KILL,
    "defers_when_killed": ON_KILL,
    "slow_on_kill": Expected(tells=("on_kill", "on_kill_done")),
    "raises_in_on_kill": ON_KILL,
    "asks_in_on_kill": Expected(tells=("on_kill", "answered")),
    "asks_always": Expected(tells=("on_kill", "answered")),
    "logs": ON_KILL,
    "prints_always": ON_KILL,
    "odd_output": ON_KILL,
    "waits_on_kill": Expected(tells=("on_kill", "told_once")),
    "has_timeout": ON_KILL,
    "sensor": ON_KILL,
    "bash": ON_KILL,
    "triggers": ON_KILL,
    "pre_execute": Expected(),
    "skips_when_killed": ON_KILL,
    "post_execute": Expected(tells=("finished",), state="success", callback="on_success_callback"),
    "sleeps": Expected(),
    "has_finally": Expected(tells=("finally",)),
    "asks": Expected(tells=("finally",)),
    "blocked": KILLED,
    "swallows_all": Expected(tells=("swallowed",)),
    "swallows_errors": Expected(),
    "finalizes": Expected(),
    "complains": Expected(),
    "deaf": KILLED,
    "pool": Expected(ends="within the grace", callback=None),
    "forks": Expected(ends="within the grace"),
    "sleeps_async": Expected(tells=("finally",)),
    "several_3": Expected(),
    "several_finally": Expected(tells=("finally",)),
}
COVERING = (
    "told",
    "flag",
    "slow_on_kill",
    "waits_on_kill",
    "bash",
    "triggers",
    "has_finally",
    "asks",
    "asks_always",
    "blocked",
    "post_execute",
)
SINCE = dict.fromkeys(("sleeps_async", "several_3", "several_finally"), ASYNC_TASKS) | {"410": GONE_ENDS}
LINES = [NO_HANDLER, *(release.version for release in last_of_lines())]

WAYS = {
    "SIGINT": Case("told", "SIGINT"),
    "SIGHUP": Case("told", "SIGHUP"),
    "SIGQUIT": Case("told", "SIGQUIT"),
    "404": Case("told", "404"),
    "410": Case("told", "410"),
    "two signals": Case("told", count=2),
    "a hundred signals": Case("told", count=100),
    "twelve signals 2 ms apart": Case("told", count=12, gap=0.002),
    "the runner alone": Case("told", to="runner"),
    "the supervisor raises": Case("told", "SIGUSR1"),
    "supervised in a thread": Case("told", "409", host="thread"),
    "below a loop that passes it on": Case("told", host="loop"),
    "with retries": Case("told", retries=True),
    "with retries, killed": Case("blocked", retries=True, grace=SHORT_GRACE),
}


def select_cases(version: str) -> dict[str, Case]:
    """Return the cases of told tasks for a release, by name."""
    cases = {
        f"{task}, {end}": Case(task, end, grace=GRACE if expected.ends == "soon" else SHORT_GRACE)
        for task, expected in TASKS.items()
        for end in ("409", "SIGTERM")
        if version in MAIN_LINES or task in COVERING
    }
    cases |= {f"told, {way}": case for way, case in WAYS.items()}
    return {
        name: replace(case, settings=STOP)
        for name, case in cases.items()
        if all(SINCE.get(each, EVERY_LINE).contains(version) for each in (case.task, case.end))
    }


# What is right


def is_refused(case: Case) -> bool:
    return case.end.isdigit()


def find_wrong_end(case: Case, result: Result) -> str | None:
    """Say what is wrong with how the supervisor returned."""
    if result.hung or result.killed_by:
        return "it hung" if result.hung else f"signal {result.killed_by} killed it"
    right = "SoftTimeLimit" if case.end == "SIGUSR1" else None
    return None if result.exception == right else f"it raised {result.exception}"


def find_rest(_case: Case, result: Result) -> str | None:
    return f"left {result.left}" if result.left else None


def find_lie(case: Case, result: Result) -> str | None:
    """Say what was told that is not true."""
    if case.end == "SIGUSR1":  # the executor sees the exception, and tells
        return f"told {result.states}" if "success" in result.states else None
    state = "up_for_retry" if case.retries else TASKS[case.task].state
    right = [([state], state)]
    if is_refused(case):
        right = [([], "server_terminated")]
    elif case.retries and TASKS[case.task] is KILLED:
        # A supervisor of 1.0 does not know that there are retries when the runner has not said so.
        right.append((["failed"], "failed"))
    told = (result.states, result.final_state)
    return None if told in right else f"told {told}, not {right}"


def find_wrong_events(case: Case, result: Result) -> str | None:
    """Say what the task has not told once, and what it must not tell."""
    tells = TASKS[case.task].tells
    counts = {name: result.count(name) for name in tells if result.count(name) != 1}
    counts |= {name: result.count(name) for name in ("interrupted_child",) if result.count(name)}
    if case.task == "swallows_errors" and result.count("swallowed"):
        counts["swallowed"] = result.count("swallowed")
    if case.host == "loop" and result.count("passed_on") != 1:
        counts["passed_on"] = result.count("passed_on")
    return f"told {counts}" if counts else None


def find_wrong_callbacks(case: Case, result: Result) -> str | None:
    right = TASKS[case.task].callback
    if case.retries and right:
        right = "on_retry_callback"
    called = [each["event"] for each in result.events if each["event"].endswith("_callback")]
    if (
        is_refused(case) or case.end == "SIGUSR1"
    ):  # which ones run then is upstream's affair, but for this one
        lies = TASKS[case.task].state != "success" and "on_success_callback" in called
        return f"called {called}" if lies else None
    if case.task == "pool":  # may be killed, or not
        return None
    return None if called == ([right] if right else []) else f"called {called}, not {right}"


def find_wrong_time(case: Case, result: Result) -> str | None:
    seconds = result.seconds
    if seconds is None:
        return "it did not return"
    if case.task == "slow_on_kill" and seconds < ON_KILL_TIME:
        return f"{seconds} s are too few"
    ends = TASKS[case.task].ends
    if ends == "after the grace" and seconds < case.grace:
        return f"{seconds} s are too few"
    most = SOON if ends == "soon" else case.grace + MARGIN
    return None if seconds < most else f"{seconds} s are too many"


def find_crossed_answers(_case: Case, result: Result) -> str | None:
    wrong = [each for each in result.events if each["event"] in {"wrong", "unknown_request"}]
    return f"got {wrong}" if wrong else None


def find_wrong_log(case: Case, result: Result) -> str | None:
    """Say what is wrong with the task's log: it tells who asked for the end before the task has noticed it."""
    texts = [str(event) for event in result.log]
    if any("out of memory" in text.lower() for text in texts):
        return "guesses at a lack of memory"
    if case.to == "runner" or case.end == "SIGUSR1":
        return None
    asked = [number for number, text in enumerate(texts) if is_asked(case, text)]
    if not asked:
        return "does not say who asked"
    on_kill = [number for number, text in enumerate(texts) if "on_kill speaks" in text]
    if case.task == "logs" and not (on_kill and asked[0] < on_kill[0]):
        return "on_kill does not speak after that"
    return None


def is_asked(case: Case, text: str) -> bool:
    return case.end in text and (not is_refused(case) or "failed" in text)


CHECKS: dict[str, Callable[[Case, Result], str | None]] = {
    "end": find_wrong_end,
    "rest": find_rest,
    "lie": find_lie,
    "events": find_wrong_events,
    "callbacks": find_wrong_callbacks,
    "time": find_wrong_time,
    "answers": find_crossed_answers,
    "log": find_wrong_log,
}


find_faults = partial(find_faults_by, CHECKS)


# The patched lines


@dataclass(frozen=True)
class Line:
    """A running driver, and what came of the cases of told tasks."""

    version: str
    driver: Driver
    cases: dict[str, Case] = field(repr=False)
    results: dict[str, Result] = field(repr=False)


@pytest.fixture(scope="module", params=mark_other_versions(LINES))
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """Run all cases of a release with the patched wheel."""
    with start_driver(install(request.param, tmp_path_factory.mktemp("dist"))) as driver:
        cases = select_cases(request.param)
        yield Line(request.param, driver, cases, run_all(driver, cases))


def test_supervisors_return(line: Line) -> None:
    """However its task is told to stop, a supervisor returns; what a handler in it raises is raised."""
    assert find_faults(line.cases, line.results, "end") == {}


def test_nothing_is_left(line: Line) -> None:
    """Nothing of a task lives when its supervisor returns."""
    assert find_faults(line.cases, line.results, "rest") == {}


def test_truth_is_told(line: Line) -> None:
    """A task that was told to stop before execute() had returned has failed, or is up for retry; the server's word stands."""
    assert find_faults(line.cases, line.results, "lie") == {}


def test_task_hears_of_it(line: Line) -> None:
    """on_kill runs once and to its end, then finally blocks run; a forked child hears of nothing, and a signal is one."""
    assert find_faults(line.cases, line.results, "events") == {}


def test_callbacks_run(line: Line) -> None:
    """The callbacks of a failure or a retry run once, those of a success never."""
    assert find_faults(line.cases, line.results, "callbacks") == {}


def test_ends_at_once(line: Line) -> None:
    """What has nothing to wait for ends at once, on_kill has the time that it takes, the deaf have the grace and no more."""
    assert find_faults(line.cases, line.results, "time") == {}


def test_requests_and_answers_stay_in_step(line: Line) -> None:
    """Whoever asks for a Variable, in on_kill or in a finally block, gets its value."""
    assert find_faults(line.cases, line.results, "answers") == {}


def test_log_says_who_asked(line: Line) -> None:
    """The task's log names the signal, or the server's answer and state, before on_kill; nothing guesses at a lack of memory."""
    assert find_faults(line.cases, line.results, "log") == {}


def test_mark_in_a_variable(line: Line) -> None:
    """Where the limit cannot be the mark, a daemon that has lost its parent is found by a variable, however the runner starts."""
    settings = [STOP, *([STOP | USE_EXEC] if EXEC_LINES.contains(line.version) else [])]
    cases = {str(each): Case("daemon", "409", carries_no_mark=True, settings=each) for each in settings}
    assert find_faults(cases, run_all(line.driver, cases), "end", "rest") == {}


def test_any_moment_will_do(line: Line) -> None:
    """Wherever a task is between two requests and their answers when it is interrupted, the next answers are right."""
    draw = random.Random(SEED)  # noqa: S311  # no secret
    cases = {
        f"{number}": Case(
            "asks",
            to=("supervisor", "runner")[number % 2],
            delay=draw.uniform(0, RANDOM_DELAY),
            settings=STOP,
        )
        for number in range(RANDOM_MOMENTS)
    }
    assert find_faults(cases, run_all(line.driver, cases)) == {}


def test_end_at_the_same_time(line: Line) -> None:
    """A task that ends by itself while it is told to stop has succeeded or failed, never both, and nothing is left."""
    cases = {
        f"{end} {number}": Case("finishes", end, free=True, settings=STOP)
        for end in ("409", "SIGTERM")
        for number in range(5)
    }
    results = run_all(line.driver, cases)
    assert find_faults(cases, results, "end", "rest", "answers") == {}
    for name, result in results.items():
        possible = [["success"], [] if is_refused(cases[name]) else ["failed"]]
        assert result.states in possible, name


def test_before_the_task_runs(line: Line) -> None:
    """A runner that is still starting when its supervisor is told to stop ends, and has failed."""
    result = line.driver.run(Case("told", at="started", settings=STOP))
    assert (result.states, result.left, result.hung) == (["failed"], [], False)


@pytest.mark.parametrize("count", [1, 12])
def test_task_may_finish(line: Line, count: int) -> None:
    """With the policy `finish` a signal is told of once and sent to nobody, and the task succeeds."""
    result = line.driver.run(
        Case("finishes", count=count, gap=0.002, free=True, notice=True, settings=FINISH)
    )
    assert (result.states, result.final_state, result.exception) == (["success"], "success", None)
    assert result.count("on_success_callback") == 1
    told = [event for event in result.log if "SIGTERM" in str(event)]
    assert len(told) == 1


def test_policy_by_default(line: Line) -> None:
    """Without a policy a signal stops the task before SDK 1.4, and lets it finish from then on."""
    result = line.driver.run(Case("finishes", free=True, notice=True))
    assert result.states == (["failed"] if ENDS_TASK_ON_SIGTERM.contains(line.version) else ["success"])


def test_bad_policy(line: Line) -> None:
    """A policy that does not exist is one warning, and the default."""
    settings = {"AIRFLOW__WORKERS__STOP_SIGNAL_POLICY": "sotp"}
    bad, default = (
        line.driver.run(Case("finishes", free=True, notice=True, settings=s)) for s in (settings, {})
    )
    assert bad.states == default.states
    assert sum("sotp" in text for text in (*map(str, bad.log), *bad.output.splitlines())) == 1


def test_ends_of_its_own_are_unchanged(line: Line) -> None:
    """A task that returns, defers or runs into its timeout does so as before, also when its supervisor is in a thread."""
    states = [
        (Case("returns", ""), "success"),
        (Case("returns", "", host="thread"), "success"),
        (Case("defers", ""), "deferred"),
        (Case("times_out", ""), "failed"),
        (Case("times_out", "", retries=True), "up_for_retry"),
    ]
    for case, state in states:
        result = line.driver.run(case)
        assert (result.states, result.exception, result.left) == ([state], None, []), case


# Leftovers

DAEMON = ["sh"]


def name_left(result: Result) -> list[str]:
    return [name for _, name in result.left]


@pytest.mark.parametrize(
    ("policy", "after_failure", "after_409"),
    [
        ("always", [], []),
        ("killed", DAEMON, []),
        ("report", DAEMON, DAEMON),
        ("never", DAEMON, DAEMON),
    ],
)
def test_leftover_policy(line: Line, policy: str, after_failure: list[str], after_409: list[str]) -> None:
    """The platform chooses whether a daemon is ended: always, only if the task was killed, or never; it may be told of alone."""
    settings = {"AIRFLOW__WORKERS__LEFTOVER_POLICY": policy}
    failed = line.driver.run(Case("fails", "", settings=settings))
    killed = line.driver.run(Case("sleeps_with_daemon", "409", settings=settings))
    assert (name_left(failed), name_left(killed)) == (after_failure, after_409)
    assert (failed.states, killed.states) == (["failed"], [])
    for result in (failed, killed):
        told = [event for event in result.log for pid, _ in result.left if str(pid) in str(event)]
        assert bool(told) == (policy == "report")


def test_spared_leftovers(line: Line) -> None:
    """Programs that the platform names are spared, whatever ended the task."""
    settings = {"AIRFLOW__WORKERS__SPARED_LEFTOVERS": "dirmngr, sh"}
    for case in (Case("fails", "", settings=settings), Case("sleeps_with_daemon", "409", settings=settings)):
        assert name_left(line.driver.run(case)) == DAEMON


def test_api_is_away(line: Line) -> None:
    """A task that asks for a Variable while the API is away gets an error and fails; nothing is left."""
    result = line.driver.run(Case("asks_in_vain", ""))
    assert result.count("refused") == 1
    assert (result.states, result.exception, result.left) == (["failed"], None, [])


@pytest.mark.parametrize("task", ["crashes_after_success", "exits_after_success", "hangs_after_success"])
def test_told_success_stands(line: Line, task: str) -> None:
    """A success that was told stands when the runner dies afterwards, or is killed, and so does the daemon that it left."""
    result = line.driver.run(Case(task, ""))
    assert (result.states, result.final_state, name_left(result)) == (["success"], "success", DAEMON)


# The stock lines

ON_STOCK = {
    "flag, SIGTERM": Case("flag"),
    "told, SIGTERM": Case("told"),
    "has_finally, SIGTERM": Case("has_finally"),
    "has_finally, 409": Case("has_finally", "409"),
    "asks, 409": Case("asks", "409"),
    "asks_always, SIGTERM": Case("asks_always"),
    "blocked, SIGTERM": Case("blocked", grace=SHORT_GRACE),
    "swallows_all, SIGTERM": Case("swallows_all"),
    "the supervisor raises": Case("told", "SIGUSR1"),
    "below a loop that passes it on": Case("told", host="loop"),
}


@pytest.fixture(scope="module")
def stock_faults() -> dict[str, dict[str, list[str]]]:
    """Run those cases on all stock lines at once, for most of the time they wait in vain."""
    cases = {name: replace(case, patience=STOCK_PATIENCE) for name, case in ON_STOCK.items()}

    def run(environment: Environment) -> dict[str, list[str]]:
        with start_driver(environment) as driver:
            # What the log says is no reason: none of theirs says enough.
            return find_faults(cases, run_all(driver, cases), *(check for check in CHECKS if check != "log"))

    environments = [install(release.version) for release in last_of_lines()]
    with ThreadPoolExecutor() as pool:
        found = pool.map(run, environments)
        return {env.release.version: faults for env, faults in zip(environments, found, strict=True)}


@pytest.mark.everything
@pytest.mark.parametrize("version", [release.version for release in last_of_lines()])
def test_all_that_is_wrong_on_stock(version: str, stock_faults: dict[str, Any]) -> None:
    """The cases that the patches are for go wrong on the stock wheel."""
    assert set(stock_faults[version]) == set(ON_STOCK)
