"""Tasks of Airflow's own task runner whose supervisor dies: nothing of them outlives it, and nobody else is touched.

The driver runs every case of a line at once, tests/harness/real/dags/told.py has the tasks, and the checks below look at what came of all.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from patches.releases import last_of_lines
from tests.harness.lines import MAIN_LINES, mark_other_versions
from tests.harness.real.memory import NoMemoryCgroupError, make_cgroup
from tests.harness.real.running import Case, start_driver
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
    from pathlib import Path

    from tests.harness.real.running import Driver, Result

ORPHAN_GRACE = 5
# The contract says one second more; the rest is for a busy machine, and the bench has the tight bound.
MARGIN = 1 + 19
TIME_TO_END = ORPHAN_GRACE + MARGIN
# What ends at once takes some tenths of a second. A grace this long shows, on a busy machine too, that nobody waits for it.
LONG_GRACE = 30
SOON = LONG_GRACE - 10
CASES_AT_A_TIME = 12
"""Most of them wait for the end of a grace."""
TOO_SHORT = 0.3
"""Seconds in which what does not notice has ended the less."""
ON_KILL_TIME = 2
SHORT_GRACE = 1
FIRST_MOMENTS = 20
"""How often a supervisor dies in the first moments of its runner."""
FIRST_SECONDS = 0.03
SLOW_FORK = 0.5
"""Seconds until a runner begins, by when its supervisor has told it of its task and died."""
SLOW_FORKS = 3
FIRST_MOMENTS_OF_INTERPRETER = 4
FIRST_SECONDS_OF_INTERPRETER = 1.0
SEED = 13
MEGABYTES = 256


@dataclass(frozen=True)
class Expected:
    """What must come of a task whose supervisor dies."""

    tells: tuple[str, ...] = ()
    """Events that must have been told, once each."""
    ends: str = "soon"
    """`soon`, `after the grace`, or `with the sweep` of the next supervisor."""


ON_KILL = Expected(tells=("on_kill",))
DEAF = Expected(ends="after the grace")
UNAWARE = Expected(ends="with the sweep")

TASKS = {
    "told": ON_KILL,
    "sleeps": Expected(),
    "has_finally": Expected(),
    "slow_on_kill": Expected(tells=("on_kill", "on_kill_done")),
    "prints_on_kill": Expected(tells=("on_kill", "printing", "on_kill_done")),
    "raises_in_on_kill": ON_KILL,
    "prints": ON_KILL,
    "logs": ON_KILL,
    "asks": Expected(),
    "asks_always": ON_KILL,
    "asks_with_default": Expected(),
    "pre_execute": Expected(),
    "sensor": ON_KILL,
    "deaf": DEAF,
    "blocked": UNAWARE,
    "blocked_with_gil": UNAWARE,
    "bash": ON_KILL,
    "pool": Expected(),
    "forks": Expected(),
    "pipeline": Expected(),
    "pipeline_in_session": Expected(),
    "job_control": Expected(),
    "daemon": Expected(),
    "daemon_without_env": Expected(),
    "daemon_with_limit": Expected(),
    "deaf_daemon": DEAF,
    "crowd": DEAF,
    "prints_beside_daemon": DEAF,
    "logs_beside_daemon": DEAF,
    "asks_beside_daemon": DEAF,
    "prints_afterwards": DEAF,
    "sleeps_async": Expected(),
}
COVERING = ("told", "slow_on_kill", "prints", "blocked", "crowd")
# An interpreter takes some seconds.
IN_NEW_INTERPRETER = ("told", "prints", "crowd")
SINCE = {"sleeps_async": ASYNC_TASKS}
LINES = [NO_HANDLER, *(release.version for release in last_of_lines())]

WAYS = {
    "SIGKILL of its group": Case("told", to="group"),
    "SIGSEGV": Case("told", "SIGSEGV"),
    "SIGABRT": Case("told", "SIGABRT"),
    "with its parent": Case("told", host="parent"),
    "supervised in a thread": Case("told", host="thread"),
    "two tasks in threads": Case("told", host="two threads", bystander="thread"),
    "SIGHUP of its group": Case("told", "SIGHUP", to="group", settings=STOP),
    "when it starts": Case("sleeps", at="started"),
    "with a crowd, stopped": Case("crowd", stopped=True, sweep=True),
    # Whether a runner is gone before its supervisor is dead differs from time to time.
    **{f"when it has printed, {number}": Case("prints_afterwards") for number in range(3)},
    "stopped": Case("told", stopped=True, sweep=True),
    "in a teardown, at the first SIGSTOP": Case(
        "crowd", "409", grace=SHORT_GRACE, dies_at_stop=1, sweep=True
    ),
    "in a teardown of a deaf runner": Case("deaf", "409", grace=SHORT_GRACE, dies_at_stop=1, sweep=True),
    "beside another supervisor": Case("crowd", bystander="supervisor"),
    "beside another supervisor, and the next": Case(
        "blocked", bystander="supervisor", left_for=TOO_SHORT, sweep=True
    ),
}
OTHERS = {
    "success": Case("leaves_daemon", "", left_for=TOO_SHORT, sweep=True),
    "let out": Case("free_daemon", "SIGKILL", left_for=ORPHAN_GRACE + 1, sweep=True),
    "ended thread": Case("finishes", "", free=True, host="ended thread"),
    "another thread": Case("told", "409", host="two threads", bystander="thread"),
}
"""What comes of them is no end of a task with its supervisor."""
UNNOTICED = {
    "blocked for ever": Case("blocked", "SIGKILL", left_for=ORPHAN_GRACE + 1),
    "stopped for ever": Case("told", "SIGKILL", left_for=ORPHAN_GRACE + 1, stopped=True),
}
"""Their runners do not notice, and nobody else starts."""
SHORT_OF_MEMORY = Case("fills", "OOM", memory=MEGABYTES, left_for=TIME_TO_END)
"""The task has many small children, and one that takes all that there is."""


def select_cases(version: str) -> dict[str, Case]:
    """Return the cases of tasks whose supervisor dies, for a release, by name."""
    cases = {task: Case(task) for task in TASKS if version in MAIN_LINES or task in COVERING}
    if version in MAIN_LINES:
        cases |= WAYS
    if EXEC_LINES.contains(version):
        cases |= {
            f"{task}, in a new interpreter": Case(task, settings=USE_EXEC) for task in IN_NEW_INTERPRETER
        }
    return {
        name: complete(case)
        for name, case in cases.items()
        if SINCE.get(case.task, EVERY_LINE).contains(version)
    }


def complete(case: Case) -> Case:
    """Return the case with what all have in common."""
    case = replace(case, end="SIGKILL" if case.end == "SIGTERM" else case.end)
    if is_unaware(case):
        return replace(case, left_for=case.left_for or TOO_SHORT, sweep=True)
    if ends_soon(case):
        return replace(case, orphan_grace=LONG_GRACE, left_for=LONG_GRACE + MARGIN)
    return replace(case, left_for=case.left_for or TIME_TO_END)


def ends_soon(case: Case) -> bool:
    """Whether nobody has to wait. A new interpreter has the default grace, whatever its supervisor was given."""
    return TASKS[case.task].ends == "soon" and case.settings != USE_EXEC


def is_unaware(case: Case) -> bool:
    return case.stopped or TASKS[case.task].ends == "with the sweep" or case.dies_at_stop > 0


# What is right


def find_survivor(case: Case, result: Result) -> str | None:
    """Say what is wrong with how the supervisor ended, which was to die."""
    if case.end == "SIGHUP":
        return f"raised {result.exception}" if result.exception else None
    return None if result.killed_by else f"the supervisor lives, or has returned {result.exit_code}"


def find_rest(_case: Case, result: Result) -> str | None:
    return f"left {result.left}" if result.left else None


def find_wrong_events(case: Case, result: Result) -> str | None:
    """Say what the task has not told once."""
    tells = TASKS[case.task].tells
    counts = {name: result.count(name) for name in tells if result.count(name) != 1}
    counts |= {name: result.count(name) for name in ("interrupted_child",) if result.count(name)}
    if case.bystander:
        counts |= find_harm(case, result)
    return f"told {counts}" if counts else None


def find_harm(case: Case, result: Result) -> dict[str, int]:
    """Return what a bystander has not told right: it ends well, unless it had the same supervisor."""
    right = int(case.bystander == "supervisor")
    names = ("stood_by", "bystander_returned")
    return {name: result.count(name) for name in names if result.count(name) != right}


def find_wrong_time(case: Case, result: Result) -> str | None:
    seconds = result.seconds_to_nothing
    if seconds is None:
        return None  # find_rest() says what is left
    if case.task in {"slow_on_kill", "prints_on_kill"} and seconds < ON_KILL_TIME:
        return f"{seconds} s are too few"
    if is_unaware(case):
        return None
    if TASKS[case.task].ends == "after the grace" and seconds < ORPHAN_GRACE:
        return f"{seconds} s are too few"
    most = SOON if ends_soon(case) else TIME_TO_END
    return None if seconds < most else f"{seconds} s are too many"


def find_lie(case: Case, result: Result) -> str | None:
    """Say what was told that is not true: who is dead tells nothing."""
    right = {"supervisor": ["success"]}.get(case.bystander, ["failed"] if case.end == "SIGHUP" else [])
    return None if result.states == right else f"told {result.states}"


CHECKS: dict[str, Callable[[Case, Result], str | None]] = {
    "survivor": find_survivor,
    "rest": find_rest,
    "events": find_wrong_events,
    "time": find_wrong_time,
    "lie": find_lie,
}


find_faults = partial(find_faults_by, CHECKS)


# The patched lines


@dataclass(frozen=True)
class Line:
    """A running driver, and what came of the cases."""

    version: str
    driver: Driver
    cases: dict[str, Case] = field(repr=False)
    results: dict[str, Result] = field(repr=False)
    others: dict[str, Result] = field(repr=False)


@pytest.fixture(scope="module", params=mark_other_versions(LINES))
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """Run all cases of a release with the patched wheel."""
    with start_driver(install(request.param, tmp_path_factory.mktemp("dist"))) as driver:
        cases = select_cases(request.param)
        results = run_all(driver, {**cases, **OTHERS}, at_a_time=CASES_AT_A_TIME)
        others_results = {name: results.pop(name) for name in OTHERS}
        yield Line(request.param, driver, cases, results, others_results)


def test_supervisors_die(line: Line) -> None:
    """The supervisors of the cases are dead, so that what has ended was ended by nobody of them."""
    assert find_faults(line.cases, line.results, "survivor") == {}


def test_nothing_is_left(line: Line) -> None:
    """Nothing of a task outlives its supervisor by more than the grace, or the start of the next one."""
    assert find_faults(line.cases, line.results, "rest") == {}


def test_task_hears_of_it(line: Line) -> None:
    """on_kill runs once and to its end, wherever the task was; a forked child hears of nothing, a bystander is not harmed."""
    assert find_faults(line.cases, line.results, "events") == {}


def test_ends_at_once(line: Line) -> None:
    """What has nothing to wait for ends at once, on_kill has the time that it takes, the deaf have the grace and no more."""
    assert find_faults(line.cases, line.results, "time") == {}


def test_nobody_tells_of_it(line: Line) -> None:
    """No state is told of a task without a supervisor, whose retry the server starts."""
    assert find_faults(line.cases, line.results, "lie") == {}


def test_first_moments(line: Line) -> None:
    """Whenever the supervisor dies after the fork, its runner ends."""
    draw = random.Random(SEED)  # noqa: S311  # no secret
    cases = {
        f"{number}": Case("told", "", dies_after_fork=draw.uniform(0, FIRST_SECONDS), left_for=TIME_TO_END)
        for number in range(FIRST_MOMENTS)
    }
    cases |= {
        f"before the runner begins {number}": Case(
            "told", "", dies_after_fork=FIRST_SECONDS, slow_fork=SLOW_FORK, left_for=TIME_TO_END
        )
        for number in range(SLOW_FORKS)
    }
    if EXEC_LINES.contains(line.version):  # a new interpreter is not forked, and takes longer
        cases |= {
            f"new interpreter {number}": Case(
                "told",
                "SIGKILL",
                at="started",
                delay=draw.uniform(0, FIRST_SECONDS_OF_INTERPRETER),
                left_for=TIME_TO_END,
                settings=USE_EXEC,
            )
            for number in range(FIRST_MOMENTS_OF_INTERPRETER)
        }
    assert find_faults(cases, run_all(line.driver, cases), "survivor", "rest", "lie") == {}


def test_thread_ends(line: Line) -> None:
    """A task goes on when the thread ends that has forked its runner: its supervisor is there."""
    result = line.others["ended thread"]
    assert (result.states, result.final_state, result.left) == (["success"], "success", [])


def test_another_thread_ends_its_task(line: Line) -> None:
    """A task goes on when another one of the same process is ended."""
    result = line.others["another thread"]
    assert (result.count("on_kill"), result.left) == (1, [])
    assert (result.states, result.count("stood_by"), result.count("bystander_returned")) == (
        ["success"],
        1,
        1,
    )


def test_what_a_success_has_left(line: Line) -> None:
    """A daemon of a task that has succeeded stays when its supervisor dies, and when the next one starts."""
    result = line.others["success"]
    assert (result.states, [name for _, name in result.left]) == (["success"], ["sh"])


def test_let_out_of_the_tree(line: Line) -> None:
    """A daemon that was started with the limit lifted stays, also when the next supervisor starts."""
    result = line.others["let out"]
    assert [name for _, name in result.left] == ["sleep"]


def test_next_supervisor_says_so(line: Line) -> None:
    """The next supervisor names the runner that it has ended."""
    result = line.driver.run(complete(Case("told", stopped=True)))
    assert result.count("on_kill") == 1
    runner = next(each["runner"] for each in result.events if each["event"] == "started")
    [told] = [text for text in result.output.splitlines() if "supervisors had died" in text]
    assert str(runner) in told


def test_short_of_memory(line: Line) -> None:
    """A supervisor that the kernel kills for want of memory leaves nothing, however many there are in its cgroup."""
    try:
        with make_cgroup(MEGABYTES):
            pass
    except NoMemoryCgroupError as error:
        pytest.skip(str(error))
    result = line.driver.run(SHORT_OF_MEMORY)
    assert (result.killed_by, result.left) == (9, [])


@pytest.mark.parametrize("name", UNNOTICED)
def test_runner_that_does_not_notice(name: str, tmp_path: Path) -> None:
    """The README's limit: a runner that does not get to run Python code stays until the next supervisor starts."""
    # Alone: the supervisor of any other case would end it.
    with start_driver(install(MAIN_LINES[0], tmp_path)) as driver:
        assert len(driver.run(UNNOTICED[name]).left) == 1


# The stock lines

ON_STOCK = {
    task: Case(task, "SIGKILL", left_for=ORPHAN_GRACE + 1)
    for task in ("told", "slow_on_kill", "deaf", "crowd")
}


@pytest.fixture(scope="module")
def stock_faults() -> dict[str, dict[str, list[str]]]:
    """Run those cases on all stock lines at once."""

    def run(version: str) -> dict[str, list[str]]:
        with start_driver(install(version)) as driver:
            return find_faults(ON_STOCK, run_all(driver, ON_STOCK), "rest")

    with ThreadPoolExecutor() as pool:
        return dict(zip(MAIN_LINES, pool.map(run, MAIN_LINES), strict=True))


@pytest.mark.everything
@pytest.mark.parametrize("version", MAIN_LINES)
def test_all_that_is_left_on_stock(version: str, stock_faults: dict[str, Any]) -> None:
    """Every task outlives its supervisor on the stock wheel."""
    assert set(stock_faults[version]) == set(ON_STOCK)
