"""`nox -s random`: look for a tree that is not ended as the model says, or try one example again and again."""

from __future__ import annotations

import argparse
import secrets
import sys
from typing import TYPE_CHECKING

from patches.commands import interrupt_on_sigterm
from tests.harness.consoles import explains_failures, open_console
from tests.random_trees.driving import VERSION, start_driver
from tests.random_trees.examples import load_example
from tests.random_trees.exploring import WrongEndError, check, explore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tests.random_trees.driving import Driver
    from tests.random_trees.examples import Example

EXAMPLES = 5000
REPETITIONS = 20
PROGRESS_EVERY = 100
PROBLEM = 1
COLUMNS_IN_FILE = 100


def take_example(text: str) -> Example:
    try:
        return load_example(text)
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(
            "take it, in quotes, from the message of a run that failed"
        ) from None


def take_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"give a number from 1 on, not {text!r}")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s random --", description=__doc__)
    parser.add_argument("version", nargs="?", default=VERSION, help="an Airflow or SDK version")
    parser.add_argument("--examples", type=take_number, default=EXAMPLES, help="how many (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**9), help="of an earlier run, to repeat it"
    )
    parser.add_argument("--example", type=take_example, help=f"try this one {REPETITIONS} times instead")
    parser.add_argument(
        "--bug", action="append", default=[], help="plant this one of bugs.py, to see it found"
    )
    return parser.parse_args(arguments)


@explains_failures()
def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every tree ended as it should, 1 after the example of one that did not, 2 if none could be tried."""
    options = parse_arguments(arguments)
    console = open_console(COLUMNS_IN_FILE)
    try:
        with start_driver(options.version, bugs=options.bug) as driver:
            if driver.refusal:
                console.print(
                    f"No strangers take numbers that are free: {driver.refusal}", markup=False, soft_wrap=True
                )
            if options.example:
                for _ in range(REPETITIONS):
                    check(driver, options.example)
                console.print(f"{REPETITIONS} times it ended as it should.")
            else:
                look(driver, options, console)
    except WrongEndError as error:
        console.print(error, markup=False, soft_wrap=True)
        return PROBLEM
    return 0


def look(driver: Driver, options: argparse.Namespace, console: Console) -> None:
    console.print(f"Seed {options.seed}, {options.examples} examples on SDK {options.version}")
    tried = 0

    def count() -> None:
        nonlocal tried
        tried += 1
        if tried % PROGRESS_EVERY == 0:
            console.print(f"{tried} examples")

    explore(driver, options.examples, options.seed, count)
    console.print(f"{tried} examples ended as they should.")


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
