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

The supervisor stops a task by SIGTERM. If the handler only calls ``on_kill()`` and returns, ``execute()``
goes on. Then a task without an ``on_kill`` runs until it is killed. If ``on_kill`` has removed the work,
``execute()`` may return, and the task is a success:

- https://github.com/apache/airflow/issues/58936
- https://github.com/apache/airflow/issues/71202
- https://github.com/apache/airflow/issues/73006

So the handler runs ``on_kill`` once, and then interrupts ``execute()`` with an exception that no
``except Exception`` catches. However ``execute()`` ends then, the task has failed or is up for retry.

The interruption waits for the end of

1. a request to the supervisor: answers are not matched to requests, so the next request would get this one's
   answer;
2. a log call: it holds the lock of the log's file, and an ``on_kill`` that logs would wait for that lock for
   ever;
3. a write to stdout or stderr: an ``on_kill`` that prints would fail, with "reentrant call inside";
4. the exception handler of an event loop, which runs, say, when a coroutine is collected that was never
   completed: asyncio ignores any exception in it.

Python ignores an exception that a finalizer or a weak reference's callback raises. If the interruption is
lost there, it is repeated.

``pre_execute()`` is interrupted like ``execute()``. If the signal comes before either, ``on_kill`` runs,
because the task may have prepared something, and neither begins. After ``execute()`` the signal changes
nothing: the result stands. Where the task triggers another Dag's run, the runner's wait for it counts as part
of ``execute()``.

Imports nothing of Airflow but exceptions.
"""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import enum
import functools
import importlib
import io
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import structlog

from airflow.sdk import exceptions
from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.sdk.execution_time.teardown.stop_request import CONFLICT

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterator
    from types import FrameType

    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance


log = structlog.get_logger(logger_name="task")

ORDER_TIME = 5.0
"""Seconds that a SIGTERM on its way may take to arrive on a busy machine."""

SIGNAL_DELAY = 0.002
"""Seconds until the next try to interrupt a task that could not be interrupted at once."""

LOG_WRITER = "structlog._output"
"""The module whose functions hold the lock of a log's file. This lock is not reentrant."""

COMPLAINT = ("asyncio.base_events", "call_exception_handler")
"""Module and name of the function that logs what has gone wrong in an event loop, and ignores exceptions meanwhile."""

REASON = "The task was told to stop (SIGTERM) before it had finished"

# Not by two imports: mypy finds fault with one of them on each release.
_exceptions = (
    exceptions
    if hasattr(exceptions, "AirflowTaskTerminated")
    else importlib.import_module("airflow.exceptions")  # before 1.2
)
AirflowTaskTerminated: type[BaseException] = _exceptions.AirflowTaskTerminated
DagRunTriggerException: type[Exception] = _exceptions.DagRunTriggerException

_Method = TypeVar("_Method", bound="Callable[..., Any]")


class TaskInterrupted(BaseException):
    """
    The task was told to stop before ``execute()`` had returned.

    ``execute()`` itself is interrupted by ``AirflowTaskTerminated``, as in Airflow 2. But the runner fails a
    task without a retry on that one, so this exception replaces it when it leaves ``execute()``.
    """


class Phase(enum.Enum):
    """How far a task has come."""

    PREPARING = enum.auto()
    EXECUTING = enum.auto()
    FINISHED = enum.auto()


class Interruption:
    """The state of a runner with regard to the order to stop its task."""

    def __init__(
        self, ti: RuntimeTaskInstance, outer: Interruption | None, is_ordered: Callable[[], bool] | None
    ) -> None:
        self._ti = ti
        self._is_ordered = is_ordered
        self._pid = os.getpid()
        self._outer = outer if outer is not None and outer.is_executing else None
        self._phase = Phase.PREPARING
        self._requested = False
        self._delivered = False
        self._on_kill_called = False
        self._unraisable_hook: Callable[[sys.UnraisableHookArgs], Any] | None = None
        self._on_kill_error: Exception | None = None

    @property
    def is_executing(self) -> bool:
        """Whether ``execute()`` is under way."""
        return self._phase is Phase.EXECUTING

    @property
    def is_requested(self) -> bool:
        """Whether the task was told to stop."""
        return self._requested

    def handle(self, _signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM."""
        if os.getpid() != self._pid:
            # This is a child that was just forked, and in which drop_handler() has not run yet.
            drop_handler()
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._phase is not Phase.FINISHED:
            self._requested = True
            self.deliver(frame)

    def deliver(self, frame: FrameType | None = None) -> None:
        """
        Run ``on_kill`` and interrupt ``execute()``, once, unless the interruption has to wait.

        :param frame: the frame that the signal has interrupted; None if that was certainly no log call.
        """
        if not self._requested or self._delivered or _requests_in_flight or os.getpid() != self._pid:
            return
        if is_writing(frame):
            # A task that prints all the time is hardly ever met between two writes by a signal, and one that computes
            # after the write calls nothing, which from Python 3.12 on no profile function notices.
            sys.setprofile(self._deliver_after_write)
            signal_soon(self)
            return
        # Cancel the task's timeout, which would interrupt on_kill. The grace period is the only limit from
        # now on. If the timeout comes here and now, on_kill runs when execute() has ended.
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._delivered = True
        self._run_on_kill()
        if self.is_executing:
            if self._unraisable_hook is None:
                self._unraisable_hook = sys.unraisablehook
                sys.unraisablehook = self._handle_unraisable
            interrupt()

    def _deliver_after_write(self, frame: FrameType, event: str, _value: object) -> None:
        """Deliver when a write is over. Python calls this profile function at every call and return."""
        # asyncio mostly complains in a finalizer, where Python ignores an exception as well.
        left = frame.f_back if event == "return" and not is_complaint(frame) else frame
        if not is_writing(left):
            sys.setprofile(None)
            self.deliver(left)

    def _run_on_kill(self) -> None:
        if self._on_kill_called:
            return
        self._on_kill_called = True
        try:
            self._ti.task.on_kill()
        except Exception as error:  # the task ends in any case; _end() logs the error
            self._on_kill_error = error

    def _handle_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Interrupt again if Python ignored the exception, as in a finalizer; a ``sys.unraisablehook``."""
        if self.is_executing and isinstance(unraisable.exc_value, AirflowTaskTerminated):
            self._delivered = False
            signal_soon(self)
        elif self._unraisable_hook is not None:
            self._unraisable_hook(unraisable)

    def _restore_unraisable_hook(self) -> None:
        if self._unraisable_hook is not None and sys.unraisablehook == self._handle_unraisable:
            sys.unraisablehook = self._unraisable_hook

    def run(self, after: Phase, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Run ``execute()``, or a part of what is around it, so that it can be interrupted.

        :param after: how far the task has come when that has returned.
        :raises TaskInterrupted: if the task was told to stop before it had returned, however it ended.
        """
        result = None
        come_to = Phase.FINISHED
        try:
            try:
                self._phase = Phase.EXECUTING
                if not self._requested:
                    result = call(*args, **kwargs)
                come_to = after
            except DagRunTriggerException:
                come_to = Phase.PREPARING  # of trigger_interruptibly()
                raise
            except Exception:
                self._await_order()
                raise
            finally:
                self._finish(come_to)
        except BaseException as error:
            if not self._requested:
                raise
            self._end(error)
        if self._requested:
            self._end()
        return result

    def _finish(self, phase: Phase = Phase.FINISHED) -> None:
        self._phase = phase
        self._restore_unraisable_hook()
        if phase is Phase.FINISHED:
            restore_outer(self._outer)

    def _await_order(self) -> None:
        """If SIGTERM is on its way, wait for it: ``on_kill`` must run even if ``execute()`` has failed."""
        ordered = False
        with contextlib.suppress(Exception):  # the task's own exception counts
            ordered = not self._requested and self._is_ordered is not None and self._is_ordered()
        if ordered:
            time.sleep(ORDER_TIME)

    def _end(self, error: BaseException | None = None) -> NoReturn:
        """Log an error of ``on_kill``, and raise TaskInterrupted to the runner."""
        self._finish()  # the interruption may have come just before it
        self.deliver()
        if self._on_kill_error is not None:
            log.error("on_kill failed", exc_info=self._on_kill_error)
        if self._outer is not None:
            # Another task runs this one in its own process. The same signal was meant for that one, too.
            signal_soon(self._outer)
        raise TaskInterrupted(REASON) from error


_current: Interruption | None = None
"""The interruption of the task that this process runs."""

_requests_in_flight = 0
"""Number of requests of the main thread to the supervisor whose answers have not arrived."""

_asking: set[int] = set()
"""Identifiers of the threads that complete the requests of coroutines."""


def interrupt_on_sigterm(ti: RuntimeTaskInstance, is_ordered: Callable[[], bool] | None = None) -> None:
    """
    Have SIGTERM end a task of this process from now on.

    Does nothing in another thread than the main one, which alone gets signals.

    :param ti: the ``RuntimeTaskInstance``. Its ``task`` may be replaced by a mapped one later.
    :param is_ordered: called when ``execute()`` has failed; returns whether SIGTERM is on its way.
    """
    global _current  # one per process, like the signal handlers
    if threading.current_thread() is threading.main_thread():
        _current = Interruption(ti, _current, is_ordered)
        signal.signal(signal.SIGTERM, handle_sigterm)


def restore_outer(outer: Interruption | None) -> None:
    """Have SIGTERM end the outer task again, if it has run another task in its own process."""
    global _current
    _current = outer or _current


def handle_sigterm(signum: int, frame: FrameType | None) -> None:
    """Pass SIGTERM on to the task that runs."""
    if _current is not None:
        _current.handle(signum, frame)


def run_interruptibly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    Run ``call``, which is ``execute()``, so that SIGTERM interrupts it.

    :raises TaskInterrupted: if the task was told to stop before ``call`` had returned, however it ended.
    """
    return run_until(Phase.FINISHED, call, *args, **kwargs)


def prepare_interruptibly(call: Callable[..., Any], *args: Any) -> Any:
    """
    Run ``call``, which is ``pre_execute()``, so that SIGTERM interrupts it.

    :raises TaskInterrupted: if the task was told to stop before ``call`` had returned, however it ended.
    """
    return run_until(Phase.PREPARING, call, *args)


def run_until(after: Phase, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a part of the task, which has come so far when that has returned."""
    if _current is None or threading.current_thread() is not threading.main_thread():
        return call(*args, **kwargs)
    return _current.run(after, call, *args, **kwargs)


def trigger_interruptibly(
    fail: Callable[[BaseException], tuple[Any, Any]], trigger: Callable[..., tuple[Any, Any]], *args: Any
) -> tuple[Any, Any, BaseException | None]:
    """
    Trigger another Dag's run, and wait for its end, so that SIGTERM interrupts it.

    ``TriggerDagRunOperator.execute()`` leaves both to the runner, by an exception. The runner's other clauses
    do not see what is raised while it handles that one.

    :param fail: makes a failure of the exception; returns the message to the supervisor, and the state.
    :param trigger: triggers and waits; returns the same.
    :return: message, state, and the exception if the task was told to stop.
    """
    try:
        return (*run_interruptibly(trigger, *args), None)
    except TaskInterrupted as error:
        log.exception("Task failed with exception")
        return (*fail(error), error)


def uninterrupted(method: _Method) -> _Method:
    """Put off an interruption until a method that sends a request has its answer; a decorator."""

    @functools.wraps(method)
    def complete(*args: Any, **kwargs: Any) -> Any:
        allow_waiting(*args[:1])
        with request_in_flight():
            return method(*args, **kwargs)

    return complete  # type: ignore[return-value]


def allow_waiting(comms: Any = None) -> None:
    """
    Have a request wait for that of a coroutine that has been cancelled, or whose task was told to stop.

    From SDK 1.3 on ``send()`` refuses to, in the thread of the event loop. But ask_in_thread() needs no loop to
    complete that one. Nobody knows when the answer to a cancelled one comes, and an ``on_kill`` or a ``finally``
    block cannot choose its moment.
    """
    if not hasattr(comms, "_loop_thread_id"):
        return
    told_to_stop = _current is not None and _current.is_requested
    given_up = _asking and not comms._async_lock.locked()
    if told_to_stop or given_up:
        comms._loop_thread_id = None


async def ask_in_thread(send: Callable[[Any], Any], msg: object) -> Any:
    """
    Send a request of a coroutine in a thread, which completes it, whatever becomes of the coroutine and its loop.

    A coroutine that is cancelled, or whose loop stops, would leave the lock of the socket taken, and the answer unread.
    """
    loop = sys.modules["asyncio"].get_running_loop()
    with request_in_flight():  # nor may the interruption come while the thread starts
        answer = loop.run_in_executor(None, contextvars.copy_context().run, ask, send, msg)
    return await answer


def ask(send: Callable[[Any], Any], msg: object) -> Any:
    """Send a request in a thread of its own, which ``_asking`` has meanwhile."""
    thread = threading.get_ident()
    _asking.add(thread)
    try:
        return send(msg)
    finally:
        _asking.discard(thread)


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
    """Allow interruptions of the main thread again; interrupt it now if a signal has arrived meanwhile."""
    global _requests_in_flight
    if threading.current_thread() is threading.main_thread() and _requests_in_flight:
        _requests_in_flight -= 1
        if _current is not None:
            _current.deliver()


def report_state(send: Callable[..., Any], msg: object, error: BaseException | None) -> None:
    """
    Tell the supervisor how a task has ended; to be called by the runner.

    :param error: the exception that has ended ``execute()``, if any.
    :raises SystemExit: if the task was interrupted because the server has ended it: no callback may run.
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
    Raise an exception in the main thread. If an event loop runs in it, cancel the loop's tasks.

    There are three cases:

    1. No loop runs: raise.
    2. The loop itself runs, between two steps: cancel all tasks, and raise nothing.
    3. A step of a coroutine runs: do both. The exception ends only that coroutine, for which nobody may be
       waiting; only SystemExit and KeyboardInterrupt would end the loop.

    :raises AirflowTaskTerminated: in cases 1 and 3.
    """
    loop = find_running_loop()
    if loop is not None:
        loop.call_soon_threadsafe(cancel_all, loop)
        if sys.modules["asyncio"].current_task(loop) is None:
            return
    raise AirflowTaskTerminated(REASON)


def find_running_loop() -> AbstractEventLoop | None:
    """Return the event loop that runs in this thread, None if none does."""
    # If there is a loop, asyncio has been imported.
    loop: AbstractEventLoop | None = None
    if asyncio := sys.modules.get("asyncio"):
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
    return loop


def cancel_all(loop: AbstractEventLoop) -> None:
    """Cancel all tasks of an event loop."""
    for task in sys.modules["asyncio"].all_tasks(loop):
        task.cancel()


def is_writing(frame: FrameType | None) -> bool:
    """Whether this thread, which is in a frame, writes a log or output that an interruption must not cut short."""
    return is_writing_log(frame) or is_writing_output()


def is_writing_log(frame: FrameType | None) -> bool:
    """Whether a frame, or one of its callers, holds the lock of a log's file, or logs what is wrong in an event loop."""
    while frame is not None:
        if frame.f_globals.get("__name__") == LOG_WRITER or is_complaint(frame):
            return True
        frame = frame.f_back
    return False


def is_complaint(frame: FrameType) -> bool:
    """Whether asyncio logs in a frame what has gone wrong in an event loop."""
    return (frame.f_globals.get("__name__"), frame.f_code.co_name) == COMPLAINT


def is_writing_output() -> bool:
    """Return whether this thread is in a write to stdout or stderr, whose buffer it may not enter again."""
    for stream in (sys.stdout, sys.stderr):
        buffer = None
        with contextlib.suppress(Exception):  # a task may have put anything in its place
            buffer = stream.buffer
        if isinstance(buffer, (io.BufferedWriter, io.BufferedRandom)):
            try:
                with contextlib.suppress(ValueError):  # it is closed
                    buffer.write(b"")
            except RuntimeError:
                return True
    return False


def signal_soon(task: Interruption) -> None:
    """Send SIGTERM to this process in a moment, unless the task has ended by then."""

    def send() -> None:
        time.sleep(SIGNAL_DELAY)
        if task.is_executing:
            os.kill(os.getpid(), signal.SIGTERM)

    # Not threading.Thread: a finalizer runs anywhere, even while threading's locks are held.
    _thread.start_new_thread(send, ())


def drop_handler() -> None:
    """Have SIGTERM end this process, a forked child of a runner, which would otherwise ignore it."""
    if signal.getsignal(signal.SIGTERM) is handle_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=drop_handler)
