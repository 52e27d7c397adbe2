# Licensed to the Apache Software Foundation (ASF) under one
# or more contributor license agreements.  See the NOTICE file
# distributed with this work for additional information
# regarding copyright ownership.  The ASF licenses this file
# to you under the Apache License, Version 2.0 (the
# "License"); you may not use this file except in compliance
# with the License.  You may obtain a copy of the License at
#
#   http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing,
# software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied.  See the License for the
# specific language governing permissions and limitations
# under the License.
"""
Interrupt ``execute()`` when the task is told to stop.

The supervisor stops a task by SIGTERM. A handler that calls ``on_kill()`` and returns lets ``execute()`` go on where it
was: a task without an ``on_kill`` runs until it is killed, and one whose ``on_kill`` has removed the work returns, and
is a success (apache/airflow issues 58936, 71202, 73006). So ``on_kill`` runs once, then ``execute()`` is interrupted by an
exception that no ``except Exception`` catches, and however it ends then, the task has failed or is up for retry.

What may not be interrupted is waited for:

- A request to the supervisor. Answers are not matched to requests, so the next request would get the answer to this one.
- A log call. It holds the lock of the log's file, and an ``on_kill`` that logs would wait for that lock for ever.

Python ignores what a finalizer or a weak reference's callback raises. If the exception is lost there, it is raised again.

Before ``execute()`` the signal lets ``on_kill`` run, as it may have been prepared for, and ``execute()`` does not
begin. After ``execute()`` it changes nothing: the result stands.

Imports nothing of Airflow but exceptions.
"""

from __future__ import annotations

import _thread
import contextlib
import enum
import functools
import importlib
import inspect
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import structlog

from airflow.sdk import exceptions
from airflow.sdk.exceptions import AirflowRuntimeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = [
    "TaskInterrupted",
    "interrupt_on_sigterm",
    "report_state",
    "run_interruptibly",
    "uninterrupted",
]

log = structlog.get_logger(logger_name="task")

ORDER_TIME = 5.0
"""Seconds that an order to stop which is on its way may take, on a machine that is busy."""

SIGNAL_DELAY = 0.002
"""Seconds until a task is interrupted that could not be at once."""

LOG_WRITER = "structlog._output"
"""The module whose functions hold the lock of a log's file, which is not reentrant."""

REASON = "The task was told to stop (SIGTERM) before it had finished"

CONFLICT = 409
"""The status of the API's answer when a state is reported of a task that is not to run any more."""

AirflowTaskTerminated: type[BaseException] = (
    exceptions
    if hasattr(exceptions, "AirflowTaskTerminated")
    else importlib.import_module("airflow.exceptions")  # before 1.2
).AirflowTaskTerminated

_Method = TypeVar("_Method", bound="Callable[..., Any]")


class TaskInterrupted(BaseException):
    """
    The task was told to stop before ``execute()`` had returned.

    What interrupts ``execute()`` itself is ``AirflowTaskTerminated``, as in Airflow 2. The runner takes that for the end
    of all retries, so this takes its place.
    """


class Phase(enum.Enum):
    """How far a task has come."""

    PREPARING = enum.auto()
    EXECUTING = enum.auto()
    FINISHED = enum.auto()


class Interruption:
    """What a runner knows of the order to stop its task."""

    def __init__(self, ti: Any, outer: Interruption | None, is_ordered: Callable[[], bool] | None) -> None:
        self._ti = ti
        self._is_ordered = is_ordered
        self._pid = os.getpid()
        self._outer = outer if outer is not None and outer.is_executing else None
        self._phase = Phase.PREPARING
        self._requested = False
        self._delivered = False
        self._on_kill_called = False
        self._unraisable_hook: Callable[[Any], Any] | None = None
        self._on_kill_error: Exception | None = None

    @property
    def is_executing(self) -> bool:
        """Whether ``execute()`` is under way."""
        return self._phase is Phase.EXECUTING

    @property
    def is_put_off(self) -> bool:
        """Whether the task was told to stop, and has not come to it."""
        return self._requested and not self._delivered

    def handle(self, _signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM."""
        if os.getpid() != self._pid:
            # A child that was forked a moment ago, before drop_handler() came to it.
            drop_handler()
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._phase is not Phase.FINISHED:
            self._requested = True
            self.deliver(frame)

    def deliver(self, frame: FrameType | None = None) -> None:
        """
        Run ``on_kill`` and interrupt ``execute()``, once, if that may be now.

        :param frame: what the signal has interrupted, None if that was no log call for sure.
        """
        if not self._requested or self._delivered or _requests_in_flight or os.getpid() != self._pid:
            return
        if is_writing_log(frame):
            sys.setprofile(self._deliver_after_log_call)
            return
        self._delivered = True
        # From here on the grace of whoever stops the task is the only limit: a timeout would cut on_kill short.
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._run_on_kill()
        if self.is_executing:
            if self._unraisable_hook is None:
                self._unraisable_hook = sys.unraisablehook
                sys.unraisablehook = self._handle_unraisable
            interrupt()

    def _deliver_after_log_call(self, frame: FrameType, event: str, _value: object) -> None:
        """Deliver when the log call returns; a profile function, which every call and return of this thread calls."""
        if event == "return" and not is_writing_log(frame.f_back):
            sys.setprofile(None)
            self.deliver(frame.f_back)

    def _run_on_kill(self) -> None:
        if self._on_kill_called:
            return
        self._on_kill_called = True
        try:
            self._ti.task.on_kill()
        except Exception as error:  # whatever it is, the task ends; run() logs it
            self._on_kill_error = error

    def _handle_unraisable(self, unraisable: Any) -> None:
        """Interrupt again where the exception was ignored, as in a finalizer; a ``sys.unraisablehook``."""
        if self.is_executing and isinstance(unraisable.exc_value, AirflowTaskTerminated):
            self._delivered = False
            signal_soon(self)
        elif self._unraisable_hook is not None:
            self._unraisable_hook(unraisable)

    def _restore_unraisable_hook(self) -> None:
        if self._unraisable_hook is not None and sys.unraisablehook == self._handle_unraisable:
            sys.unraisablehook = self._unraisable_hook

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Run ``execute()`` so that it can be interrupted.

        :raises TaskInterrupted: if the task was told to stop before it had returned, however it ended.
        """
        result = None
        try:
            try:
                self._phase = Phase.EXECUTING
                if not self._requested:
                    result = call(*args, **kwargs)
            except Exception:
                self._await_order()
                raise
            finally:
                self._phase = Phase.FINISHED
                self._restore_unraisable_hook()
                restore_outer(self._outer)
        except BaseException as error:
            if not self._requested:
                raise
            self._end(error)
        if self._requested:
            self._end()
        return result

    def _await_order(self) -> None:
        """Wait to be interrupted, if the order is on its way: ``on_kill`` is to run also if ``execute()`` has failed before."""
        ordered = False
        with contextlib.suppress(Exception):  # the task's own exception is what counts
            ordered = not self._requested and self._is_ordered is not None and self._is_ordered()
        if ordered:
            time.sleep(ORDER_TIME)

    def _end(self, error: BaseException | None = None) -> NoReturn:
        """Tell of the interruption, in the task's log and to whoever runs the task."""
        self.deliver()
        if self._on_kill_error is not None:
            log.error("on_kill failed", exc_info=self._on_kill_error)
        if self._outer is not None:
            # The task that runs this one in its own process was told to stop by the same signal.
            signal_soon(self._outer)
        raise TaskInterrupted(REASON) from error


_current: Interruption | None = None
"""Of the task that this process runs."""

_requests_in_flight = 0
"""Requests to the supervisor that the main thread has begun, and whose answers it has not got."""


def interrupt_on_sigterm(ti: Any, is_ordered: Callable[[], bool] | None = None) -> None:
    """
    Have SIGTERM end a task of this process from now on; in another thread than the main one, which gets no signals, not.

    :param ti: the ``RuntimeTaskInstance``, whose ``task`` may be replaced by a mapped one later.
    :param is_ordered: tells, when ``execute()`` has failed, whether SIGTERM is on its way.
    """
    global _current  # signal handlers belong to the process, too
    if threading.current_thread() is threading.main_thread():
        _current = Interruption(ti, _current, is_ordered)
        signal.signal(signal.SIGTERM, handle_sigterm)


def restore_outer(outer: Interruption | None) -> None:
    """Have SIGTERM end the task that has run another one in its own process, if there is one."""
    global _current
    _current = outer or _current


def handle_sigterm(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM on behalf of the task that runs."""
    if _current is not None:
        _current.handle(signum, frame)


def run_interruptibly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    Run ``call``, which is ``execute()``, so that SIGTERM interrupts it.

    :raises TaskInterrupted: if the task was told to stop before ``call`` had returned, however it ended.
    """
    if _current is None or threading.current_thread() is not threading.main_thread():
        return call(*args, **kwargs)
    return _current.run(call, *args, **kwargs)


def uninterrupted(method: _Method) -> _Method:
    """Have a method that asks the supervisor get its answer before the task is interrupted; a decorator."""

    @functools.wraps(method)
    def complete(*args: Any, **kwargs: Any) -> Any:
        with request_in_flight():
            return method(*args, **kwargs)

    @functools.wraps(method)
    async def acomplete(*args: Any, **kwargs: Any) -> Any:
        # Requests of many coroutines, one begun before the other has ended, would put it off for ever.
        if _current is not None and _current.is_put_off:
            raise AirflowTaskTerminated(REASON)
        with request_in_flight():
            return await method(*args, **kwargs)

    return acomplete if inspect.iscoroutinefunction(method) else complete  # type: ignore[return-value]


@contextlib.contextmanager
def request_in_flight() -> Iterator[None]:
    """Put off an interruption of the main thread for the duration."""
    begin_request()
    try:
        yield
    finally:
        end_request()


def begin_request() -> None:
    """Put off an interruption of the main thread, the only one that can be interrupted."""
    global _requests_in_flight
    if threading.current_thread() is threading.main_thread():
        _requests_in_flight += 1


def end_request() -> None:
    """Let the main thread be interrupted again, at once if a signal has come meanwhile."""
    global _requests_in_flight
    if threading.current_thread() is threading.main_thread() and _requests_in_flight:
        _requests_in_flight -= 1
        if _current is not None:
            _current.deliver()


def report_state(send: Callable[..., Any], msg: Any, error: BaseException | None) -> None:
    """
    Tell the supervisor how a task has ended; to be called by the runner.

    :param error: what has ended ``execute()``, None if nothing has.
    :raises SystemExit: if the task was interrupted, and the server has ended it: no callback is to run.
    """
    try:
        send(msg=msg)
    except AirflowRuntimeError as failure:
        if isinstance(error, TaskInterrupted) and find_status(failure) == CONFLICT:
            raise SystemExit(1) from None
        raise


def find_status(failure: AirflowRuntimeError) -> int | None:
    """Return the status of the API's answer that a failure is about."""
    detail = failure.error.detail
    return detail.get("status_code") if detail else None


def interrupt() -> None:
    """
    Raise where the main thread is, unless that is an event loop: its tasks are cancelled.

    Within a step of a coroutine both happens. An exception other than SystemExit and KeyboardInterrupt ends that
    coroutine alone, which nobody may be waiting for.

    :raises AirflowTaskTerminated: in all other code.
    """
    loop = find_running_loop()
    if loop is not None:
        loop.call_soon_threadsafe(cancel_all, loop)
        if sys.modules["asyncio"].current_task(loop) is None:
            return
    raise AirflowTaskTerminated(REASON)


def find_running_loop() -> Any:
    """Return the event loop that runs in this thread, None if none does."""
    # An execute() that has one has imported asyncio.
    if asyncio := sys.modules.get("asyncio"):
        with contextlib.suppress(RuntimeError):
            return asyncio.get_running_loop()
    return None


def cancel_all(loop: Any) -> None:
    """Cancel all tasks of an event loop."""
    for task in sys.modules["asyncio"].all_tasks(loop):
        task.cancel()


def is_writing_log(frame: FrameType | None) -> bool:
    """Whether a function that holds the lock of a log's file is under way in or below a frame."""
    while frame is not None:
        if frame.f_globals.get("__name__") == LOG_WRITER:
            return True
        frame = frame.f_back
    return False


def signal_soon(task: Interruption) -> None:
    """Have this process get SIGTERM in a moment, unless a task has ended by then."""

    def send() -> None:
        time.sleep(SIGNAL_DELAY)
        if task.is_executing:
            os.kill(os.getpid(), signal.SIGTERM)

    # threading's locks may be held: a finalizer runs anywhere.
    _thread.start_new_thread(send, ())


def drop_handler() -> None:
    """Have SIGTERM end this process, a forked child of a runner: it is no task, and deaf otherwise."""
    if signal.getsignal(signal.SIGTERM) is handle_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=drop_handler)
