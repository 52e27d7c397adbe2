"""The releases that a test is run on: by default two of the lines, with --everything all of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from patches.environments import NoInterpreterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MAIN_LINES = ("1.1.8", "1.4.0b2")
"""The last release of the line that most run, and that of the one that is next."""


def mark_rest(values: Iterable[Any], is_main: Callable[[Any], bool]) -> list[Any]:
    """Return values as pytest's parameters, those marked `everything` that are not among the main ones."""
    return [
        value if is_main(value) else pytest.param(value, marks=pytest.mark.everything) for value in values
    ]


def find_wanted(request: pytest.FixtureRequest, parameter: str, **others: object) -> list[Any]:
    """Return the values of a parameter in the tests that want this module's fixture, and have those values of others."""
    calls = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.getparent(pytest.Module) is request.node
        and request.fixturename in item.fixturenames
    ]
    return list(dict.fromkeys(call[parameter] for call in calls if others.items() <= call.items()))


def mark_other_versions(versions: Iterable[str]) -> list[Any]:
    """Do so for versions of the SDK."""
    return mark_rest(versions, MAIN_LINES.__contains__)


@contextmanager
def skips_without_interpreter() -> Iterator[None]:
    """Skip a test whose release finds no interpreter here."""
    try:
        yield
    except NoInterpreterError as error:
        pytest.skip(f"not run: {error}")
