"""Fork supervisors from a process that has imported the SDK: `python -m tests.harness.fork_server SOCKET`.

Run by the interpreter of an environment that has the SDK, with the PYTHONPATH of environments.py; forking.py is the other
side. A request is a packet of JSON on the socket, and so is the answer. With a descriptor comes the order to start a
supervisor, which answers its PID; otherwise `reap` is the PID of one whose exit code is wanted. The end of the socket is
the end of this process. Python 3.9 and the packages of the environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from setproctitle import setproctitle
from task_sdk.execution_time.teardown.supervised.supervised_task import fork, in_turn

from tests.harness import scenario

REQUEST_MAX_BYTES = 1 << 16


def serve(connection: socket.socket) -> None:
    connection.send(b"{}")  # everything has been imported
    while True:
        packet, descriptors, _, _ = socket.recv_fds(connection, REQUEST_MAX_BYTES, 1)
        if not packet:
            return
        request = json.loads(packet)
        answer = start(connection, request, *descriptors) if descriptors else reap(request["reap"])
        connection.send(json.dumps(answer).encode())


def start(connection: socket.socket, request: dict[str, Any], order: int) -> int:
    pid = fork(in_turn(connection.close, lambda: be_supervisor(request, order)))
    os.close(order)
    return pid


def be_supervisor(request: dict[str, Any], order: int) -> NoReturn:
    """Be what a new process would be, in a session of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(request["folder"])
    os.chdir(folder)
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    setproctitle(request["cookie"])
    os.environ.update(request["variables"])
    scenario.run(folder, order=order)


def reap(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
