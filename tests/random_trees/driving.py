"""Run examples by a driver that lives in the environment of a release."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patches.errors import PatchError
from patches.releases import find_release
from tests.harness.environments import LOG, create_environment, start_program
from tests.harness.processes import kill_marked
from tests.harness.wheels import build_patched_wheel
from tests.random_trees.examples import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.random_trees.examples import Example

VERSION = "1.1.8"
ANSWER_TIMEOUT = 120.0
"""Seconds; the driver gives up earlier by itself."""
OUTPUT_CHARACTERS = 3000


class DriverFailedError(PatchError):
    """Nothing can be said about the example."""


class Driver:
    """A process that runs one example after the other."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.refusal: str | None = None
        """Why no strangers take the numbers of processes that have gone, if none do."""

    def run(self, example: Example) -> Outcome:
        """Let the tree of an example grow, and end it."""
        assert self._process.stdin
        # A driver that has died has said why.
        with suppress(BrokenPipeError):
            self._process.stdin.write(example.dump().encode() + b"\n")
            self._process.stdin.flush()
        answer = self.hear()
        if "failed" in answer:
            raise self._fail(answer["failed"])
        return Outcome(**answer)

    def hear(self) -> dict[str, Any]:
        """Take in one line."""
        assert self._process.stdout
        readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT)
        line = self._process.stdout.readline() if readable else b""
        if not line:
            raise self._fail("the driver gave no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self, reason: str) -> DriverFailedError:
        return DriverFailedError(f"{reason}; its output:\n{self._log.read_text()[-OUTPUT_CHARACTERS:]}")


@contextmanager
def start_driver(version: str = VERSION, *, bugs: Sequence[str] = ()) -> Iterator[Driver]:
    """Build the patched wheel of a version, install it, and run a driver with it; nothing of it outlives the context.

    `bugs` are names of BUGS, to be planted.
    """
    cookie = f"cookie-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="random-trees-") as name:
        folder = Path(name)
        release = find_release(version)
        environment = create_environment(release, wheel=build_patched_wheel(release, folder))
        process = start_program(
            environment,
            folder,
            "tests.random_trees.driver",
            cookie,
            *bugs,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        driver = Driver(process, folder / LOG)
        try:
            ready = driver.hear()  # it has imported the SDK
            if "failed" in ready:
                raise DriverFailedError(f"No example was tried: {ready['failed']}.")
            driver.refusal = ready["refusal"]
            yield driver
        finally:
            kill_marked(cookie)
            process.communicate()
