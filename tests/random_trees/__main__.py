"""`nox -s random`: look for a tree that is not ended as the model says, or try one example again and again."""

from __future__ import annotations

import argparse
import secrets
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from patches.errors import PatchError
from tests.random_trees.driving import VERSION, DriverFailedError, start_driver
from tests.random_trees.examples import load_example
from tests.random_trees.exploring import WrongEndError, check, explore

if TYPE_CHECKING:
    from tests.random_trees.driving import Driver
    from tests.random_trees.examples import Example

EXAMPLES = 5000
REPETITIONS = 20
PROGRESS_EVERY = 100


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


def parse_arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    console = Console(highlight=False, soft_wrap=True)
    try:
        with start_driver(arguments.version, bugs=arguments.bug) as driver:
            if arguments.example:
                for _ in range(REPETITIONS):
                    check(driver, arguments.example)
                console.print(f"{REPETITIONS} times it ended as it should.")
            else:
                look(driver, arguments, console)
    except (WrongEndError, DriverFailedError, PatchError) as error:
        console.print(str(error), markup=False)
        return 1
    return 0


def look(driver: Driver, arguments: argparse.Namespace, console: Console) -> None:
    console.print(f"Seed {arguments.seed}, {arguments.examples} examples on SDK {arguments.version}")
    tried = 0

    def count() -> None:
        nonlocal tried
        tried += 1
        if tried % PROGRESS_EVERY == 0:
            console.print(f"{tried} examples")

    explore(driver, arguments.examples, arguments.seed, count)
    console.print(f"{tried} examples ended as they should.")


if __name__ == "__main__":
    sys.exit(main())
