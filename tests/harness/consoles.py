"""What the sessions with a command line of their own share: their consoles, and how they end."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec

from rich.console import Console

from patches.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable

Parameters = ParamSpec("Parameters")

UNUSABLE, INTERRUPTED = 2, 130


def open_console(columns_in_file: int) -> Console:
    """Return a console for results. A file has no width of its own, and gets this one."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = columns_in_file
    return console


def open_error_console() -> Console:
    """Return a console for sentences on stderr."""
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


def explains_failures(
    *failures: type[Exception],
) -> Callable[[Callable[Parameters, int]], Callable[Parameters, int]]:
    """Make main() return 2 after a PatchError or one of these failures, and 130 when it is interrupted.

    Each is one sentence on stderr.
    """
    explained: tuple[type[Exception], ...] = (PatchError, *failures)

    def decorate(main: Callable[Parameters, int]) -> Callable[Parameters, int]:
        @functools.wraps(main)
        def explaining(*args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except explained as error:
                open_error_console().print(error)
                return UNUSABLE
            except KeyboardInterrupt:
                open_error_console().print("Interrupted: every process that was started was ended.")
                return INTERRUPTED

        return explaining

    return decorate
