"""Let hypothesis look for a tree that is not ended as the model says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from tests.random_trees.driving import DriverFailedError
from tests.random_trees.examples import examples
from tests.random_trees.model import find_faults

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.random_trees.driving import Driver
    from tests.random_trees.examples import Example


class WrongEndError(AssertionError):
    """A tree ended otherwise than the model says; the message has the example."""


def explore(
    driver: Driver,
    number: int,
    first: int,
    count: Callable[[], None] = lambda: None,
    *,
    simplify: bool = True,
) -> None:
    """Run so many examples, the same for the same seed `first`, and call `count` for each.

    Raises WrongEndError with the simplest example found that goes wrong.
    """
    errors: list[WrongEndError] = []
    failures: list[DriverFailedError] = []

    @seed(first)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if simplify else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(example=examples())
    def end_as_told(example: Example) -> None:
        if failures:
            # Hypothesis looks for a simpler one that fails so.
            raise failures[0]
        count()
        try:
            check(driver, example)
        except DriverFailedError as error:
            failures.append(error)
            raise
        except WrongEndError as error:
            errors.append(error)
            raise

    try:
        end_as_told()
    except (WrongEndError, Flaky):
        if not errors:  # the driver failed
            raise
        # A fault that needs luck as well need not come again when hypothesis looks at it closely.
        simplest = min(errors, key=lambda error: len(str(error)))
        raise WrongEndError(f"{simplest} (seed {first}, {number} examples)") from None


def check(driver: Driver, example: Example) -> None:
    """Raise WrongEndError if the tree of an example does not end as the model says."""
    if faults := find_faults(example, driver.run(example)):
        raise WrongEndError(f"{'; '.join(faults)}: --example '{example.dump()}'")
