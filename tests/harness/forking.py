"""Have supervisors forked by a process that has imported the SDK, which is most of what starting one takes."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tests.harness.environments import LOG, clean_env, start_program
from tests.harness.processes import COOKIE_VARIABLE
from tests.harness.supervised import SETTINGS, SupervisorFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.harness.environments import Environment

IMPORT_TIMEOUT = 300.0
"""Seconds until the SDK is imported."""
ANSWER_TIMEOUT = 60.0
"""Seconds; a fork takes milliseconds."""
ANSWER_MAX_BYTES = 1 << 10


class ForkServer:
    """A running process that forks supervisors; of several threads one is served at a time."""

    def __init__(self, environment: Environment, connection: socket.socket) -> None:
        self.environment = environment
        self._connection = connection
        self._lock = Lock()

    def hear(self) -> Any:
        """Return an answer; raise SupervisorFailedError when there is none."""
        try:
            answer = self._connection.recv(ANSWER_MAX_BYTES)
        except TimeoutError:
            raise SupervisorFailedError("the fork server gave no answer") from None
        if not answer:
            raise SupervisorFailedError("the fork server has ended")
        return json.loads(answer)

    def ask(self, request: Mapping[str, Any], *descriptors: int) -> int:
        """Return the number that a request is answered with."""
        with self._lock:
            socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)
            return int(self.hear())

    def launch(self, cookie: str, folder: Path, order: int) -> ForkedProcess:
        """Start a supervisor, as `start_supervisor` wants it."""
        variables = {**clean_env(folder, python=self.environment.python), COOKIE_VARIABLE: cookie}
        request = {"cookie": cookie, "folder": str(folder), "variables": variables}
        return ForkedProcess(self, self.ask(request, order))


class ForkedProcess:
    """A supervisor that a fork server has forked, and collects for us: as much of Popen as a supervisor needs."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._exit_code: int | None = None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, sig: int) -> None:
        if self._exit_code is None:
            os.kill(self.pid, sig)

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        if self._exit_code is None:
            self._exit_code = self._server.ask({"reap": self.pid})
        return self._exit_code


@contextmanager
def start_fork_server(environment: Environment, *, env: Mapping[str, str]) -> Iterator[ForkServer]:
    """Start a fork server whose supervisors have the variables of `env` besides SETTINGS."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryDirectory(prefix="fork-server-") as name:
        folder = Path(name)
        with theirs:
            process = start_program(
                environment,
                folder,
                "tests.harness.fork_server",
                str(theirs.fileno()),
                env={**SETTINGS, **env},
                pass_fds=[theirs.fileno()],
            )
        server = ForkServer(environment, ours)
        try:
            ours.settimeout(IMPORT_TIMEOUT)
            server.hear()
            ours.settimeout(ANSWER_TIMEOUT)
            yield server
        except SupervisorFailedError as error:
            raise SupervisorFailedError(f"{error}; its output:\n{(folder / LOG).read_text()}") from None
        finally:
            process.kill()
            process.wait()
