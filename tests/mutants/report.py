"""What the command prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Column, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from tests.mutants.mutant import Mutant
    from tests.mutants.running import Outcome


SAID_LENGTH = 100
"""Characters."""


def describe(mutant: Mutant, outcome: Outcome) -> str:
    """Return one line about a mutant that was tried."""
    said = f" ({outcome.said[:SAID_LENGTH]})" if outcome.said else ""
    return f"{mutant.name}: {tell(outcome)}{said}"


def tell(outcome: Outcome) -> str:
    """Return the test that has found a mutant, without the folders before it."""
    return "SURVIVED" if outcome.found_by is None else outcome.found_by.rpartition("/")[2]


def print_report(
    console: Console, outcomes: Mapping[Mutant, Outcome], broken: Mapping[str, Sequence[str]]
) -> None:
    """Print the table of mutants, then what tests fail without any."""
    table = Table(Column("mutant", no_wrap=True), "breaks", Column("found by", overflow="fold"))
    for mutant, outcome in outcomes.items():
        table.add_row(mutant.name, mutant.breaks, tell(outcome))
    console.print(table, markup=False)
    for version, tests in broken.items():
        for test in tests:
            console.print(
                f"Fails on {version} without a mutant, and has found none: {test.rpartition('/')[2]}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    survivors = [mutant.name for mutant, outcome in outcomes.items() if not outcome.found]
    found = len(outcomes) - len(survivors)
    console.print(f"{found} of {len(outcomes)} mutants were found.", highlight=False)
    if survivors:
        console.print(f"SURVIVED: {', '.join(survivors)}", markup=False, highlight=False, soft_wrap=True)
