"""What upstream's tests said, by test id, and how the patched wheel differs from the stock one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Outcome = Literal["passed", "skipped", "xfailed", "failed", "error"]
OUTCOMES: tuple[Outcome, ...] = ("passed", "skipped", "xfailed", "failed", "error")
BROKEN: frozenset[Outcome] = frozenset({"failed", "error"})
TAGS: dict[str, Outcome] = {"error": "error", "failure": "failed", "skipped": "skipped"}


@dataclass(frozen=True)
class Result:
    """A test's outcome, and the first line of what it said about it."""

    outcome: Outcome
    message: str = ""


@dataclass(frozen=True)
class Comparison:
    """Sorted test ids."""

    regressions: list[str]
    """Sound on stock, or absent there, and broken on patched; or passed on stock, and skipped or absent on patched."""
    broken_on_both: list[str]
    broken_on_stock: list[str]


def read_report(report: Path) -> dict[str, Result]:
    """Return the results in a JUnit file of the family xunit1, under pytest's node ids.

    A module that could not be collected is an error under its path.
    """
    results: dict[str, Result] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
        name, result = name_test(case), read_result(case)
        # A test that fails, and again when its fixtures end, is there twice: keep the worse.
        if name not in results or OUTCOMES.index(result.outcome) > OUTCOMES.index(results[name].outcome):
            results[name] = result
    return results


def compare_results(stock: Mapping[str, Result], patched: Mapping[str, Result]) -> Comparison:
    """Sort out which tests are broken by the patches, and which are so without them."""
    broken_on_stock = {name for name, result in stock.items() if result.outcome in BROKEN}
    broken_on_patched = {name for name, result in patched.items() if result.outcome in BROKEN}
    lost = {name for name, result in stock.items() if result.outcome == "passed"} - {
        name for name, result in patched.items() if result.outcome != "skipped"
    }
    return Comparison(
        regressions=sorted((broken_on_patched - broken_on_stock) | lost),
        broken_on_both=sorted(broken_on_patched & broken_on_stock),
        broken_on_stock=sorted(broken_on_stock - broken_on_patched),
    )


def is_sound(result: Result | None) -> bool:
    """Tell whether a test was run and did what it should."""
    return result is not None and result.outcome in {"passed", "xfailed"}


def count_outcomes(results: Mapping[str, Result]) -> dict[Outcome, int]:
    """Return how many tests had each outcome."""
    counts = Counter(result.outcome for result in results.values())
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def name_test(case: ET.Element) -> str:
    """Return the node id, which JUnit takes apart into file, classes and name."""
    file, classname, name = case.get("file", ""), case.get("classname", ""), case.get("name", "")
    if not classname:  # a module that could not be collected
        return file
    module = file.removesuffix(".py").replace("/", ".")
    classes = classname.removeprefix(module).split(".")
    return "::".join([file, *filter(None, classes), name])


def read_result(case: ET.Element) -> Result:
    """Return what a test case's child element says; without one it passed."""
    for tag, outcome in TAGS.items():
        if (child := case.find(tag)) is not None:
            expected = tag == "skipped" and child.get("type") == "pytest.xfail"
            first_line, _, _ = child.get("message", "").partition("\n")
            return Result("xfailed" if expected else outcome, first_line)
    return Result("passed")
