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

The sockets are served throughout, so that the last lines of the task and its children arrive in its log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from configparser import Error as ConfigError
from configparser import RawConfigParser
from typing import TYPE_CHECKING, Any

import structlog

from airflow.sdk.execution_time.child_exit import MAX_DRAIN_READS, SOCKET_GRACE
from airflow.sdk.execution_time.child_session import signal_task
from airflow.sdk.execution_time.child_status import (
    find_reported_state,
    is_unreaped_child,
    settle_exit_code,
)
from airflow.sdk.execution_time.child_tree import Process, ProcessTree, group_by_owner, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from configparser import ConfigParser

__all__ = ["end_leftovers", "end_unless_started", "prepare_kill", "signal_tree"]

log = structlog.get_logger(logger_name="supervisor")

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL unless the deployment sets them; what kill() has as its default."""

GRACE_OPTION = ("core", "killed_task_cleanup_time")

GRACE_VARIABLE = "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME"
"""Without _CMD or _SECRET after it, which serve options that are secret."""

MAX_GRACE_UNASKED = 60.0
"""Seconds for what a task has left that nobody has asked to end: no heartbeat is sent meanwhile."""

FAILURES = ("failed", "up_for_retry")
"""States that a task reports itself, and exits with 0, after an exception."""

MIN_GRACE = 0.05
MAX_GRACE = 7 * 24 * 3600.0
"""Seconds; select() takes no infinite timeout, and none much longer."""

STOP_TIME = 0.2
"""Seconds that the processes of a task have to stop before the SIGKILL of a kill() is sent to its runner."""

KILL_TIME = 0.8
"""Seconds after the grace in which everything has to be dead."""

KILL_WAIT = 0.2
"""Seconds that killed processes have to disappear before the next look."""

POLL_INTERVAL = 0.02
"""Seconds between looks at a process that cannot be watched."""

NAMED_IN_LOG = 100
"""Processes that the task's log names; their number it tells always."""


def prepare_kill(process: Any, grace: float, conf: ConfigParser) -> float:
    """
    Note that the task is being killed, and what belongs to it while its runner can still be asked.

    If somebody else has collected the runner, it is settled here: asking for it can go on for as long as another
    process has its number, and signalling it is refused, which kill() takes for the end of all.

    :param process: a ``WatchedSubprocess``.
    :param grace: seconds between the signals, as the caller of ``kill()`` wants it.
    :param conf: Airflow's configuration.
    :returns: the seconds that hold.
    """
    if process._new_session:
        grace = find_grace(conf) if grace == GRACE else limit_grace(grace)
        process._tree.remember()
    process._exit_watch.expect_exit(grace)
    if process._new_session and not is_unreaped_child(process.pid):
        process._exit_code = end_leftovers(process, settle_exit_code(process, None), conf)
    return grace


def signal_tree(process: Any, sig: int) -> bool:
    """
    Send a signal of ``kill()`` to a task, if it has a session: to that, else to its runner, through sudo if need be.

    Before SIGKILL all that belongs to the task is stopped and looked for once more: what a process has started
    since the last look, and moved out of reach, could not be told for the task's when that process is dead.

    :param process: a ``WatchedSubprocess``.
    :returns: False if the caller has to signal the PID itself.
    """
    if not process._new_session:
        return False
    if process._exit_code is not None:  # settled by prepare_kill()
        return True
    if sig == signal.SIGKILL:
        process._tree.stop(STOP_TIME, with_leader=True)
    return bool(signal_task(process, sig) or process._tree.signal_leader(sig))


def find_grace(conf: ConfigParser) -> float:
    """
    Return the seconds between SIGTERM and SIGKILL: GRACE, or ``[core] killed_task_cleanup_time`` where it is set.

    Its documented default is 60, which no supervisor before 3.4 heeds, so that only a value of the deployment counts.
    """
    if not is_grace_set(conf):
        return GRACE
    try:
        return limit_grace(float(conf.get(*GRACE_OPTION)))
    except (TypeError, ValueError, ConfigError) as error:
        # A task must end also where somebody has mistyped how.
        log.warning(
            "[core] killed_task_cleanup_time is not a number of seconds.", error=str(error), used=GRACE
        )
        return GRACE


def limit_grace(grace: float) -> float:
    """Return a grace that kill() can wait for: in no time at all it would not collect what it has killed."""
    return min(max(MIN_GRACE, grace), MAX_GRACE)


def is_grace_set(conf: ConfigParser) -> bool:
    """Whether the deployment sets the option, in the file or in the environment."""
    # Not conf.has_option(), which knows the defaults, too.
    return RawConfigParser.has_option(conf, *GRACE_OPTION) or GRACE_VARIABLE in os.environ


def end_leftovers(process: Any, exit_code: int | None, conf: ConfigParser) -> int | None:
    """
    End what a task has left behind, if it did not end well; to be called with the exit code just collected.

    Returns the exit code, within a second after the grace period has ended at the latest.

    :param process: a ``WatchedSubprocess``. One that leads no session of its own has nothing ended.
    :param exit_code: None if the runner's status is not known, in which case nothing is ended.
    :param conf: Airflow's configuration.
    """
    if exit_code is None or not process._new_session:
        return exit_code
    # Serving the sockets below asks for the exit code again, which can be collected only once.
    process._exit_code = exit_code
    if exit_code == 0 and ended_well(process):
        return exit_code
    deadline = process._exit_watch.grace_ends(default=min(find_grace(conf), MAX_GRACE_UNASKED))
    ended: dict[Process, str] = {}
    terminate(process, deadline, ended)
    survivors = kill(process, max(deadline, time.monotonic()) + KILL_TIME, ended)
    report(process, ended, survivors)
    process._exit_watch.unfollow(process.selector)
    # Sockets that are open still are held by somebody beyond reach. With survivors that is certain, and time is up.
    process._exit_watch.expect_exit(-SOCKET_GRACE if survivors else 0)
    return exit_code


def ended_well(process: Any) -> bool:
    """Whether a task whose runner has exited with 0 may keep what it has left running."""
    watch = process._exit_watch
    if find_reported_state(process) is None:
        hear_out(process)
    state = find_reported_state(process)
    if state is None:
        # A signal that was forwarded has ended it, if there was one; a task that goes on reports how it ends.
        return not watch.exit_expected
    return not watch.kill_expected and state not in FAILURES


def hear_out(process: Any) -> None:
    """Handle what a runner had said before it exited; that of 1.0.0 to 1.0.2 waits for no answer when it reports."""
    for _ in range(MAX_DRAIN_READS):
        if process.selector.get_map() is None or not process.selector.select(0):
            break
        serve_sockets(process, 0)


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
        while members := tree.stop(max(0, deadline - time.monotonic())):
            tree.signal(members, signal.SIGKILL)
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_INTERVAL)
        raise


def terminate(process: Any, deadline: float, ended: dict[Process, str]) -> None:
    """Ask leftovers, and what they start meanwhile, to end, until nothing is left or the grace is over."""
    while time.monotonic() < deadline and (members := process._tree.find()):
        fresh = [member for member in members if member not in ended]
        process._tree.signal(fresh, signal.SIGTERM, signal.SIGCONT)
        ended.update(dict.fromkeys(fresh, signal.SIGTERM.name))
        wait_for(process, members, deadline)


def kill(process: Any, deadline: float, ended: dict[Process, str]) -> list[Process]:
    """Kill leftovers until nothing is left; return those that are there at the deadline all the same."""
    while members := process._tree.stop(max(0, deadline - KILL_WAIT - time.monotonic())):
        process._tree.signal(members, signal.SIGKILL)
        ended.update(dict.fromkeys(members, signal.SIGKILL.name))
        wait_for(process, members, min(deadline, time.monotonic() + KILL_WAIT))
        if time.monotonic() >= deadline:
            members = kill_fresh(process, members, ended)
            break
    # A look that could not be taken has found nobody.
    suspects = ended if process._tree.look_failure else members
    return [member for member in suspects if is_alive(member)]


def kill_fresh(process: Any, members: Sequence[Process], ended: dict[Process, str]) -> list[Process]:
    """Kill what members that had not come to stop have started since they were found; return all of them."""
    if fresh := [member for member in process._tree.find() if member not in members]:
        process._tree.signal(fresh, signal.SIGKILL)
        ended.update(dict.fromkeys(fresh, signal.SIGKILL.name))
        wait_for(process, fresh, time.monotonic() + POLL_INTERVAL)
    return [*members, *fresh]


def wait_for(process: Any, members: Sequence[Process], deadline: float) -> None:
    """Serve the task's sockets until all members have ended, or the deadline has come."""
    # Whoever was signalled last ends last, and all others are gone by then.
    for member in reversed(members):
        watched = process._exit_watch.follow(process.selector, member.pid)
        while is_alive(member) and (left := deadline - time.monotonic()) > 0:
            serve_sockets(process, left if watched else min(left, POLL_INTERVAL))
    # It may have taken the last file descriptor, which the next look needs.
    process._exit_watch.close(process.selector)


def serve_sockets(process: Any, seconds: float) -> None:
    """Handle what the task and its children say within some seconds, or until the process that is watched ends."""
    try:
        process._service_subprocess(max_wait_time=seconds)
    except Exception:
        # A request can fail in any way, as when the API is down, and must not keep alive who has made it.
        log.exception("What a task that is being ended has said could not be handled.")
        time.sleep(min(seconds, POLL_INTERVAL))


def report(process: Any, ended: dict[Process, str], survivors: list[Process]) -> None:
    """Say in the task's log what was ended, and what could not be."""
    gone = {member: sig for member, sig in ended.items() if member not in survivors}
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
            processes=[{"pid": member.pid, "name": member.name} for member in survivors[:NAMED_IN_LOG]],
            reason=explain_survival(survivors, process._tree.sudo_failures),
        )
    if process._tree.look_failure:
        process.process_log.error(
            "Processes that the task may have left running could not be looked for",
            reason=process._tree.look_failure,
        )


def explain_survival(survivors: Sequence[Process], sudo_failures: Mapping[int, str]) -> str:
    """Return why processes are still there."""
    failures = [sudo_failures[uid] for uid in group_by_owner(survivors) if uid in sudo_failures]
    if not failures:
        return "they did not end after SIGKILL"
    return (
        f"they belong to another user, and the sudoers must permit `sudo -n kill`, which said: {failures[0]}"
    )
