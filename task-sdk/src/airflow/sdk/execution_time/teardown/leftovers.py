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
End the processes that a task has left running, once its own process has been killed or has failed.

1. The runner goes first: it and its ``on_kill`` have the whole grace period of the kill.
2. Its leftovers get SIGTERM, and SIGCONT so that a stopped process can act on it.
3. When the grace period ends, the supervisor stops the leftovers that are still there. It looks again until
   nothing new appears, because it would otherwise miss a process that forks while it dies.
4. It kills them all.

A task that succeeds keeps the processes that it has left running.

Meanwhile the supervisor serves the sockets, so that the last lines of the task and its children arrive in the
task's log. It also sends heartbeats, so that the server does not start a retry beside the leftovers.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from airflow.sdk.execution_time.teardown.ending import KILL_TIME, POLL_INTERVAL, Ending
from airflow.sdk.execution_time.teardown.exit_event import MAX_DRAIN_READS
from airflow.sdk.execution_time.teardown.exit_status import (
    FAILURES,
    find_reported_state,
    find_sent_state,
    has_reported,
    is_server_terminated,
    is_unreaped_child,
    settle_exit_code,
)
from airflow.sdk.execution_time.teardown.policy import (
    LeftoverPolicy,
    find_grace,
    find_leftover_policy,
    find_spared_names,
    limit_grace,
)
from airflow.sdk.execution_time.teardown.process_tree import ProcessTree
from airflow.sdk.execution_time.teardown.processes import Process, is_alive, look_at
from airflow.sdk.execution_time.teardown.session import signal_task
from airflow.sdk.execution_time.teardown.stop_request import (
    HEARTBEAT_INTERVAL,
    StoppableProcess,
    StoppableTask,
    hear_stop_signal,
    is_task,
    send_heartbeat_if_due,
    server_knows_state,
    signal_pid,
)
from airflow.sdk.execution_time.teardown.sudo import group_by_owner
from airflow.sdk.execution_time.teardown.task_requests import STATE_REPORTS, handle_request

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Set as AbstractSet
    from configparser import ConfigParser

    import typing_extensions
    from structlog.typing import FilteringBoundLogger


log = structlog.get_logger(logger_name="supervisor")

MAX_GRACE_UNASKED = 60.0
"""Upper bound on the seconds of grace if nobody has asked the task to end, whatever the option says."""

RETRY_TOLD_GRACE = 1.0
"""Seconds of grace if the server knows already of a retry, which it may start at any moment."""

SIGSTOP_WAIT = 0.2
"""Seconds that kill() waits for the processes of a task to stop before it sends SIGKILL."""

LEFTOVER_TRIES = 2
"""A signal handler that raises, like that of Celery's soft time limit, may interrupt the first try."""

NAMED_IN_LOG = 100
"""At most this many processes are listed in the task's log; the count is always complete."""


class ProcessWithTree(StoppableProcess, Protocol):
    """A supervised process, and the processes that it has started: none if it is not that of a task."""

    _tree: ProcessTree


class TaskWithTree(StoppableTask, ProcessWithTree, Protocol):
    """The process of a task, and the processes that it has started."""


def has_tree(process: ProcessWithTree) -> typing_extensions.TypeGuard[TaskWithTree]:
    """Whether a process leads a tree, which only the process of a task does."""
    return is_task(process)


def prepare_kill(process: ProcessWithTree, grace: float, conf: ConfigParser) -> float:
    """
    Note that the task is being killed, and record its processes while its runner is not yet reaped.

    If the runner was already reaped elsewhere, finish here. kill() would otherwise poll a PID that may have been reused,
    or take the refused signal to mean that everything has ended.

    :param process: a ``WatchedSubprocess``.
    :param grace: seconds between the signals, as the caller of ``kill()`` wants it. If the server has ended
        the task, the deployment's setting counts instead.
    :param conf: Airflow's configuration.
    :returns: the seconds to use.
    """
    if has_tree(process):
        grace = find_grace(conf, default=grace) if process._stop.server_ended else limit_grace(grace)
        configure_task(process, conf)
        process._tree.remember()
    process._exit_watch.expect_exit(grace)
    if has_tree(process) and not is_unreaped_child(process.pid):
        process._exit_code = end_leftovers(process, settle_exit_code(process, None), conf)
    return grace


def configure_task(process: TaskWithTree, conf: ConfigParser) -> None:
    """Tell the tree of a task, and what signals the task, what the deployment has chosen."""
    configure_tree(process._tree, conf)
    process._stop.spares_group_members = bool(process._tree.spared)


def configure_tree(tree: ProcessTree, conf: ConfigParser) -> None:
    """Tell a tree what the deployment has chosen."""
    tree.spared = find_spared_names(conf)
    tree.ends_leftovers = find_leftover_policy(conf).ends_what_is_killed


def signal_tree(process: ProcessWithTree, sig: int) -> bool:
    """
    Send a signal to a task, if it has a session: to its group, else to its runner, through sudo if need be.

    SIGKILL goes to all processes of the task, unless it has reported that it ended well, and only its runner
    still runs. They are first stopped, and looked for once more. Without that, a child that one of them has
    just started and moved out of reach would be lost: once its parent is dead, nothing shows that the child is
    the task's.

    :param process: a ``WatchedSubprocess``.
    :returns: False if the caller has to signal the PID itself.
    """
    if not has_tree(process):
        return False
    if process._exit_code is not None:  # settled by prepare_kill()
        return True
    process._stop.sigkill_sent |= sig == signal.SIGKILL
    tree = process._tree
    if sig == signal.SIGKILL and tree.ends_leftovers and not has_sent_good_state(process):
        tree.kill_all(SIGSTOP_WAIT, with_leader=True)
    elif sig != signal.SIGKILL:
        # A descendant that has lost its mark can only be found while its parent is alive.
        tree.remember()
    if tree.spared and tree.leader:
        # Its group may contain programs to spare.
        signalled = tree.signal_group(sig) or tree.signal_leader(sig)
    else:
        signalled = signal_task(process, sig) or tree.signal_leader(sig)
    if sig == signal.SIGTERM and is_stopped(process.pid):
        tree.signal_leader(signal.SIGCONT)
    return signalled


def is_stopped(runner: int) -> bool:
    """Whether a runner, a child of ours, is stopped; it heeds no signal before it is continued."""
    with contextlib.suppress(OSError):
        now = look_at(runner)
        return now is not None and now.stopped and now.start >= 0 and is_unreaped_child(runner)
    return False


def handle_request_of_tree(
    process: ProcessWithTree, msg: object, log: FilteringBoundLogger, *request_id: int
) -> None:
    """Handle a request. If it reports the task's end, record the members first: the runner exits soon."""
    if has_tree(process) and type(msg).__name__ in STATE_REPORTS:
        process._tree.remember()
    handle_request(process, msg, log, *request_id)


def end_leftovers(process: ProcessWithTree, exit_code: int | None, conf: ConfigParser) -> int | None:
    """
    End the processes that a task has left behind, unless it succeeded.

    To be called with the exit code just collected. Returns it, a second after the grace period at the latest.

    :param process: a ``WatchedSubprocess``. If it leads no session of its own, nothing is ended.
    :param exit_code: None if the runner's status is not known; then nothing is ended.
    :param conf: Airflow's configuration.
    """
    if exit_code is not None and has_tree(process):
        # Serving the sockets below asks for the exit code again, which can be collected only once.
        process._exit_code = exit_code
        for _ in range(LEFTOVER_TRIES):
            try:
                if not ended_well(process, exit_code):
                    heed_policy(process, exit_code, conf)
                break
            except Exception:
                # Go on: the state is still to be reported. Without it the task counts as running until the
                # heartbeat timeout.
                log.exception("Failed to end the processes that the task left running", pid=process.pid)
    return exit_code


def ended_well(process: TaskWithTree, exit_code: int) -> bool:
    """Whether a task whose runner has exited may keep the processes that it has left running."""
    if not has_reported(process):
        hear_out(process)
    if find_sent_state(process) is not None:
        # It stands, whatever exit code follows: a crash in an atexit hook, a kill for overtime.
        return has_sent_good_state(process)
    return exit_code == 0 and not process._exit_watch.exit_expected and not is_ended_by_server(process)


def has_sent_good_state(process: TaskWithTree) -> bool:
    """Whether a task has sent a state that is no failure, and the server has not ended it."""
    return not is_ended_by_server(process) and find_sent_state(process) not in (None, *FAILURES)


def is_ended_by_server(process: TaskWithTree) -> bool:
    """Whether the server has said that the task is not to run any more."""
    return process._stop.server_ended or is_server_terminated(process)


def hear_out(process: TaskWithTree) -> None:
    """Handle the messages of a runner that has exited: one of 1.0.0 to 1.0.2 does not wait for answers."""
    for _ in range(MAX_DRAIN_READS):
        if process.selector.get_map() is None or not process.selector.select(0):
            break
        serve_sockets(process, 0)


def heed_policy(process: TaskWithTree, exit_code: int, conf: ConfigParser) -> None:
    """End leftovers, or report them, or leave them alone, as the deployment has chosen."""
    policy = find_leftover_policy(conf)
    killed = process._exit_watch.exit_expected or exit_code < 0
    if policy is LeftoverPolicy.NEVER or (policy is LeftoverPolicy.KILLED and not killed):
        return
    configure_task(process, conf)
    if policy is LeftoverPolicy.REPORT:
        report_left(process, process._tree.find())
        return
    teardown = Teardown(process, conf, find_deadline(process, conf))
    teardown.terminate()
    survivors = teardown.kill()
    report(process, survivors)
    process._exit_watch.unfollow(process.selector)
    process._exit_watch.expect_exit(0)
    if survivors:
        # They may hold the sockets.
        process._exit_watch.give_up_sockets()


def find_deadline(process: TaskWithTree, conf: ConfigParser) -> float:
    """Return when the grace period of leftovers ends, by time.monotonic()."""
    grace = min(find_grace(conf), MAX_GRACE_UNASKED)
    if find_reported_state(process) == "up_for_retry" and server_knows_state(process):
        grace = min(grace, RETRY_TOLD_GRACE)
    return process._exit_watch.grace_ends(default=grace)


class Teardown(Ending):
    """Ends the leftovers of one task, and serves its sockets meanwhile."""

    with_leader = False

    def __init__(self, process: TaskWithTree, conf: ConfigParser, deadline: float) -> None:
        super().__init__([process._tree], deadline)
        self._process = process
        self._conf = conf

    def wait_for(self, members: Sequence[Process], seconds: float) -> None:
        """Serve the task's sockets until all members have ended, for ``seconds`` or until the time is up."""
        ends = time.monotonic() + seconds
        # Begin with the one that was signalled last: when it has ended, most others have, too.
        for member in reversed(members):
            watched = self._process._exit_watch.follow(self._process.selector, member.pid)
            while is_alive(member) and (left := min(ends, self._deadline) - time.monotonic()) > 0:
                self.pause(left if watched else min(left, POLL_INTERVAL))
        # It may have taken the last file descriptor, which the next look needs.
        self._process._exit_watch.close(self._process.selector)

    def pause(self, seconds: float) -> None:
        """Serve the task's sockets; end the grace period if the supervisor is told to stop."""
        serve_sockets(self._process, seconds)
        # Whoever stops the supervisor may soon kill it. But the signal that has ended the task does not end
        # this period as well.
        if (
            self._in_grace
            and hear_stop_signal(self._process, self._conf)
            and not self._process._stop.sigterm_sent
        ):
            self._deadline = min(self._deadline, time.monotonic())


def serve_sockets(process: TaskWithTree, seconds: float) -> None:
    """Serve the task's sockets for some seconds, or until the process that is watched ends."""
    try:
        process._service_subprocess(max_wait_time=min(seconds, HEARTBEAT_INTERVAL))
    except Exception:
        # A request can fail in any way, as when the API is down. That must not keep the process alive that
        # has made it.
        log.exception("Failed to handle a message of a task that is being ended")
        time.sleep(min(seconds, POLL_INTERVAL))
    send_heartbeat_if_due(process)


@contextlib.contextmanager
def end_on_exception(process: TaskWithTree, conf: ConfigParser) -> Iterator[None]:
    """
    End a task whose supervisor cannot go on: an exception leaves its loop, and nobody would watch the task.

    The task has the grace period of a kill. Then its whole tree is killed, and the exception is raised again.
    Known causes are an API server that is away, a log that cannot be written, and the soft time limit of
    Celery.
    """
    # A signal to the supervisor may be the first that the task gets.
    configure_task(process, conf)
    try:
        yield
    except BaseException as error:
        grace = min(find_grace(conf), MAX_GRACE_UNASKED)
        process._exit_watch.expect_exit(grace)
        with contextlib.suppress(Exception):  # the log may be what has failed
            process.process_log.error("Stopping the task: its supervisor has failed", error=repr(error))
        try:
            end_runner(process, signal.SIGTERM, grace)
        finally:
            # A second exception may have interrupted that. It must not leave processes either.
            end_runner(process, signal.SIGKILL, KILL_TIME)
            end_leftovers(process, process._exit_code, conf)
        raise


def end_runner(process: TaskWithTree, sig: int, seconds: float) -> None:
    """Send a signal to the task, and serve it until it and its leftovers have ended, or the time is up."""
    deadline = time.monotonic() + seconds
    if process._exit_code is None and not signal_tree(process, sig):
        signal_pid(process.pid, sig)
    while process._exit_code is None and (left := deadline - time.monotonic()) > 0:
        serve_sockets(process, left)


@contextlib.contextmanager
def end_unless_started() -> Iterator[ProcessTree]:
    """
    Yield an empty tree for a process that is going to be a task; if it does not become one, kill its tree.

    The caller ends the process itself. It has no ``on_kill`` yet, so its children need no grace period.
    """
    tree = ProcessTree()
    try:
        yield tree
    except BaseException:
        deadline = time.monotonic() + KILL_TIME
        # Do it once in any case, even if this process did not get to run for a long time.
        while tree.kill_all(max(0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_INTERVAL)
        raise


def report(process: TaskWithTree, survivors: list[Process]) -> None:
    """Say in the task's log which processes were ended, and which could not be."""
    tree = process._tree
    there = set(survivors)
    gone = {member: sig for member, sig in tree.end_signals.items() if member not in there}
    killed = {member for member, sig in tree.end_signals.items() if sig == "SIGKILL"}
    tree.end_signals.clear()
    if gone:
        process.process_log.warning(
            "Ended processes that the task had left running",
            count=len(gone),
            processes=[
                {"pid": member.pid, "name": member.name, "signal": sig}
                for member, sig in list(gone.items())[:NAMED_IN_LOG]
            ],
        )
    if survivors:
        process.process_log.error(
            "Processes of the task could not be ended",
            count=len(survivors),
            processes=name_processes(survivors),
            reason=explain_survival(survivors, killed, tree.sudo_failures),
        )
    report_failed_look(process)


def report_failed_look(process: TaskWithTree) -> None:
    """Say in the task's log that the last look for processes has failed, if so."""
    if process._tree.look_failure:
        process.process_log.error(
            "Processes that the task may have left running could not be looked for",
            reason=process._tree.look_failure,
        )


def report_left(process: TaskWithTree, left: Sequence[Process]) -> None:
    """Say in the task's log which processes leftover_policy has spared."""
    if left:
        process.process_log.warning(
            "The task has left processes running, which [workers] leftover_policy spares",
            count=len(left),
            processes=name_processes(left),
        )
    report_failed_look(process)


def name_processes(processes: Sequence[Process]) -> list[dict[str, Any]]:
    """Return what the log says about processes: never a command line, which may contain secrets."""
    return [{"pid": process.pid, "name": process.name} for process in processes[:NAMED_IN_LOG]]


def explain_survival(
    survivors: Sequence[Process], killed: AbstractSet[Process], sudo_failures: Mapping[int, str]
) -> str:
    """
    Return why processes are still there.

    :param killed: those that have got SIGKILL.
    """
    failures = [sudo_failures[uid] for uid in group_by_owner(survivors) if uid in sudo_failures]
    if failures:
        return (
            "they belong to another user, and the sudoers must permit `sudo -n kill`, which said: "
            f"{failures[0]}"
        )
    if killed.isdisjoint(survivors):
        return "they were sent no SIGKILL, because no look has found them since SIGTERM"
    return "they did not end after SIGKILL"
