"""Processes that keep every core busy."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ends with the bench even if the bench is killed.
SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_cores() -> Iterator[None]:
    """Run one spinning process for each core."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            spinner = subprocess.Popen([sys.executable, "-I", "-S", "-c", SPIN, str(os.getpid())])
            stack.callback(spinner.wait)
            stack.callback(spinner.kill)
        yield
