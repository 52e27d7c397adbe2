"""Commands that the tool runs, and what becomes of them when the tool is interrupted."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from patches.commands import interrupt_on_sigterm, run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_mock import MockerFixture

SLEEPER = ("sleep", "600")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle signals as the tool does, and then as before."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    interrupt_on_sigterm()
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_a_command_starts(signum: signal.Signals, mocker: MockerFixture) -> None:
    """A command that has just been started ends with the interrupt, although Popen() has not returned."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **options))
        signal.raise_signal(signum)
        return started[-1]

    mocker.patch.object(subprocess, "Popen", autospec=True, side_effect=start_interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_command(SLEEPER)
        assert [process.poll() for process in started] == [-signal.SIGKILL]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_no_command_starts(mocker: MockerFixture) -> None:
    """An interrupt is raised even if the command could not be started."""

    def fail_interrupted(*_arguments: Any, **_options: Any) -> subprocess.Popen[bytes]:
        signal.raise_signal(signal.SIGINT)
        raise FileNotFoundError

    mocker.patch.object(subprocess, "Popen", autospec=True, side_effect=fail_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command(SLEEPER)
