"""The demo ends what it has started, however it ends."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NoReturn
from unittest.mock import Mock

from tests.demo import runs

if TYPE_CHECKING:
    import pytest

INTERRUPT_TIMEOUT = 10
TOO_MANY_TO_BEGIN = 1000


def test_interrupt_ends_what_has_begun_and_begins_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that is interrupted kills the supervisors that run, drops what waits its turn, and ends."""
    killed = threading.Event()
    begun: list[runs.Run] = []
    interrupts: list[KeyboardInterrupt] = []
    plan = [Mock(spec=runs.Run) for _ in range(TOO_MANY_TO_BEGIN)]

    def run_one(run: runs.Run) -> None:
        begun.append(run)
        if run is not plan[0]:
            killed.wait()

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    def be_interrupted() -> None:
        try:
            runs.run_all(plan, on_finished=interrupt)
        except KeyboardInterrupt as error:
            interrupts.append(error)

    monkeypatch.setattr(runs, "run_one", run_one)
    monkeypatch.setattr(runs, "kill_supervisors", killed.set)
    demo = threading.Thread(target=be_interrupted, daemon=True)
    try:
        demo.start()
        demo.join(INTERRUPT_TIMEOUT)
        ended = not demo.is_alive()
    finally:
        # Or the interpreter would wait for the threads of the pool for ever.
        killed.set()

    assert ended
    assert len(interrupts) == 1
    assert len(begun) < TOO_MANY_TO_BEGIN
