"""Somebody presses Ctrl-C at the terminal in which `airflow standalone` runs."""

from __future__ import annotations

import shlex
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from tests.e2e.deployment import Airflow, is_api_ready, make_home
from tests.e2e.outcomes import SLOTS_TIMEOUT, Outcome, Scenario, judge_slots, name_left
from tests.e2e.runs import PROCESSES, start_run
from tests.e2e.servers import wait_until
from tests.e2e.terminals import CTRL_C, open_terminal
from tests.harness.processes import wait_for_exit
from tests.harness.supervised import ENDS_TASK_ON_SIGTERM, SETTLE_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.deployment import Executor, Installation
    from tests.e2e.terminals import Terminal

STOP_TIMEOUT = 20.0
"""Seconds in which `airflow standalone` ends, or never: then somebody presses Ctrl-C again."""
PRESSES = 3
# What would serve logs listens on every address of the machine.
AIRFLOW = """#!/bin/sh
case $1 in
scheduler | triggerer) exec {python} -m airflow "$@" --skip-serve-logs ;;
*) exec {python} -m airflow "$@" ;;
esac
"""


def interrupt(installation: Installation, executor: Executor) -> Outcome:
    """Press Ctrl-C while tasks run, and see what is left of these, and whether the terminal is usable."""
    with (
        make_home(installation, executor) as (folder, env, client),
        open_terminal("standalone", folder=folder, env=env) as terminal,
    ):
        settings = terminal.read_settings()
        command = write_command(folder, installation)
        terminal.type(f"PATH={command.parent}:$PATH airflow standalone\n")
        wait_until(lambda: is_api_ready(client), terminal.shell, what="the API server answers")
        client.log_in()
        airflow = Airflow(installation, executor, folder, client, terminal.shell, [terminal.shell])
        with start_run(airflow) as run:
            terminal.type(CTRL_C)
            seconds = run.wait_for_slots(SLOTS_TIMEOUT)
            # The API ends at the same moment, and supervisors try for some seconds to reach it.
            problems = [*judge_slots(seconds, due=SLOTS_TIMEOUT), *judge_terminal(terminal, settings)]
            wait_for_exit(run.list_left(), SETTLE_TIMEOUT)
            left = run.list_left()
            return Outcome(
                started=sum(PROCESSES.values()) + len(PROCESSES),
                left=left,
                seconds=seconds,
                states=read_states(folder),
                problems=[*problems, *name_left(run.find_left())],
                ends=run.ends,
            )


def write_command(folder: Path, installation: Installation) -> Path:
    """Return the `airflow` that `airflow standalone` is, and runs its servers by."""
    command = folder / "bin" / "airflow"
    command.parent.mkdir()
    command.write_text(AIRFLOW.format(python=shlex.quote(str(installation.environment.python))))
    command.chmod(0o755)
    return command


def judge_terminal(terminal: Terminal, settings: list[object]) -> Iterator[str]:
    """Say in what the terminal is not as it was before the command."""
    if not has_ended(terminal):
        yield f"`airflow standalone` has not ended after {PRESSES} times Ctrl-C"
    elif not terminal.answers():
        yield "the shell does not answer"
    if terminal.read_settings() != settings:
        yield "the terminal's settings are not what they were"


def has_ended(terminal: Terminal) -> bool:
    """Return whether the command has ended, and press Ctrl-C again while it has not.

    It sends its servers SIGTERM when the terminal has just sent them SIGINT, and a scheduler whose end that interrupts
    waits for ever for the idle processes of its LocalExecutor.
    """
    for _ in range(1, PRESSES):
        if terminal.wait_for_shell(STOP_TIMEOUT):
            return True
        terminal.type(CTRL_C)
    return terminal.wait_for_shell(STOP_TIMEOUT)


def read_states(folder: Path) -> dict[str, str | None]:
    """Return the states in the database. The API has ended with the tasks, which may not have reached it any more."""
    with closing(sqlite3.connect(folder / "airflow" / "airflow.db")) as database:
        return dict(database.execute("SELECT task_id, state FROM task_instance ORDER BY task_id"))


SCENARIOS = (
    Scenario(
        "interrupted",
        "Ctrl-C at the terminal of `airflow standalone`",
        ("local",),
        interrupt,
        releases=ENDS_TASK_ON_SIGTERM,
        shows_fault=True,
    ),
)
