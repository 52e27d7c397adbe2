"""A terminal with a shell in it, at which somebody types."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import termios
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.e2e.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# One that leaves the settings of its terminal as they are, and gives each command a process group.
SHELL = ("bash", "--noprofile", "--norc", "--noediting", "-i")
CTRL_C = "\x03"

POLL_INTERVAL = 0.05
ANSWER_TIMEOUT = 10.0
"""Seconds that the shell has to say what it is asked for."""
OUTPUT_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Terminal:
    """The far end of a terminal. The shell's log is what has been on the screen."""

    descriptor: int
    shell: Server

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.descriptor, text.encode())

    def read_settings(self) -> list[object]:
        """Return what tcgetattr(3) does: echo, line editing, the keys that send signals."""
        return termios.tcgetattr(self.descriptor)

    def wait_for_shell(self, timeout: float) -> bool:
        """Return whether the shell has its terminal back within `timeout` seconds, no command being in the foreground."""
        deadline = time.monotonic() + timeout
        while os.tcgetpgrp(self.descriptor) != self.shell.process.pid:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        return True

    def answers(self) -> bool:
        """Return whether the shell does what is typed, and its answer is seen."""
        self.type("echo answer-$((6 * 7))\n")
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while "answer-42" not in self.shell.log.read_text(errors="replace"):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        return True


def become_session_leader() -> None:
    """Be a process at a terminal, standard input, as a login is."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # An ignored signal stays ignored through exec, and whoever runs the tests in the background has it ignored.
    for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@contextmanager
def open_terminal(name: str, *, folder: Path, env: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a shell in `folder` at a terminal of its own; its log, `name`, is beside it. What it runs is for the caller to end."""
    ours, theirs = os.openpty()
    closing = threading.Event()
    log = folder / f"{name}.log"
    log.touch()

    def keep_screen() -> None:
        with log.open("ab", buffering=0) as screen:
            while not closing.is_set():
                if select.select([ours], [], [], POLL_INTERVAL)[0]:
                    try:
                        screen.write(os.read(ours, OUTPUT_MAX_BYTES))
                    except OSError:  # EIO: nobody has the other end open any more (pty(7))
                        return

    try:
        shell = subprocess.Popen(
            SHELL,
            cwd=folder,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=become_session_leader,  # noqa: PLW1509  # no other thread holds a lock yet
        )
    finally:
        os.close(theirs)
    reader = threading.Thread(target=keep_screen)
    reader.start()
    try:
        yield Terminal(ours, Server(name, shell, log))
    finally:
        # It ignores SIGTERM.
        shell.kill()
        shell.wait()
        closing.set()
        reader.join()
        os.close(ours)
