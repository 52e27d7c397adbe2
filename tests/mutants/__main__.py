"""`nox -s mutants`: plant bugs in the sources, and say which of them survive the tests that go upstream."""

from __future__ import annotations

import argparse
import functools
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from patches.commands import interrupt_on_sigterm
from patches.errors import PatchError
from patches.releases import find_release
from tests.harness.consoles import explains_failures, open_console
from tests.harness.wheels import DIST, build_patched_wheel
from tests.mutants.report import describe, print_report
from tests.mutants.running import find_broken, run_mutant
from tests.mutants.table import MUTANTS
from tests.sdk.running import install_release

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from tests.harness.environments import Environment
    from tests.mutants.mutant import Mutant
    from tests.mutants.running import Outcome

AT_ONCE = 2
# A file has no width of its own; at this one few rows of the table are wrapped.
COLUMNS_IN_FILE = 220
SURVIVED = 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s mutants --", description=__doc__)
    parser.add_argument("name", nargs="*", help="only mutants whose names begin so")
    parser.add_argument("--list", action="store_true", help="say what each breaks, and run none")
    return parser.parse_args(arguments)


@explains_failures()
def main(arguments: Sequence[str] | None = None) -> int:
    """Plant the mutants; return 1 if any survives, or if a test fails without one, and 2 after a sentence on stderr."""
    options = parse_arguments(arguments)
    console = open_console(COLUMNS_IN_FILE)
    mutants = [mutant for mutant in MUTANTS if mutant.name.startswith(tuple(options.name) or "")]
    if not mutants:
        raise PatchError("No mutant has a name that begins so: --list names them all.")
    if options.list:
        for mutant in mutants:
            console.print(f"{mutant.name}: {mutant.breaks}", markup=False)
        return 0
    return plant_all(mutants, console)


def plant_all(mutants: Sequence[Mutant], console: Console) -> int:
    """Run the mutants' tests, first without any mutant, then with each, and print what came of it."""
    environments = {version: install(version) for version in sorted({mutant.version for mutant in mutants})}
    broken = {
        version: find_broken(environment, [mutant for mutant in mutants if mutant.version == version])
        for version, environment in environments.items()
    }
    outcomes = run_all(mutants, environments, broken, console)
    print_report(console, outcomes, broken)
    return SURVIVED if any(broken.values()) or not all(outcome.found for outcome in outcomes.values()) else 0


def install(version: str) -> Environment:
    """Return an environment for our tests, with the patched wheel of a version."""
    release = find_release(version)
    return install_release(release, wheel=build_patched_wheel(release, DIST))


def run_all(
    mutants: Sequence[Mutant],
    environments: Mapping[str, Environment],
    broken: Mapping[str, Sequence[str]],
    console: Console,
) -> dict[Mutant, Outcome]:
    """Return what the tests said to each mutant, in the order of the table; print it as it comes."""
    outcomes = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            futures = {
                pool.submit(
                    functools.partial(
                        run_mutant, mutant, environments[mutant.version], broken[mutant.version]
                    )
                ): mutant
                for mutant in mutants
            }
            for future in as_completed(futures):
                mutant = futures[future]
                outcomes[mutant] = future.result()
                console.print(describe(mutant, outcomes[mutant]), markup=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {mutant: outcomes[mutant] for mutant in mutants}


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
