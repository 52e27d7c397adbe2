"""Workers that run trivial tasks, one for each side, in turn."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from patches.errors import PatchError
from tests.harness.environments import LOG, start_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.harness.environments import Environment

TASK_TIMEOUT = 90.0
"""Seconds for one task: stock 1.4.0b2 may notice its end 60 s late."""


class Timing(TypedDict):
    """Nanoseconds of one task."""

    start: int
    notice: int


class WorkerFailedError(PatchError):
    """A worker died or hung; the message ends with its output."""


@dataclass(frozen=True)
class Worker:
    """A process that supervises tasks with the SDK of one environment."""

    process: subprocess.Popen[bytes]
    log: Path

    def run(self, tasks: int) -> list[Timing]:
        """Have `tasks` tasks run, one after the other."""
        answer = self.ask(f"{tasks}\n".encode(), timeout=tasks * TASK_TIMEOUT)
        if not answer:
            raise WorkerFailedError(
                f"A worker died or hung; its output: {self.log.read_text(errors='replace')}"
            )
        timings: list[Timing] = json.loads(answer)
        return timings

    def ask(self, question: bytes, timeout: float) -> bytes:
        """Return the line that the worker answers, or nothing."""
        if self.process.stdin is None or self.process.stdout is None:
            raise TypeError("a worker is started with pipes")
        # A worker that has died has said why.
        with suppress(BrokenPipeError):
            os.write(self.process.stdin.fileno(), question)
        readable, _, _ = select.select([self.process.stdout], [], [], timeout)
        return self.process.stdout.readline() if readable else b""


@contextmanager
def start_worker(environment: Environment, settings: Mapping[str, str]) -> Iterator[Worker]:
    """Start a worker with settings of Airflow other than its defaults, and end it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        process = start_program(
            environment,
            folder,
            "tests.bench.worker",
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        yield Worker(process, folder / LOG)
