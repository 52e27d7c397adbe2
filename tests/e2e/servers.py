"""Servers in sessions of their own, each with a log file."""

from __future__ import annotations

import pwd
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

READY_TIMEOUT = 120.0
"""Seconds that a server gets to answer; two busy cores take 20."""
STOP_TIMEOUT = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL_INTERVAL = 0.1
TAIL_LINES = 20
TAIL_COLUMNS = 400


class ServerFailedError(Exception):
    """A server ended, or did not get ready; the message has the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server, which leads a session."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, timeout: float) -> bool:
        """Return whether the server has ended within `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End the server, by force if need be."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            self.process.send_signal(signum)
            self.wait(STOP_TIMEOUT)

    def tail(self) -> str:
        """Return the last lines of the log, under a heading."""
        return tail(self.log)


@contextmanager
def run_server(
    name: str, command: Sequence[str], *, folder: Path, env: Mapping[str, str], user: str | None = None
) -> Iterator[Server]:
    """Run a server in `folder`, its log beside it, until the block ends; as a `user` if one is given."""
    account = pwd.getpwnam(user) if user else None
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=account and account.pw_uid,
            group=account and account.pw_gid,
            extra_groups=[] if account else None,
        )
    server = Server(name, process, log)
    try:
        yield server
    finally:
        server.stop()


def wait_until(
    condition: Callable[[], bool], *servers: Server, what: str, timeout: float = READY_TIMEOUT
) -> None:
    """Wait for what no descriptor tells.

    Raises ServerFailedError when a server has ended, or after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        for server in servers:
            if server.process.poll() is not None:
                raise ServerFailedError(
                    f"{server.name} ended while it was waited for: {what}.\n{server.tail()}"
                )
        if time.monotonic() > deadline:
            tails = "\n".join(server.tail() for server in servers)
            raise ServerFailedError(f"Waited {timeout:.0f} s in vain: {what}.\n{tails}")
        time.sleep(POLL_INTERVAL)


def tail(log: Path) -> str:
    """Return the last lines of a log, under a heading."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(
        [f"--- the end of {log.parent.name}/{log.name}:", *(line[:TAIL_COLUMNS] for line in lines)]
    )


def find_free_port() -> int:
    """Return a port of loopback that is free now; whoever listens there should do so soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Tell whether somebody answers on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
