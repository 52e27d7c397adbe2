"""Run real tasks, end them, and tell what came of it: `python -m tests.harness.real.driver SOCKET FOLDER`.

Run by the interpreter of an environment that has a complete Airflow, with the PYTHONPATH of environments.py; running.py is the
other side, and dags/ has the tasks. A request is a packet of JSON with a descriptor, which gets the answer. For each request the
driver, which has imported Airflow, forks a scene. Python 3.9.
"""

from __future__ import annotations

import fcntl
import importlib
import itertools
import json
import os
import runpy
import signal
import socket
import struct
import sys
from functools import partial
from pathlib import Path
from typing import Any

from task_sdk.execution_time.teardown.supervised.supervised_task import fork

from tests.harness.real.scene import run_scene

REQUEST_MAX_BYTES = 1 << 16
DAGS = Path(__file__).parent / "dags"
FIRST_DAG = "told.py"
FIRST = 1
"""The first process of a PID namespace, which has a network namespace beside it."""
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
PRELOADED = (
    "airflow.models.dagbag",
    "airflow.sdk.execution_time.task_runner",
    "airflow.serialization.serialized_objects",
)


def serve(connection: socket.socket, folder: Path) -> None:
    connection.send(b"{}")  # everything has been imported
    for number in itertools.count():
        packet, descriptors, _, _ = socket.recv_fds(connection, REQUEST_MAX_BYTES, 1)
        if not packet:
            return
        case = json.loads(packet)
        fork(partial(be_scene, connection, case, folder / str(number), *descriptors))
        os.close(descriptors[0])


def be_scene(connection: socket.socket, case: dict[str, Any], folder: Path, answer: int) -> None:
    connection.close()
    run_scene(case, folder, answer)


def main() -> None:
    connection, folder = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody collects the scenes
    if os.getpid() == FIRST:
        start_loopback()
    preload()
    serve(connection, folder)
    try:
        os.wait()
    except ChildProcessError:
        return  # the last scene has ended


def start_loopback() -> None:
    """Have the loopback interface of a new network namespace up: netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def preload() -> None:
    """Import what a task runner imports on its way."""
    for name in PRELOADED:
        importlib.import_module(name)
    runpy.run_path(str(DAGS / FIRST_DAG))


if __name__ == "__main__":
    main()
