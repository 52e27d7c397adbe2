"""The consoles of a session's command line."""

from __future__ import annotations

from rich.console import Console


def open_consoles(columns_in_file: int) -> tuple[Console, Console]:
    """Return one for what is found, which is so wide where it is a file, and has no width of its own, and one for errors."""
    console, errors = Console(), Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = columns_in_file
    return console, errors
