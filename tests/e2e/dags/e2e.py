"""What the scenarios run: tasks that start processes of every kind, and tasks that end in every way.

Runs in the environment of a release, on Python 3.9 and newer. The run's `conf` has a `cookie`, the path of a FIFO, `ready`,
on which every process that was started announces itself, and a `folder` for what on_kill has to say, with another FIFO,
`word`, for the task that waits for it.
"""

from __future__ import annotations

import datetime as dt
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.python import ExternalPythonOperator
from airflow.providers.standard.triggers.temporal import DateTimeTrigger
from airflow.sdk import DAG, BaseOperator, task
from tests.harness.shapes import ACTOR, BY_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

COOKIE = "{{ dag_run.conf['cookie'] }}.{{ ti.task_id }}.{{ ti.try_number }}"
READY = "{{ dag_run.conf['ready'] }}"

ON_KILL_TIME = 2.0
"""Seconds that the operator's on_kill takes."""
FAR_FUTURE = dt.datetime(2100, 1, 1, tzinfo=dt.timezone.utc)
LONG = 3600.0


def announce(context: Mapping[str, Any]) -> None:
    """Announce a task that starts no process."""
    with Path(context["dag_run"].conf["ready"]).open("a") as ready:
        ready.write(f"{os.getpid()}\n")


def become_actor(python: str, *arguments: str) -> None:
    """Replace the interpreter that an operator has started by one whose command line has the cookie."""
    import os  # noqa: PLC0415  # the source of this function is all that gets into a virtualenv

    os.execv(python, [python, "-I", "-S", *arguments])  # noqa: S606


def start_actor(context: Mapping[str, Any], role: str, **options: Any) -> subprocess.Popen[bytes]:
    conf, ti = context["dag_run"].conf, context["ti"]
    task = ti.task_id if ti.map_index < 0 else ti.map_index
    cookie = f"{conf['cookie']}.{task}.{ti.try_number}"
    return subprocess.Popen([sys.executable, "-I", "-S", str(ACTOR), role, cookie, conf["ready"]], **options)


class CleansUpSlowly(BaseOperator):
    """An operator whose on_kill takes its time, and counts on its child until then."""

    child: subprocess.Popen[bytes]
    record: Path

    def execute(self, context: Any) -> NoReturn:
        self.record = Path(context["dag_run"].conf["folder"]) / f"on_kill.{context['ti'].try_number}"
        self.child = start_actor(context, "sleeper", start_new_session=True)
        self.child.wait()
        raise RuntimeError("The child has ended.")

    def on_kill(self) -> None:
        self.write("began")
        time.sleep(ON_KILL_TIME)
        # Without reaping it: execute() is in the middle of that, and holds the lock of poll().
        gone = os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        self.write("found its child gone" if gone else "done")
        self.child.terminate()

    def write(self, word: str) -> None:
        with self.record.open("a") as record:
            record.write(f"{word}\n")


class RemovesItsWork(BaseOperator):
    """An operator whose on_kill removes the work, and whose execute() then returns as if the work were done."""

    work: subprocess.Popen[bytes]

    def execute(self, context: Any) -> None:
        self.work = start_actor(context, "sleeper", start_new_session=True)
        self.work.wait()

    def on_kill(self) -> None:
        self.work.terminate()


class Defers(BaseOperator):
    def execute(self, context: Any) -> NoReturn:
        self.defer(trigger=DateTimeTrigger(moment=FAR_FUTURE), method_name="execute")


with DAG("starts_processes", schedule=None):
    BashOperator(
        task_id="bash", bash_command=f"exec {shlex.join(BY_NAME['pipeline'].command)} {COOKIE} {READY}"
    )

    ExternalPythonOperator(
        task_id="external_python",
        python=sys.executable,
        python_callable=become_actor,
        op_args=[sys.executable, str(ACTOR), "parent", COOKIE, READY],
    )

    task.virtualenv(become_actor, task_id="virtualenv", system_site_packages=False)(
        sys.executable, str(ACTOR), "parent", COOKIE, READY
    )

    @task
    def children(**context: Any) -> NoReturn:
        """Start children, and fail when one ends."""
        plain = start_actor(context, "sleeper")
        start_actor(context, "deaf")
        start_actor(context, "sleeper", start_new_session=True)
        silent = subprocess.DEVNULL
        start_actor(context, "sleeper", stdin=silent, stdout=silent, stderr=silent)
        plain.wait()
        raise RuntimeError("A child has ended.")

    children()

    CleansUpSlowly(task_id="cleans_up")

    RemovesItsWork(task_id="removes_its_work")

    @task
    def sleeps(**context: Any) -> None:
        """Do what most tasks do: start nothing, and know nothing of signals."""
        announce(context)
        time.sleep(LONG)

    sleeps()


with DAG("ends_itself", schedule=None):

    @task
    def succeeds() -> None:
        """End well."""

    @task
    def fails() -> NoReturn:
        """End in failure."""
        raise RuntimeError("This task fails on purpose.")

    @task.sensor(mode="reschedule", poke_interval=LONG, timeout=2 * LONG)
    def is_rescheduled() -> bool:
        """Ask to be called later."""
        return False

    succeeds()
    fails()
    is_rescheduled()
    Defers(task_id="defers")


with DAG("waits", schedule=None):

    @task
    def waits(**context: Any) -> None:
        """End well when the word is given."""
        announce(context)
        with (Path(context["dag_run"].conf["folder"]) / "word").open() as word:
            word.readline()

    waits()


with DAG("many_tasks", schedule=None):

    @task
    def many(number: int, **context: Any) -> None:
        """End at once, or, every third, start two children, and fail when one ends."""
        if number % 3:
            return
        plain = start_actor(context, "sleeper")
        start_actor(context, "sleeper", start_new_session=True)
        plain.wait()
        raise RuntimeError("A child has ended.")

    many.expand(number=list(range(300)))
