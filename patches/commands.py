"""Running other programs, from several threads, in such a way that an interrupt ends all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from patches.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from types import FrameType
    from typing import TypeVar

    Item = TypeVar("Item")
    Result = TypeVar("Result")

_running: set[subprocess.Popen[bytes]] = set()
_running_lock = threading.Lock()
_stopping = threading.Event()
# Of the main thread, which alone is interrupted. Within Popen() an interrupt would leave the process that it has started.
_starting = threading.Event()
_interrupted = threading.Event()


def run_command(
    command: Sequence[str],
    *,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, in a folder, and return its status and what it printed; add to its environment."""
    process = None
    try:
        with _hold_interrupt():
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | dict(environment or {}),
                cwd=folder,
            )
        with process:
            _register(process)
            stdout, stderr = process.communicate(stdin)
    except BaseException:
        if process:
            process.kill()
            process.wait()
        raise
    finally:
        with _running_lock:
            _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def find_tool(name: str) -> str:
    """Return the path of a program of the interpreter's environment, or else of PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise PatchError(f"{name} is not installed: run this through nox, which brings it along.")
    return found


def run_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Yield each item with its finished future, in the order of the items.

    When the consumer stops early, by an interrupt say, nothing further begins and the commands that run are ended.
    """
    executor = ThreadPoolExecutor(workers)
    try:
        futures = [(item, executor.submit(function, item)) for item in items]
        for item, future in futures:
            future.exception()
            yield item, future
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        _stopping.set()
        _terminate_running()
        executor.shutdown()
        _stopping.clear()


def interrupt_on_sigterm() -> None:
    """Have SIGTERM unwind the stack like Ctrl-C does, and let neither disturb the unwinding."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _raise_interrupt)


def _raise_interrupt(_signum: int, _frame: FrameType | None) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    if _starting.is_set():
        _interrupted.set()
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _hold_interrupt() -> Iterator[None]:
    """Raise an interrupt that comes meanwhile at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _starting.set()
    try:
        yield
    finally:
        _starting.clear()
        if _interrupted.is_set():
            _interrupted.clear()
            raise KeyboardInterrupt


def _register(process: subprocess.Popen[bytes]) -> None:
    with _running_lock:
        _running.add(process)
        if _stopping.is_set():
            raise PatchError("Interrupted.")


def _terminate_running() -> None:
    with _running_lock:
        for process in _running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
