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
Stop a task when its supervisor was told to stop, and log who has asked for the task's end.

Neither Ctrl-C nor the broadcast of an init such as dumb-init reaches a task in a session of its own, so its
supervisor has to tell it to stop. The supervisor's signal handler logs nothing and takes no lock. It notes
the signal. If the loop is busy with a request, and the deployment wants the task stopped, the handler also
sends SIGTERM to the task. Python writes a byte to a *wakeup descriptor* for each signal
(``signal.set_wakeup_fd``). Ours is a socket that the supervisor's selector watches, so the loop does the
rest. Two things must not happen:

- A handler that logs can wait for ever for the logger's lock, which the interrupted code may hold.
- A wakeup descriptor that was inherited, for example from an asyncio loop, reports our signals to the
  parent's loop, which never got them: https://github.com/apache/airflow/issues/65830.

Nothing here imports Airflow outside this package, but for ``heed_refusal()``, which imports the supervisor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from airflow.sdk.execution_time.teardown.exit_event import unregister
from airflow.sdk.execution_time.teardown.exit_status import (
    find_reported_state,
    find_untold_message,
    is_unreaped_child,
)
from airflow.sdk.execution_time.teardown.policy import (
    GRACE,
    STOP_GRACE,
    StopPolicy,
    find_grace,
    find_stop_policy,
)
from airflow.sdk.execution_time.teardown.session import lead_session, signal_task
from airflow.sdk.execution_time.teardown.supervised import TaskProcess, WatchedProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from configparser import ConfigParser
    from types import FrameType

    import typing_extensions

    from airflow.sdk.api.client import ServerResponseError
    from airflow.sdk.execution_time.teardown.exit_event import ExitWatch


log = structlog.get_logger(logger_name="supervisor")

STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
"""
Signals that tell a supervisor to stop: dumb-init, Kubernetes and Celery send SIGTERM, a terminal the others.
Windows, where this is only imported, lacks two of them.

The task gets SIGTERM for each of them, because SIGINT would end its runner without ``on_kill``.
"""

HEARTBEAT_INTERVAL = 5.0
"""Seconds between heartbeats of a task that is being ended."""

CONFLICT = 409
"""The status of the API's answer about a task that is not to run any more."""

ENDED_STATUSES = (404, CONFLICT, 410)
"""The server's answers about a task that is not to run any more, or that it does not know."""

STATES_TOLD_AT_ONCE = ("success", "deferred", "up_for_reschedule", "up_for_retry", "awaiting_input")
"""States of which the server hears when the task reports them, and not when its process has ended."""

KILL_INTERVAL = 60.0
"""Seconds between SIGKILLs for a task that has not ended: we may not signal it, or it is in the kernel (state D)."""

RUNNER_FAILED = 124
"""Exit status of a forked runner that could not begin, as upstream has it."""


class StopRequest:
    """The state of a request to end a task: who has asked, what was sent, and when the task is killed."""

    def __init__(self) -> None:
        self.server_ended = False
        """Whether the API server has answered that the task is not to run any more."""
        self.kill_at: float | None = None
        """When to kill a task that was told to stop, by time.monotonic(); None outside its grace period."""
        self.sigkill_sent = False
        """Whether the supervisor itself has sent SIGKILL, so that the log does not blame a lack of memory."""
        self.signal_heard = False
        """Whether a signal to the supervisor was logged. A second signal changes nothing."""
        self.sigterm_sent = False
        """Whether the task was told to stop for the signal: by the handler, or by the loop, but once."""
        self.spares_group_members = False
        """Whether the task's group may have processes that the deployment spares, so that the group gets no signal."""
        self.heartbeat: threading.Thread | None = None
        """The thread that has sent the last heartbeat of a task that is being ended."""
        self.heartbeat_sent_at = 0.0
        """When it was sent, by time.monotonic()."""
        self.refusal: ServerResponseError | None = None
        """The server's answer to such a heartbeat that the task is not to run any more."""


class StoppableProcess(WatchedProcess, Protocol):
    """A supervised process, with what ``kill()`` has to know of it."""

    _exit_watch: ExitWatch
    _new_session: bool
    """Whether the process leads a session. Only a task does: then this is a :class:`StoppableTask`."""
    _stop: StopRequest


class StoppableTask(TaskProcess, StoppableProcess, Protocol):
    """The process of a task, with who has asked for its end."""

    @property
    def _stop_policy(self) -> StopPolicy:
        """What a signal to the supervisor means, unless the deployment has chosen."""


def is_task(process: StoppableProcess) -> typing_extensions.TypeGuard[StoppableTask]:
    """Whether a process leads a session, which only the process of a task does."""
    return process._new_session


class _CaughtSignals:
    """The stop signals that this process has received since it began to supervise."""

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None
        self.received_at = 0.0
        """By time.monotonic()."""
        self.on_signal: Callable[[], None] | None = None
        """Called at the first signal, and again before sockets are served."""
        self.is_heard = False
        """Whether a task has been told of the signal, or its log has."""
        self.is_sent_again = False
        """Whether a signal that reached no task is raised again afterwards, as after a task that it would have stopped."""
        self._pid = os.getpid()
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)

    def handle(self, signum: int, _frame: object) -> None:
        """Take note. Do not log or lock: the interrupted code may hold any lock."""
        if os.getpid() != self._pid:
            # A runner that was just forked, and has not reached begin_runner(). End it, as the signal
            # would do a moment later.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self.signum is None:
            self.signum = signal.Signals(signum)
            self.received_at = time.monotonic()
            if self.on_signal is not None:
                self.on_signal()

    def wake(self) -> None:
        """Wake the loop if a signal has come; the loop of another task may have read the byte that does so."""
        if self.signum is not None:
            with contextlib.suppress(BlockingIOError):
                self.writer.send(b"\0")

    def repeat(self) -> None:
        """Call ``on_signal`` if a signal has come: at that moment it may have relied on the loop."""
        if self.signum is not None and self.on_signal is not None:
            self.on_signal()

    def send_again(self) -> None:
        """Have the signal reach the former handler if it came too late for a task, while its state was told."""
        if self.signum is not None and self.is_sent_again and not self.is_heard:
            signal.raise_signal(self.signum)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


_caught: _CaughtSignals | None = None
"""The signals of the main thread, to which alone Python delivers any; None while it supervises nothing."""


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[None]:
    """
    Take note of stop signals for the duration, and then restore the former handlers.

    A signal that comes when the task to stop has ended is sent again after that. A signal that is ignored
    stays ignored: Celery's pool and LocalExecutor ignore SIGINT, so that Ctrl-C lets their tasks finish. This
    does nothing if it is nested, or in a thread other than the main one, which cannot set handlers.
    """
    global _caught  # one per process, like the signal handlers
    if _caught is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as restoring:
        caught = _CaughtSignals()
        restoring.callback(caught.send_again)
        restoring.callback(caught.close)
        former_descriptor = signal.set_wakeup_fd(caught.writer.fileno(), warn_on_full_buffer=False)
        restoring.callback(restore_wakeup_descriptor, former_descriptor)
        handler = caught.handle
        for signum in STOP_SIGNALS:
            former = signal.getsignal(signum)
            if former != signal.SIG_IGN:
                # Register the callback first: the former handler may still be called, and raise, in
                # signal.signal().
                restoring.callback(restore_handler, signum, former)
                signal.signal(signum, handler)
        _caught = caught
        restoring.callback(forget_caught)
        yield


_masks = threading.local()
"""The signal mask of a thread that forks, from before."""


def hold_stop_signals() -> None:
    """
    Block the stop signals for a fork.

    A child that is signalled before it runs would lose the signal: Python calls the C handler first, and then
    clears what it has noted (``PyOS_AfterFork_Child()``). Blocked, the signal stays pending until
    :func:`release_stop_signals`.
    """
    if _caught is not None:
        # Read the mask first: this call runs pending signal handlers, and one that raises would lose the result.
        _masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release_stop_signals() -> None:
    """Restore the signal mask from before the fork, in the parent and in the child."""
    former = getattr(_masks, "former", None)
    if former is not None:
        _masks.former = None
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=hold_stop_signals,
        after_in_parent=release_stop_signals,
        after_in_child=release_stop_signals,
    )


def find_caught() -> _CaughtSignals | None:
    """Return the caught signals of this thread; None if it catches none."""
    return _caught if threading.current_thread() is threading.main_thread() else None


def forget_caught() -> None:
    """Forget the caught signals, when they are no longer caught."""
    global _caught
    _caught = None


def restore_wakeup_descriptor(descriptor: int) -> None:
    """Restore the former wakeup descriptor; -1 if it has been closed since, as an inherited one may be."""
    try:
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    except (OSError, ValueError):
        signal.set_wakeup_fd(-1)


def restore_handler(
    signum: int, handler: Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
) -> None:
    """Restore the result of ``signal.getsignal()``. None stands for a handler of C code, which is lost."""
    signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def watch_stop_signals(process: StoppableTask, conf: ConfigParser) -> Iterator[None]:
    """Catch stop signals, and have them wake the selector of ``process``, for the duration."""
    with catch_stop_signals():
        caught = find_caught()
        if caught is None:
            yield
            return
        process.selector.register(caught.reader, selectors.EVENT_READ)
        caught.wake()
        if find_stop_policy(conf, process._stop_policy) is StopPolicy.STOP:
            caught.on_signal = functools.partial(tell_if_busy, process, find_grace(conf, default=STOP_GRACE))
            process._exit_watch.before_handlers = caught.repeat
            caught.is_sent_again = True
        try:
            yield
        finally:
            process._exit_watch.before_handlers = None
            caught.on_signal = None
            if process._stop.sigterm_sent:
                # The task may have ended before the loop could log the signal.
                hear_stop_signal(process, conf)
            unregister(process.selector, caught.reader)


def tell_if_busy(process: StoppableTask, grace: float) -> None:
    """
    Tell the task to stop at once if the loop is not waiting.

    The loop may be in a request to an API server that is away, which it retries for a minute and more. The
    signal handler calls this, so it must neither log nor take a lock.
    """
    if not process._exit_watch.is_waiting and process._exit_code is None and not process._stop.sigterm_sent:
        process._exit_watch.announce_exit(grace, least=min(grace, GRACE))
        spares = process._stop.spares_group_members
        # A task of another user may be out of reach. Then the loop tells it, through sudo.
        process._stop.sigterm_sent = (not spares and signal_task(process, signal.SIGTERM)) or signal_pid(
            process.pid
        )
        signal_pid(process.pid, signal.SIGCONT)  # if it is stopped, it is to hear of it


def begin_runner(*steps: Callable[[], object]) -> None:
    """
    Begin as a forked runner: drop the supervisor's signal handlers, lead a session, take further steps.

    Never raises, but ends the process instead. This process is a copy of the supervisor, so an exception
    would reach the supervisor's code, which would go on as a second worker.
    """
    try:
        drop_stop_handlers()
        lead_session()
        for step in steps:
            step()
    except BaseException:  # SystemExit of an inherited handler among them
        with contextlib.suppress(BaseException):  # stderr may be closed; the process exits either way
            traceback.print_exc()
        os._exit(RUNNER_FAILED)


def drop_stop_handlers() -> None:
    """Have stop signals end this process, a forked copy of a supervisor, and close the copies of its descriptors."""
    signal.set_wakeup_fd(-1)
    if _caught is not None:
        _caught.close()
    for signum in STOP_SIGNALS:
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    forget_caught()


def heed_stop_signals(
    process: StoppableTask,
    conf: ConfigParser,
    send: Callable[[StoppableTask, int], bool] = signal_task,
) -> None:
    """
    If the supervisor was told to stop, tell the task, and kill it when its grace period is over.

    To be called in the loop.

    :param send: sends a signal to the task; returns False if we have to signal the PID alone.
    """
    request = process._stop
    if request.kill_at is not None:
        heed_refusal(process)
        if time.monotonic() >= request.kill_at:
            request.kill_at = None
            process._exit_watch.wake_at(None)
            process.kill(signal.SIGKILL, force=True)
            if process._exit_code is None:
                # Nobody else sends the heartbeats of a task that still runs, or tries again.
                request.kill_at = time.monotonic() + KILL_INTERVAL
                process._exit_watch.wake_at(request.kill_at)
        else:
            put_off_heartbeat(process)
    elif process._exit_code is not None:
        if hear_stop_signal(process, conf):
            # Others hold the sockets of a task that has ended, and whoever has sent the signal will not wait for them.
            process._exit_watch.give_up_sockets()
    elif hear_stop_signal(process, conf):
        put_off_heartbeat(process)
        request.kill_at = find_kill_time(find_grace(conf, default=STOP_GRACE))
        process._exit_watch.expect_exit(request.kill_at - time.monotonic())
        process._exit_watch.wake_at(request.kill_at)
        if not request.sigterm_sent:
            request.sigterm_sent = True
            if not send(process, signal.SIGTERM):
                signal_pid(process.pid)


def find_kill_time(grace: float) -> float:
    """
    Return when the grace period of the signal that has come ends, by time.monotonic().

    The loop may have been in a request for all of it. Meanwhile a task that logs, prints, or has sent a
    request waits for the loop, and cannot run its ``on_kill``.
    """
    now = time.monotonic()
    caught = find_caught()
    return max((caught.received_at if caught else now) + grace, now + min(grace, GRACE))


def put_off_heartbeat(process: StoppableTask) -> None:
    """Send heartbeats from a thread instead of the loop: if the server is away, one may take longer than the grace."""
    send_heartbeat_if_due(process)
    process._last_heartbeat_attempt = math.inf


def send_heartbeat_if_due(process: StoppableTask) -> None:
    """Tell the server that the task has not ended yet, or it would start a retry beside what is left."""
    request = process._stop
    if (
        request.server_ended
        or request.refusal is not None
        or refuses_heartbeats(process)
        or (request.heartbeat is not None and request.heartbeat.is_alive())
        # The server has not let the task start.
        or not process._last_successful_heartbeat
        or time.monotonic() - max(request.heartbeat_sent_at, process._last_successful_heartbeat)
        < HEARTBEAT_INTERVAL
    ):
        return
    request.heartbeat_sent_at = time.monotonic()
    beat_in_background(process)


def beat_in_background(process: StoppableTask) -> None:
    """Send a heartbeat from a thread."""
    process._stop.heartbeat = threading.Thread(target=send_heartbeat, args=(process,), daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be had
        process._stop.heartbeat.start()


def send_heartbeat(process: StoppableTask) -> None:
    """Send a heartbeat, and note if it was refused."""
    try:
        process.client.task_instances.heartbeat(process.id, pid=process.pid)
    except Exception as error:  # as in the supervisor's own loop; the next one may succeed
        if is_refusal(error):
            process._stop.refusal = error
        log.info("Heartbeat failed for a task that is being ended", error=str(error))
    else:
        process._last_successful_heartbeat = time.monotonic()


def refuses_heartbeats(process: StoppableTask) -> bool:
    """Whether the server refuses heartbeats because of the state that the task has reported."""
    return find_reported_state(process) in STATES_TOLD_AT_ONCE and server_knows_state(process)


def server_knows_state(process: StoppableTask) -> bool:
    """Whether the server knows the state that the task has reported; from 1.4 on it hears of a retry last."""
    return find_untold_message(process) is None


def is_refusal(error: Exception) -> typing_extensions.TypeGuard[ServerResponseError]:
    """Whether an error is the API server's answer that a task is not to run any more."""
    # The error page of a proxy has no detail.
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in ENDED_STATUSES and hasattr(error, "detail")


def heed_refusal(process: StoppableTask) -> None:
    """
    If the server has refused a heartbeat of a thread, take the task as ended by the server, as the loop does.

    To be called before a state that the task reports is handled. Afterwards the server refuses heartbeats
    because of this state.
    """
    request = process._stop
    if request.refusal is not None and not request.server_ended and process._terminal_state is None:
        note_server_ended(process, request.refusal)
        # That module imports this one. The value is not the same in all releases.
        supervisor = importlib.import_module("airflow.sdk.execution_time.supervisor")
        process._terminal_state = supervisor.SERVER_TERMINATED


def hear_stop_signal(process: StoppableTask, conf: ConfigParser) -> bool:
    """Log a new stop signal in both logs; return whether the supervisor is to stop its task."""
    caught = find_caught()
    signum = caught.signum if caught else None
    if caught is None or signum is None or process._stop.signal_heard:
        return False
    process._stop.signal_heard = caught.is_heard = True
    policy = find_stop_policy(conf, process._stop_policy)
    stops = policy is StopPolicy.STOP
    what_now = "stopping the task" if stops else "it lets the task finish"
    event = f"The supervisor was told to stop; {what_now}"
    log.info(event, signal=signum.name, pid=process.pid)
    (process.process_log.warning if stops else process.process_log.info)(event, signal=signum.name)
    return stops


def signal_pid(pid: int, sig: int = signal.SIGTERM) -> bool:
    """
    Send a signal to a runner that leads no group, unless it was reaped: its PID may have been reused.

    :returns: whether it was sent.
    """
    # kill(2): 0 is our own group, 1 is init, and -1 is every process.
    if pid > 1 and is_unreaped_child(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, sig)
            return True
    return False


def note_server_ended(process: StoppableTask, error: ServerResponseError) -> None:
    """
    Say in the task's log what the API server answered to its heartbeat.

    :param error: the client's ``ServerResponseError``, with the ``response`` and its ``detail``.
    """
    process._stop.server_ended = True
    detail = find_detail(error.detail)
    process.process_log.warning(
        "Stopping the task: the API server does not want it to run any more",
        status=error.response.status_code,
        reason=detail.get("reason"),
        state=detail.get("current_state"),
    )


def find_detail(detail: object) -> dict[str, Any]:
    """Return the part of an answer with reason and state, which some releases nest; empty if none."""
    if isinstance(detail, dict):
        nested = detail.get("detail")
        return nested if isinstance(nested, dict) else detail
    return {}


def note_failed_heartbeats(process: StoppableTask, error: Exception | None = None) -> None:
    """Say in the task's log how many heartbeats have failed in a row, and the last error, if it is known."""
    process.process_log.error(
        "Stopping the task: too many heartbeats in a row have failed",
        failed_heartbeats=process.failed_heartbeats,
        last_error=repr(error) if error else None,
    )


def note_overtime(process: StoppableTask) -> None:
    """Say in the task's log for how long its process has run on since the task ended."""
    process.process_log.warning(
        "Ending the task's process: it still runs long after the task has ended",
        seconds=round(time.monotonic() - (process._task_end_time_monotonic or 0)),
        limit="[core] task_success_overtime",
    )
