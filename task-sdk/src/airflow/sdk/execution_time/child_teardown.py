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
End what a task has left running, once its own process has ended by force or in failure.

The runner goes first: it and its ``on_kill`` have the whole grace period of the kill. What is there after it
gets SIGTERM, and SIGCONT so that a stopped process can act on it. What is left when the grace ends is stopped,
looked for again until nothing new appears, for a process that forks while it dies is missed otherwise, and
killed. A task that succeeds keeps what it has left running.

The sockets are served throughout, so that the last lines of the task and its children arrive in its log, and the server
gets heartbeats, so that it does not start a retry beside what is being ended.

Nothing here imports Airflow outside this package.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from airflow.sdk.execution_time.child_exit import MAX_DRAIN_READS, SOCKET_GRACE
from airflow.sdk.execution_time.child_policy import (
    LeftoverPolicy,
    find_grace,
    find_leftover_policy,
    find_spared_names,
    limit_grace,
)
from airflow.sdk.execution_time.child_requests import STATE_REPORTS, handle_request
from airflow.sdk.execution_time.child_session import signal_task
from airflow.sdk.execution_time.child_status import (
    find_reported_state,
    has_reported,
    is_refused,
    is_unreaped_child,
    settle_exit_code,
)
from airflow.sdk.execution_time.child_stop import hear_stop_signal, signal_pid
from airflow.sdk.execution_time.child_tree import Process, ProcessTree, group_by_owner, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from configparser import ConfigParser

__all__ = [
    "configure_tree",
    "end_leftovers",
    "end_on_exception",
    "end_unless_started",
    "handle_request_of_tree",
    "prepare_kill",
    "signal_tree",
]

log = structlog.get_logger(logger_name="supervisor")

MAX_GRACE_UNASKED = 60.0
"""Seconds for what a task has left that nobody has asked to end, however long the grace of a kill is."""

RETRY_TOLD_GRACE = 1.0
"""Seconds for what a task has left whose retry the server may start at any moment, as it was told of it already."""

FAILURES = ("failed", "up_for_retry")
"""States that a task reports itself, and exits with 0, after an exception."""

STOP_TIME = 0.2
"""Seconds that the processes of a task have to stop before the SIGKILL of a kill() is sent."""

KILL_TIME = 0.8
"""Seconds after the grace in which everything has to be dead."""

KILL_WAIT = 0.2
"""Seconds that killed processes have to disappear before the next look."""

LAST_LOOKS = 3
"""Looks for what was started meanwhile, when everything has to be dead."""

LOOK_INTERVAL = 0.5
"""Seconds between looks for what leftovers start while they end."""

LEFTOVER_TRIES = 2
"""A signal handler that raises, as that of Celery's soft time limit, may cut the first one short."""

POLL_INTERVAL = 0.02
"""Seconds between looks at a process that cannot be watched."""

HEARTBEAT_INTERVAL = 5.0
"""Seconds between heartbeats while leftovers end, as long as none has failed: one to a server that is away takes long."""

NAMED_IN_LOG = 100
"""At most this many processes are listed in the task's log; the count is always complete."""


def prepare_kill(process: Any, grace: float, conf: ConfigParser) -> float:
    """
    Note that the task is being killed, and what belongs to it while its runner can still be asked.

    If the runner was already reaped elsewhere, finish here. kill() would otherwise poll a PID that may have been reused,
    or take the refused signal to mean that everything has ended.

    :param process: a ``WatchedSubprocess``.
    :param grace: seconds between the signals, as the caller of ``kill()`` wants it. Where the server has ended the task,
        what the deployment has set counts instead.
    :param conf: Airflow's configuration.
    :returns: the seconds that hold.
    """
    if process._new_session:
        grace = find_grace(conf, default=grace) if process._stop.server_ended else limit_grace(grace)
        configure_tree(process._tree, conf)
        process._tree.remember()
    process._exit_watch.expect_exit(grace)
    if process._new_session and not is_unreaped_child(process.pid):
        process._exit_code = end_leftovers(process, settle_exit_code(process, None), conf)
    return grace


def configure_tree(tree: ProcessTree, conf: ConfigParser) -> None:
    """Tell a tree what the deployment has chosen."""
    tree.spared = find_spared_names(conf)
    tree.ends = find_leftover_policy(conf).ends_what_is_killed


def signal_tree(process: Any, sig: int) -> bool:
    """
    Send a signal to a task, if it has a session: to its group, else to its runner, through sudo if need be.

    SIGKILL goes to all that belongs to the task. Its processes are stopped before, and looked for once more: what a process
    has started since the last look, and moved out of reach, could not be told for the task's when that process is dead.

    :param process: a ``WatchedSubprocess``.
    :returns: False if the caller has to signal the PID itself.
    """
    if not process._new_session:
        return False
    if process._exit_code is not None:  # settled by prepare_kill()
        return True
    tree = process._tree
    if sig == signal.SIGKILL and tree.ends:
        tree.kill_all(STOP_TIME, with_leader=True)
    elif sig != signal.SIGKILL:
        # A descendant that has lost its mark can only be found while its parent is alive.
        tree.remember()
    if tree.spared and tree.signal_group(sig):
        return True
    return bool(signal_task(process, sig) or tree.signal_leader(sig))


def handle_request_of_tree(process: Any, msg: Any, *args: Any, **kwargs: Any) -> None:
    """Note who belongs to a task that reports how it ends, then ``handle_request()``: its runner ends soon."""
    if process._new_session and type(msg).__name__ in STATE_REPORTS:
        process._tree.remember()
    handle_request(process, msg, *args, **kwargs)


def end_leftovers(process: Any, exit_code: int | None, conf: ConfigParser) -> int | None:
    """
    End what a task has left behind, if it did not end well; to be called with the exit code just collected.

    Returns the exit code, within a second after the grace period has ended at the latest.

    :param process: a ``WatchedSubprocess``. One that leads no session of its own has nothing ended.
    :param exit_code: None if the runner's status is not known, in which case nothing is ended.
    :param conf: Airflow's configuration.
    """
    if exit_code is not None and process._new_session:
        # Serving the sockets below asks for the exit code again, which can be collected only once.
        process._exit_code = exit_code
        for _ in range(LEFTOVER_TRIES):
            try:
                if not ended_well(process, exit_code):
                    heed_policy(process, exit_code, conf)
                break
            except Exception:
                # The state is still to be told: without it the task counts as running until the heartbeat timeout.
                log.exception("What a task has left running could not be ended", pid=process.pid)
    return exit_code


def ended_well(process: Any, exit_code: int) -> bool:
    """Whether a task whose runner has exited may keep what it has left running."""
    if not has_reported(process):
        hear_out(process)
    if process._stop.server_ended or is_refused(process):
        return False
    state = find_reported_state(process)
    if state is None:
        return exit_code == 0 and not process._exit_watch.exit_expected
    # A state that was told stands, whatever exit code follows: a crash in an atexit hook, a kill for overtime.
    return state not in FAILURES


def hear_out(process: Any) -> None:
    """Handle what a runner had said before it exited; that of 1.0.0 to 1.0.2 waits for no answer when it reports."""
    for _ in range(MAX_DRAIN_READS):
        if process.selector.get_map() is None or not process.selector.select(0):
            break
        serve_sockets(process, 0)


def heed_policy(process: Any, exit_code: int, conf: ConfigParser) -> None:
    """End leftovers, or report them, or leave them alone, as the deployment has chosen."""
    policy = find_leftover_policy(conf)
    killed = process._exit_watch.exit_expected or exit_code < 0
    if policy is LeftoverPolicy.NEVER or (policy is LeftoverPolicy.KILLED and not killed):
        return
    configure_tree(process._tree, conf)
    if policy is LeftoverPolicy.REPORT:
        report_left(process, process._tree.find())
        return
    teardown = Teardown(process, conf, find_deadline(process, conf))
    teardown.terminate()
    survivors = teardown.kill()
    report(process, survivors)
    process._exit_watch.unfollow(process.selector)
    # Any socket still open is held by a process that we cannot reach. If there are survivors, close the sockets now.
    process._exit_watch.expect_exit(-SOCKET_GRACE if survivors else 0)


def find_deadline(process: Any, conf: ConfigParser) -> float:
    """Return when the grace of leftovers ends, by time.monotonic()."""
    grace = min(find_grace(conf), MAX_GRACE_UNASKED)
    if find_reported_state(process) == "up_for_retry" and is_told(process):
        grace = min(grace, RETRY_TOLD_GRACE)
    return float(process._exit_watch.grace_ends(default=grace))


def is_told(process: Any) -> bool:
    """Whether the server knows the state that the task has reported. From 1.4 on it is told of a retry at the very end."""
    return getattr(process, "_pending_terminal_state_msg", None) is None


class Teardown:
    """One task's leftovers on their way to their end."""

    def __init__(self, process: Any, conf: ConfigParser, deadline: float) -> None:
        self._process = process
        self._tree: ProcessTree = process._tree
        self._conf = conf
        self._deadline = deadline

    def terminate(self) -> None:
        """Ask leftovers, and what they start meanwhile, to end, until nothing is left or the grace is over."""
        asked: set[Process] = set()
        while time.monotonic() < self._deadline:
            members = self._tree.find()
            if not members and self._tree.look_failure:
                # Nobody was seen, which does not mean that nobody is there.
                serve_sockets(self._process, POLL_INTERVAL)
                continue
            if not members:
                return
            fresh = [member for member in members if member not in asked]
            # Its runner is gone, by which nobody could tell the tree of a dead supervisor from what a success has left.
            self._tree.condemn(fresh)
            self._tree.signal(fresh, signal.SIGTERM, signal.SIGCONT, deadline=self._deadline)
            asked.update(fresh)
            self._wait_for(members, LOOK_INTERVAL)

    def kill(self) -> list[Process]:
        """Kill leftovers until nothing is left; return those that are there all the same when the time is up."""
        self._deadline = max(self._deadline, time.monotonic()) + KILL_TIME
        while members := self._tree.kill_all(
            max(0, self._deadline - KILL_WAIT - time.monotonic()), deadline=self._deadline
        ):
            self._wait_for(members, KILL_WAIT)
            if time.monotonic() >= self._deadline:
                members = self._kill_fresh(members)
                break
        # A look that could not be taken has found nobody.
        suspects = self._tree.ended if self._tree.look_failure else members
        return [member for member in suspects if is_alive(member)]

    def _kill_fresh(self, members: Sequence[Process]) -> list[Process]:
        """Kill what members that had not come to stop have started since they were found; return all of them."""
        found = list(members)
        # On a machine that is busy, those may have started something themselves before they were killed.
        for _ in range(LAST_LOOKS):
            fresh = [member for member in self._tree.find() if member not in found]
            if not fresh:
                break
            self._tree.signal(fresh, signal.SIGKILL)
            self._deadline = time.monotonic() + POLL_INTERVAL
            self._wait_for(fresh, POLL_INTERVAL)
            found += fresh
        return found

    def _wait_for(self, members: Sequence[Process], seconds: float) -> None:
        """Serve the task's sockets until all members have ended, or some seconds have passed, or the time is up."""
        ends = time.monotonic() + seconds
        # Whoever was signalled last ends last, and all others are gone by then.
        for member in reversed(members):
            watched = self._process._exit_watch.follow(self._process.selector, member.pid)
            while is_alive(member) and (left := min(ends, self._deadline) - time.monotonic()) > 0:
                serve_sockets(self._process, left if watched else min(left, POLL_INTERVAL))
                self._hurry_if_told_to_stop()
        # It may have taken the last file descriptor, which the next look needs.
        self._process._exit_watch.close(self._process.selector)

    def _hurry_if_told_to_stop(self) -> None:
        """End the grace when the supervisor is told to stop: whoever has told it may kill it soon."""
        if hear_stop_signal(self._process, self._conf):
            self._deadline = min(self._deadline, time.monotonic())


def serve_sockets(process: Any, seconds: float) -> None:
    """Handle what the task and its children say within some seconds, or until the process that is watched ends."""
    try:
        process._service_subprocess(max_wait_time=min(seconds, HEARTBEAT_INTERVAL))
    except Exception:
        # A request can fail in any way, as when the API is down, and must not keep alive who has made it.
        log.exception("What a task that is being ended has said could not be handled.")
        time.sleep(min(seconds, POLL_INTERVAL))
    send_heartbeat_if_due(process)


def send_heartbeat_if_due(process: Any) -> None:
    """Tell the server that the task has not ended yet: it would start a retry beside what is left of this try."""
    now = time.monotonic()
    if (
        process._stop.server_ended
        or process.failed_heartbeats
        or (process._stop.heartbeat is not None and process._stop.heartbeat.is_alive())
        # A task that the server has not let start has none.
        or not process._last_successful_heartbeat
        or now - max(process._last_heartbeat_attempt, process._last_successful_heartbeat) < HEARTBEAT_INTERVAL
    ):
        return
    process._last_heartbeat_attempt = now
    beat_in_background(process)


def beat_in_background(process: Any) -> None:
    """Send a heartbeat from a thread: while the server is away its tries take longer than what is left of a grace."""
    process._stop.heartbeat = threading.Thread(target=send_heartbeat, args=(process,), daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be had
        process._stop.heartbeat.start()


def send_heartbeat(process: Any) -> None:
    """Send a heartbeat, and note if it has failed."""
    try:
        process.client.task_instances.heartbeat(process.id, pid=process.pid)
    except Exception as error:  # as in the supervisor's own loop, and none is sent any more
        process.failed_heartbeats += 1
        log.info("The server takes no heartbeat of a task that is being ended", error=str(error))


@contextlib.contextmanager
def end_on_exception(process: Any, conf: ConfigParser) -> Iterator[None]:
    """
    End a task whose supervisor cannot go on: an exception leaves its loop, and nobody would watch the task.

    It has the grace of a kill, then its whole tree is killed, then the exception goes on. Among those that were seen are
    an API server that is away, a log that cannot be written, and the soft time limit of Celery.
    """
    try:
        yield
    except BaseException as error:
        grace = min(find_grace(conf), MAX_GRACE_UNASKED)
        configure_tree(process._tree, conf)
        process._exit_watch.expect_exit(grace)
        with contextlib.suppress(Exception):  # the log may be what has failed
            process.process_log.error("Stopping the task: its supervisor has failed", error=repr(error))
        try:
            end_runner(process, time.monotonic() + grace)
        finally:
            # A second exception, which has cut that short, must not leave anything either.
            kill_runner(process)
            end_leftovers(process, process._exit_code, conf)
        raise


def end_runner(process: Any, deadline: float) -> None:
    """Ask the task to end, and serve it until it has, or the time is up. Its leftovers end with it."""
    if process._exit_code is None and not signal_tree(process, signal.SIGTERM):
        signal_pid(process.pid)
    while process._exit_code is None and (left := deadline - time.monotonic()) > 0:
        serve_sockets(process, left)


def kill_runner(process: Any) -> None:
    """Kill the task, unless it has ended."""
    deadline = time.monotonic() + KILL_TIME
    if process._exit_code is None and not signal_tree(process, signal.SIGKILL):
        signal_pid(process.pid, signal.SIGKILL)
    while process._exit_code is None and (left := deadline - time.monotonic()) > 0:
        serve_sockets(process, left)


@contextlib.contextmanager
def end_unless_started() -> Iterator[ProcessTree]:
    """
    Yield an empty tree for a process that is going to be a task; if it does not become one, kill its tree.

    The process itself is for the caller to end. It has no ``on_kill`` yet that its children could be waiting for.
    """
    tree = ProcessTree()
    try:
        yield tree
    except BaseException:
        deadline = time.monotonic() + KILL_TIME
        # Once in any case, however long this process did not get to run.
        while tree.kill_all(max(0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_INTERVAL)
        raise


def report(process: Any, survivors: list[Process]) -> None:
    """Say in the task's log what was ended, and what could not be."""
    tree = process._tree
    gone = {member: sig for member, sig in tree.ended.items() if member not in survivors}
    tree.ended.clear()
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
            reason=explain_survival(survivors, tree.sudo_failures),
        )
    if tree.look_failure:
        process.process_log.error(
            "Processes that the task may have left running could not be looked for",
            reason=tree.look_failure,
        )


def report_left(process: Any, left: Sequence[Process]) -> None:
    """Say in the task's log what would be ended if the deployment had chosen so."""
    if left:
        process.process_log.warning(
            "The task has left processes running, which [workers] leftover_policy spares",
            count=len(left),
            processes=name_processes(left),
        )


def name_processes(processes: Sequence[Process]) -> list[dict[str, Any]]:
    """Return what the log tells of processes: never a command line, which may hold secrets."""
    return [{"pid": process.pid, "name": process.name} for process in processes[:NAMED_IN_LOG]]


def explain_survival(survivors: Sequence[Process], sudo_failures: Mapping[int, str]) -> str:
    """Return why processes are still there."""
    failures = [sudo_failures[uid] for uid in group_by_owner(survivors) if uid in sudo_failures]
    if not failures:
        return "they did not end after SIGKILL"
    return (
        f"they belong to another user, and the sudoers must permit `sudo -n kill`, which said: {failures[0]}"
    )
