"""The terminal at which the tests type."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.servers import wait_until
from tests.e2e.terminals import CTRL_C, Terminal, open_terminal
from tests.harness.environments import clean_env
from tests.harness.processes import read_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RETURN_TIMEOUT = 10.0
PATIENCE = 0.2


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with open_terminal("terminal", folder=tmp_path, env=clean_env(tmp_path)) as terminal:
        assert terminal.answers()
        yield terminal


def test_interrupt_ends_what_runs_in_the_foreground(terminal: Terminal) -> None:
    """A command has the terminal until Ctrl-C ends it; then the shell has it again, with the settings from before."""
    settings = terminal.read_settings()
    terminal.type("sleep 600\n")
    # Not when the shell's child has the terminal, but when it has become the command: before, it is another shell.
    runs = lambda: read_name(os.tcgetpgrp(terminal.descriptor)) == "sleep"  # noqa: E731
    wait_until(runs, terminal.shell, what="the command runs")

    terminal.type(CTRL_C)

    assert terminal.wait_for_shell(RETURN_TIMEOUT)
    assert terminal.read_settings() == settings


def test_deaf_command_keeps_the_terminal(terminal: Terminal) -> None:
    """A command that ignores Ctrl-C is noticed."""
    terminal.type("(trap '' INT; echo is-$((40 + 2)); exec sleep 600)\n")
    is_deaf = lambda: "is-42" in terminal.shell.log.read_text()  # noqa: E731
    wait_until(is_deaf, terminal.shell, what="the command ignores SIGINT")
    command = os.tcgetpgrp(terminal.descriptor)

    terminal.type(CTRL_C)

    assert not terminal.wait_for_shell(PATIENCE)
    os.killpg(command, signal.SIGKILL)
    assert terminal.wait_for_shell(RETURN_TIMEOUT)


def test_changed_settings_are_noticed(terminal: Terminal) -> None:
    """A command that turns the echo off has left the terminal unusable."""
    settings = terminal.read_settings()
    terminal.type("stty -echo\n")
    wait_until(lambda: terminal.read_settings() != settings, terminal.shell, what="the echo is off")
