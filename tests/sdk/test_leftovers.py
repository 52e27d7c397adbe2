"""What tasks leave behind, under the patched supervisor of the last release of every line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, get_args

import pytest
from packaging.version import Version

from patches.releases import last_of_lines
from patches.rules import load_changes
from patches.upstream import fetch_wheel
from patches.wheels import build_wheel
from tests.harness.environments import NoInterpreterError, create_environment
from tests.harness.shapes import SHAPES
from tests.harness.supervised import KILL_GRACE, Ending, run_supervised

if TYPE_CHECKING:
    from patches.releases import Release
    from tests.harness.shapes import Shape
    from tests.harness.supervised import Outcome

# Most of the time a run waits, for a process to start or for the grace period to end.
RUNS_AT_A_TIME = 4
# The contract says one second more than the grace period; here as many supervisors run at once, of a crowd each.
MARGIN = 3

Outcomes = dict[tuple[str, Ending], "Outcome"]


@pytest.fixture(scope="module", params=last_of_lines(), ids=lambda release: release.version)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run every shape to every end."""
    release: Release = request.param
    wheel = build_wheel(release, fetch_wheel(release), load_changes(), tmp_path_factory.mktemp("dist"))
    try:
        environment = create_environment(release, wheel=wheel)
    except NoInterpreterError as error:
        pytest.skip(f"not run: {error}")
    runs = [(shape, ending) for shape in SHAPES for ending in list_endings(release)]

    def run(shape: Shape, ending: Ending) -> Outcome:
        return run_supervised(environment, shape, ending)

    with ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
        results = pool.map(run, *zip(*runs, strict=True))
        return {(shape.name, ending): result for (shape, ending), result in zip(runs, results, strict=True)}


def list_endings(release: Release) -> list[Ending]:
    """Return the ways to end; from 1.4 on a supervisor that gets SIGTERM lets its task finish."""
    endings: list[Ending] = list(get_args(Ending))
    if Version(release.version) >= Version("1.4.0b1"):
        endings.remove("sigterm")
    return endings


def test_nothing_is_left(outcomes: Outcomes) -> None:
    """However a task ends but well, nothing is left when its supervisor returns."""
    left = {
        run: outcome.left_at_return
        for run, outcome in outcomes.items()
        if run[1] != "success" and outcome.left_at_return
    }
    assert left == {}


def test_success_leaves_everything(outcomes: Outcomes) -> None:
    """What a task that succeeds has left running goes on running."""
    kept = {shape: len(outcome.left) for (shape, ending), outcome in outcomes.items() if ending == "success"}
    assert kept == {shape.name: shape.processes for shape in SHAPES}


def test_supervisors_return_in_time(outcomes: Outcomes) -> None:
    """No supervisor crashes, and none takes much longer than the grace period."""
    late = {
        run: (outcome.exception, outcome.seconds)
        for run, outcome in outcomes.items()
        if not outcome.returned or outcome.seconds > KILL_GRACE + MARGIN
    }
    assert late == {}
