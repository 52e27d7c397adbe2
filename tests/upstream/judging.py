"""The verdict on a release: its suite on the stock wheel, on the patched one, and again where they differ."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.upstream.results import compare_results, count_outcomes, is_sound
from tests.upstream.suites import install_suite, run_suite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from rich.progress import Progress, TaskID

    from patches.releases import Release
    from tests.harness.environments import Environment
    from tests.upstream.results import Comparison, Result

# Some of upstream's tests fail now and then under load: a difference must show again in each of these.
REPEATS = 2


@dataclass(frozen=True)
class Run:
    """A suite's results on one wheel, by test id, and the seconds that they took."""

    results: Mapping[str, Result]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What a suite showed about a release. The lists hold sorted test ids."""

    release: Release
    stock: Run
    patched: Run
    comparison: Comparison
    regressions: Sequence[str]
    """Differ for the worse on the patched wheel, and did so again whenever repeated."""
    passing_again: Sequence[str]
    """Differed for the worse, and passed when they were repeated."""


@dataclass(frozen=True)
class Original:
    """What a wheel is compared with, and whose tests count, where that is not the release itself."""

    wheel: Path
    tests: Path


def judge_release(
    release: Release, wheel: Path, suite: str, progress: Progress, original: Original | None = None
) -> Verdict:
    """Run a suite, the path of a folder or a module in the sdist or a node id, on both wheels, and compare."""
    stock_wheel, tests = (original.wheel, original.tests) if original else (None, None)
    flavour = "checkout" if original else "teardown"
    stock_environment, environment = (
        install(release, each, progress, flavour) for each in (stock_wheel, wheel)
    )
    stock = time_suite(stock_environment, [suite], "stock", progress, tests)
    patched = time_suite(environment, [suite], "patched", progress, tests)
    comparison = compare_results(stock.results, patched.results)
    regressions = repeat_suspects(environment, suite, comparison.regressions, progress, tests)
    passing_again = sorted(set(comparison.regressions) - set(regressions))
    return Verdict(release, stock, patched, comparison, regressions, passing_again)


def repeat_suspects(
    environment: Environment, suite: str, suspects: Sequence[str], progress: Progress, tests: Path | None
) -> list[str]:
    """Return the suspects that differ every time; they run among their neighbours, on which a failure may depend."""
    remaining = sorted(suspects)
    for number in range(1, REPEATS + 1):
        if not remaining:
            break
        selection = [suite] if "::" in suite else sorted({test.partition("::")[0] for test in remaining})
        repeat = time_suite(environment, selection, f"patched-repeat-{number}", progress, tests)
        remaining = [test for test in remaining if not is_sound(repeat.results.get(test))]
    return remaining


def install(release: Release, wheel: Path | None, progress: Progress, flavour: str) -> Environment:
    """Make the environment for a release's suite."""
    with show_task(progress, f"{release.version}-{'patched' if wheel else 'stock'}: installing", total=None):
        return install_suite(release, wheel, flavour)


def time_suite(
    environment: Environment, selection: Sequence[str], kind: str, progress: Progress, tests: Path | None
) -> Run:
    """Run tests, take the time, and say in a line what came of them."""
    name = f"{environment.release.version}-{kind}"
    began = time.monotonic()
    with show_task(progress, name, total=100) as task:
        results = run_suite(
            environment, selection, name, lambda percent: progress.update(task, completed=percent), tests
        )
    run = Run(results, time.monotonic() - began)
    counts = [f"{count} {outcome}" for outcome, count in count_outcomes(results).items() if count]
    progress.console.print(f"{name}: {', '.join(counts)} in {run.seconds:.0f} s")
    return run


@contextlib.contextmanager
def show_task(progress: Progress, description: str, *, total: int | None) -> Iterator[TaskID]:
    """Show what is being done while it is."""
    task = progress.add_task(description, total=total)
    try:
        yield task
    finally:
        progress.remove_task(task)
