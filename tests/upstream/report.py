"""What the command prints when all suites have run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tests.upstream.results import OUTCOMES, count_outcomes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from patches.releases import Release
    from tests.upstream.judging import Run, Verdict


def print_report(console: Console, verdicts: Sequence[Verdict], not_run: Mapping[Release, str]) -> None:
    """Print the totals, then every test that is broken anywhere, by name."""
    console.print(make_table(verdicts, not_run))
    for verdict in verdicts:
        print_tests(console, verdict, "broken by the patches", verdict.regressions)
        print_tests(
            console, verdict, "broken by the patches at first, sound when repeated", verdict.passing_again
        )
        print_tests(
            console, verdict, "upstream's own, broken on both wheels", verdict.comparison.broken_on_both
        )
        print_tests(console, verdict, "broken on the stock wheel alone", verdict.comparison.broken_on_stock)
    for reason in not_run.values():
        console.print(f"Not run, which is not a pass: {reason}", markup=False)


def make_table(verdicts: Sequence[Verdict], not_run: Mapping[Release, str]) -> Table:
    """Return a table with a row for each release and wheel."""
    table = Table("Airflow", "SDK", "wheel", *OUTCOMES, "seconds")
    for verdict in verdicts:
        release = verdict.release
        table.add_row(release.airflow, release.version, "stock", *format_run(verdict.stock))
        table.add_row("", "", "patched", *format_run(verdict.patched), end_section=True)
    for release in not_run:
        table.add_row(release.airflow, release.version, "not run", end_section=True)
    return table


def format_run(run: Run) -> Iterable[str]:
    """Return the cells of a run."""
    return [*map(str, count_outcomes(run.results).values()), f"{run.seconds:.0f}"]


def print_tests(console: Console, verdict: Verdict, title: str, tests: Sequence[str]) -> None:
    """Print what the tests said, on the patched wheel if they were run there."""
    if not tests:
        return
    console.print(f"SDK {verdict.release.version}: {len(tests)} {title}:", markup=False)
    for test in tests:
        result = verdict.patched.results.get(test)
        said = f"{result.outcome}: {result.message}" if result else "not run at all"
        console.print(f"  {test}\n    {said}", markup=False, soft_wrap=True)
