"""What the processes of a scene tell of themselves, as lines of JSON in a FIFO, and what a task waits for; Python 3.9."""

from __future__ import annotations

import json
import os
import select
import time
from pathlib import Path
from typing import Any


class Gone(Exception):  # noqa: N818
    """Nobody waits for the answer."""


class Told:
    """Two FIFOs: what everybody in a scene has told, and the word that frees a task which waits for it."""

    def __init__(self, folder: Path, answer: int) -> None:
        self.path, self.freed_path = folder / "told", folder / "freed"
        for path in (self.path, self.freed_path):
            os.mkfifo(path)
        self.reader = os.open(self.path, os.O_RDWR)
        self.answer = answer
        self.events: list[dict[str, Any]] = []
        self._unread = b""

    def wait_for(
        self,
        event: str,
        *,
        until: float,
        pidfd: int,
        times: int = 1,
        after: int = 0,
        past_return: bool = False,
    ) -> bool:
        """Return whether it was told so often, after the first events, by that time and before the end of the process.

        :param past_return: the supervisor's return is no reason to stop.
        """
        sources = select.poll()
        sources.register(self.reader, select.POLLIN)
        sources.register(pidfd, select.POLLIN)
        sources.register(self.answer, 0)  # POLLERR: its reader has closed
        while sum(each["event"] == event for each in self.events[after:]) < times:
            if not past_return and find(self.events, "returned", "at"):
                return False
            ready = dict(sources.poll(max(0, until - time.monotonic()) * 1000))
            if self.answer in ready:
                raise Gone
            if self.reader in ready:
                self.hear()
            elif not ready or pidfd in ready:
                return False
        return True

    def hear(self) -> None:
        *lines, self._unread = (self._unread + os.read(self.reader, 1 << 16)).split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def hear_rest(self) -> None:
        while select.select([self.reader], [], [], 0)[0]:
            self.hear()

    def free(self) -> None:
        """Let the task finish that waits for it."""
        # Left open: a word is lost with the last who has the FIFO open.
        os.write(os.open(self.freed_path, os.O_RDWR), b"\n")


def tell(event: str, **details: Any) -> None:
    line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **details}, default=str)
    descriptor = os.open(os.environ["TOLD"], os.O_WRONLY)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


def wait_until_freed() -> None:
    """Return when the task that calls this may finish."""
    with Path(os.environ["FREED"]).open() as fifo:
        fifo.readline()


def find(events: list[dict[str, Any]], event: str, key: str) -> Any:
    return next((each.get(key) for each in events if each["event"] == event), None)
