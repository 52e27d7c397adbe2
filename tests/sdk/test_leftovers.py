"""What tasks leave behind, under the patched supervisor of the last release of every line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, get_args

import pytest

from patches.releases import find_release
from tests.harness.environments import create_environment
from tests.harness.forking import start_fork_server
from tests.harness.lines import MAIN_LINES, mark_rest, skips_without_interpreter
from tests.harness.neighbours import run_among_neighbours
from tests.harness.processes import find_lack_of_processes
from tests.harness.shapes import BY_NAME
from tests.harness.supervised import Ending
from tests.harness.wheels import build_patched_wheel
from tests.sdk.running import FURTHER_PYTHONS, RUNS, Run, name_run

if TYPE_CHECKING:
    from tests.harness.neighbours import Neighbourhood
    from tests.harness.shapes import Shape

# Most of the time a run waits, for a heartbeat or for the grace period to end.
RUNS_AT_A_TIME = 6
# The contract says one second more than the grace period; the rest is for a machine that is busy with as many runs.
MARGIN = 1 + 15
GRACE = 2
# A shape of more processes than this is run only where many are allowed.
CROWD = 100
SETTINGS = {
    "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": str(GRACE),
    "AIRFLOW__WORKERS__STOP_SIGNAL_POLICY": "stop",
    "AIRFLOW__WORKERS__SOCKET_CLEANUP_TIMEOUT": "1",
}

# With --everything every shape is run to every end on these, and on each of the others to one end. By default each line
# has its share. Together the others, and by default the lines, run all to all.
NEED_FULL_TABLE: set[Run] = {(version, None) for version in MAIN_LINES}

Results = dict[tuple[str, Ending], "Neighbourhood"]


@pytest.fixture(scope="module", params=mark_rest(RUNS, lambda run: run not in FURTHER_PYTHONS), ids=name_run)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run shapes to their ends."""
    version, python = request.param
    release = find_release(version)
    wheel = build_patched_wheel(release, tmp_path_factory.mktemp("dist"))
    with skips_without_interpreter():
        environment = create_environment(release, wheel=wheel, python=python)
    lacks_processes = find_lack_of_processes() is not None
    runs = [
        (shape, ending)
        for shape, ending in select_runs(request.param, everything=request.config.getoption("everything"))
        if not (lacks_processes and shape.processes > CROWD)
    ]
    with start_fork_server(environment, env=SETTINGS) as server, ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
        results = pool.map(lambda run: run_among_neighbours(server, *run), runs)
        return {(shape.name, ending): result for (shape, ending), result in zip(runs, results, strict=True)}


def select_runs(run: Run, *, everything: bool) -> list[tuple[Shape, Ending]]:
    """Return the shapes that are run on a line and an interpreter, and the ends to which they are."""
    endings = get_args(Ending)
    # The two interpreters of a line do not do the same.
    turn = RUNS.index(run) + (run[1] is not None)
    # Shapes innermost: the heavy ones are not run all at once.
    return [
        (shape, ending)
        for number, ending in enumerate(endings)
        for place, shape in enumerate(BY_NAME.values())
        if (everything and run in NEED_FULL_TABLE) or (turn + place) % len(endings) == number
    ]


@pytest.mark.parametrize("everything", [False, True])
def test_every_line_takes_its_turn(*, everything: bool) -> None:
    """The lines that do not run everything run everything together."""
    others = [run for run in RUNS if run not in (NEED_FULL_TABLE if everything else FURTHER_PYTHONS)]
    runs = (select_runs(run, everything=everything) for run in others)
    together = {(shape.name, ending) for each in runs for shape, ending in each}
    assert together == {(name, ending) for name in BY_NAME for ending in get_args(Ending)}


def test_crowd_is_run(results: Results) -> None:
    """One of the shapes is a crowd."""
    if reason := find_lack_of_processes():
        pytest.skip(f"not run: no task leaves a crowd, for {reason}")
    assert any(BY_NAME[name].processes > CROWD for name, _ in results)


def test_nothing_is_left(results: Results) -> None:
    """However a task ends but well, nothing is left when its supervisor returns."""
    left = {
        run: result.outcome.left_at_return
        for run, result in results.items()
        if run[1] != "success" and result.outcome.left_at_return
    }
    assert left == {}


def test_success_leaves_everything(results: Results) -> None:
    """What a task that succeeds has left running goes on running."""
    missing = {}
    for (name, ending), result in results.items():
        shape, kept = BY_NAME[name], len(result.outcome.left)
        expected = shape.processes + shape.silent
        if ending == "success" and (kept < expected or (kept > expected and not shape.unsteady)):
            missing[name] = f"{kept} of {expected}"
    assert missing == {}


def test_supervisors_return_in_time(results: Results) -> None:
    """No supervisor crashes, and none takes much longer than the grace period."""
    late = {
        run: (result.outcome.exception, result.outcome.seconds)
        for run, result in results.items()
        if not result.outcome.returned or result.outcome.seconds > GRACE + MARGIN
    }
    assert late == {}


def test_grace_period_is_respected(results: Results) -> None:
    """What SIGTERM does not end has the whole grace period."""
    hasty = {}
    for (name, ending), result in results.items():
        shape, seconds = BY_NAME[name], result.outcome.seconds
        # Where a deaf runner ends first, what it leaves is not deaf.
        if shape.outlasts_grace and not shape.runner and ending != "success" and seconds < GRACE:
            hasty[name, ending] = seconds
    assert hasty == {}


def test_failure_is_reported_once(results: Results) -> None:
    """The API is told once that a task has failed, and not if it has ended the task itself or the task has succeeded."""
    wrong = {
        run: result.outcome.told
        for run, result in results.items()
        if result.outcome.told.count("failed") != (run[1] not in {"409", "success"})
    }
    assert wrong == {}


def test_nobody_else_is_harmed(results: Results) -> None:
    """Processes of the supervisor, and another task with the same processes, live on."""
    harmed = {run: result.harmed for run, result in results.items() if result.harmed}
    assert harmed == {}
