"""The tool in a process of its own, to be interrupted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator
    from pathlib import Path

INTERRUPTED = 130
TIMEOUT = 60
"""Seconds."""


@contextlib.contextmanager
def start(clone: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start the tool in a clone; whatever happens it is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "patches", *arguments],
        cwd=clone,
        env={name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupt(process: subprocess.Popen[str], signum: signal.Signals) -> str:
    """Interrupt the tool, see that it takes the commands that it runs along, and return what it said."""
    children = psutil.Process(process.pid).children()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == INTERRUPTED
    # Those that it has killed may still be zombies, until init reaps them.
    _, left = psutil.wait_procs(children, timeout=TIMEOUT)
    assert not left
    return stderr
