"""The tasks that running.py ends: a Dag of every supported Airflow.

What happens in a task is told as a line of JSON, written to the FIFO that TOLD names. `ready` says that the task is where it
is to be ended; FREED names a FIFO that never has a line before the task may finish.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta, timezone
from itertools import chain, count, repeat
from threading import Thread, main_thread
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.providers.standard.triggers.temporal import DateTimeTrigger
from airflow.sdk import DAG, BaseOperator, BaseSensorOperator, Variable, task
from tests.harness.real.telling import tell, wait_until_freed

try:
    from airflow.sdk.exceptions import AirflowSkipException, TaskDeferred
except ImportError:  # before SDK 1.2
    from airflow.exceptions import AirflowSkipException, TaskDeferred

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 600
"""Seconds that nobody waits for."""
TICK = 0.02
ON_KILL_TIME = 2.0
BUSY_TIME = 0.1
WORKERS = 2
WARM_UP = 3
"""Requests or pokes after which a task is in its loop for certain."""
# Waits for ever under a name of its own, and says when it has that name: `sh` opens a FIFO that nobody writes to.
DAEMON = ["setsid", "--fork", "sh", "-c", 'echo; exec > /dev/null; read -r line < "$FREED"']

# Likewise without a variable to read from.
SLEEP = f"echo; exec > /dev/null; exec sleep {LONG}"
DETACH = ["setsid", "--fork", "sh", "-c"]
DAEMONS = {
    "daemon": [*DETACH, SLEEP],
    "daemon_without_env": ["env", "-i", *DETACH, SLEEP],
    "deaf_daemon": [*DETACH, f"trap '' TERM HUP INT; {SLEEP}"],
    "daemon_with_limit": ["prlimit", "--rttime=1000000000", *DETACH, SLEEP],
}
"""They have left the session, and lost their parents."""
FREE_DAEMON = ["prlimit", "--rttime=unlimited", *DETACH, SLEEP]
"""Has been let out of the tree."""
PIPELINE = f"sleep {LONG} | sleep {LONG} & {SLEEP}"
CHILDREN = {
    "pipeline": ["bash", "-c", PIPELINE],
    "pipeline_in_session": ["setsid", "bash", "-c", PIPELINE],
    "job_control": ["bash", "-mc", PIPELINE],
}
ORDERLY = """
import signal, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
print(flush=True)
while not told or time.monotonic() < told[0] + 0.5:
    time.sleep(0.02)
print(len(told))
"""
"""A program that takes its time to end, and says how many SIGTERMs it has got: some give up at the second."""
SMALL_CHILDREN = 40
CHUNK = 1 << 20


def tell_callback(name: str) -> Any:
    def callback(context: Any) -> None:
        tell(name)

    return callback


def ask(key: str) -> None:
    """Ask for a Variable, and tell if the answer is another one's."""
    value = Variable.get(key)
    if value != f"value of {key}":
        tell("wrong", key=key, value=value)


def ask_for_ever() -> None:
    for number in count():
        ask(f"v{number}")
        if number == WARM_UP:
            tell("ready")


async def ask_at_once(coroutines: int) -> None:
    """Have so many coroutines ask for Variables for ever."""
    from airflow.sdk.execution_time.comms import GetVariable  # noqa: PLC0415  # before SDK 1.2 nobody asks so
    from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS  # noqa: PLC0415

    async def ask_for_ever(name: int) -> None:
        for number in count():
            key = f"{name} {number}"
            answer = await SUPERVISOR_COMMS.asend(GetVariable(key=key))
            if answer.value != f"value of {key}":
                tell("wrong", key=key, value=answer.value)
            if (name, number) == (0, WARM_UP):
                tell("ready")

    await asyncio.gather(*map(ask_for_ever, range(coroutines)))


def print_for_ever(*, told: str = "ready") -> None:
    for number in count():
        print(f"line {number}", flush=True)  # noqa: T201  # what many tasks do
        if number == WARM_UP:
            tell(told)


def log_for_ever(log: Any) -> None:
    for number in count():
        log.info("line %s", number)
        if number == WARM_UP:
            tell("ready")


def spin() -> None:
    while True:
        pass


def read_cpu_clock() -> float:
    """Return the CPU seconds of the main thread."""
    return time.clock_gettime(time.pthread_getcpuclockid(main_thread().ident))


def tell_when_busy(began: float) -> None:
    """Tell when the main thread has run for longer than it takes to get into the call that it is to be in."""
    while read_cpu_clock() < began + BUSY_TIME:
        time.sleep(TICK)
    tell("ready")


def be_worker(started: int) -> None:
    os.write(started, b".")
    spin()


class Finalized:
    """Is ended in its finalizer, where Python ignores what is raised."""

    def __del__(self) -> None:
        tell("ready")
        time.sleep(LONG)


class ToldOperator(BaseOperator):
    """Tells when on_kill() is called."""

    def on_kill(self) -> None:
        tell("on_kill")

    def execute(self, context: Any) -> Any:
        tell("ready")
        time.sleep(LONG)


class FlagOperator(ToldOperator):
    """Ends its work in on_kill(), and returns then as if it were done."""

    killed = False

    def on_kill(self) -> None:
        super().on_kill()
        self.killed = True

    def execute(self, context: Any) -> Any:
        tell("ready")
        while not self.killed:
            time.sleep(TICK)
        return "done"


class DefersWhenKilledOperator(FlagOperator):
    def execute(self, context: Any) -> Any:
        super().execute(context)
        defer()


class SlowOnKillOperator(ToldOperator):
    def on_kill(self) -> None:
        super().on_kill()
        deadline = time.monotonic() + ON_KILL_TIME
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        tell("on_kill_done")


class RaisingOnKillOperator(ToldOperator):
    def on_kill(self) -> None:
        super().on_kill()
        raise RuntimeError("the remote job is not there")


class AsksOnKillOperator(ToldOperator):
    def on_kill(self) -> None:
        super().on_kill()
        ask("on_kill")
        tell("answered")


class AsksAlwaysOperator(AsksOnKillOperator):
    def execute(self, context: Any) -> Any:
        ask_for_ever()


class LogsOnKillOperator(ToldOperator):
    def on_kill(self) -> None:
        super().on_kill()
        self.log.info("on_kill speaks")

    def execute(self, context: Any) -> Any:
        log_for_ever(self.log)


class PrintsOperator(ToldOperator):
    def execute(self, context: Any) -> Any:
        print_for_ever()


class PrintsAlwaysOperator(PrintsOperator):
    """Prints in execute() all the time, and then in on_kill()."""

    def on_kill(self) -> None:
        print("on_kill speaks", flush=True)  # noqa: T201  # what many tasks do
        super().on_kill()


class OddOutputOperator(ToldOperator):
    """Has put something in the place of stdout whose buffer takes no bytes."""

    def execute(self, context: Any) -> Any:
        sys.stdout = io.StringIO()
        sys.stdout.buffer = io.StringIO()  # type: ignore[attr-defined]
        super().execute(context)


class WaitsOnKillOperator(ToldOperator):
    """Has started a program that it waits for in on_kill(), and says so."""

    def on_kill(self) -> None:
        print("on_kill waits", flush=True)  # noqa: T201  # what many tasks do
        super().on_kill()
        tell("told_once" if self.program.stdout.readline().strip() == b"1" else "told_twice")

    def execute(self, context: Any) -> Any:
        self.program = subprocess.Popen([sys.executable, "-I", "-S", "-c", ORDERLY], stdout=subprocess.PIPE)
        self.program.stdout.readline()
        super().execute(context)


class PrintsOnKillOperator(SlowOnKillOperator):
    """Prints in on_kill() all the time."""

    def on_kill(self) -> None:
        Thread(target=print_for_ever, kwargs={"told": "printing"}, daemon=True).start()
        super().on_kill()


class PostOperator(ToldOperator):
    """Has succeeded when it is told to end."""

    def execute(self, context: Any) -> Any:
        return "done"

    def post_execute(self, context: Any, result: Any = None) -> None:
        wait_for_signal()
        tell("finished")


class PrintsAfterwardsOperator(ToldOperator):
    """Prints all the time when it has succeeded, and has left a daemon."""

    def execute(self, context: Any) -> Any:
        start(DAEMONS["deaf_daemon"], detaches=True)
        return "done"

    def post_execute(self, context: Any, result: Any = None) -> None:
        print_for_ever()


class PreOperator(ToldOperator):
    """Is told to end before it has begun."""

    def pre_execute(self, context: Any) -> None:
        wait_for_signal()

    def execute(self, context: Any) -> Any:
        return "done"


class SkipsWhenKilledOperator(ToldOperator):
    """Is told to end before it has begun, and would rather be skipped."""

    def pre_execute(self, context: Any) -> None:
        try:
            tell("ready")
            time.sleep(LONG)
        finally:
            raise AirflowSkipException


class BashAfterRunnerOperator(BashOperator):
    def on_kill(self) -> None:
        tell("on_kill")
        super().on_kill()


class ToldTriggerOperator(TriggerDagRunOperator):
    def on_kill(self) -> None:
        tell("on_kill")


class PokeSensor(BaseSensorOperator):
    def on_kill(self) -> None:
        tell("on_kill")

    def poke(self, context: Any) -> bool:
        self.pokes = getattr(self, "pokes", 0) + 1
        if self.pokes == WARM_UP:
            tell("ready")
        return False


def defer() -> None:
    raise TaskDeferred(
        trigger=DateTimeTrigger(moment=datetime(2100, 1, 1, tzinfo=timezone.utc)), method_name="execute"
    )


def start_daemon() -> None:
    devnull = subprocess.DEVNULL
    daemon = subprocess.Popen(DAEMON, stdin=devnull, stdout=subprocess.PIPE, stderr=devnull)
    assert daemon.stdout
    daemon.stdout.readline()
    daemon.wait()
    tell("daemon")


def start(command: list[str], *, detaches: bool = False) -> None:
    """Start a command that says when it is there; one that detaches has left its parent then."""
    devnull = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=devnull, stdout=subprocess.PIPE, stderr=devnull)
    assert process.stdout
    process.stdout.readline()
    if detaches:
        process.wait()


def make_parent(name: str, command: list[str], *, detaches: bool) -> Any:
    """Return a task that starts a command and sleeps."""

    @task(task_id=name)
    def parent() -> None:
        start(command, detaches=detaches)
        tell("ready")
        time.sleep(LONG)

    return parent


def tell_once() -> Iterator[int]:
    tell("ready")
    yield 0


def take_all_memory() -> None:
    """Grow until the kernel ends this, once the task is freed."""
    tell("ready")
    wait_until_freed()
    taken = []
    while True:
        taken.append(b"." * CHUNK)


def crash() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # Airflow handles it while it parses a Dag
    os.kill(os.getpid(), signal.SIGSEGV)


def wait_for_signal() -> None:
    """Return when this process has got a signal, whatever is done about it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer)
    tell("ready")
    os.read(reader, 1)
    signal.set_wakeup_fd(former)


TELL_CALLBACKS = {
    name: tell_callback(name) for name in ("on_failure_callback", "on_retry_callback", "on_success_callback")
}

with DAG("told", schedule=None, default_args=TELL_CALLBACKS):
    ToldOperator(task_id="told")
    FlagOperator(task_id="flag")
    DefersWhenKilledOperator(task_id="defers_when_killed")
    SlowOnKillOperator(task_id="slow_on_kill")
    RaisingOnKillOperator(task_id="raises_in_on_kill")
    AsksOnKillOperator(task_id="asks_in_on_kill")
    AsksAlwaysOperator(task_id="asks_always")
    LogsOnKillOperator(task_id="logs")
    PrintsOperator(task_id="prints")
    PrintsAlwaysOperator(task_id="prints_always")
    OddOutputOperator(task_id="odd_output")
    WaitsOnKillOperator(task_id="waits_on_kill")
    PrintsOnKillOperator(task_id="prints_on_kill")
    PostOperator(task_id="post_execute")
    PrintsAfterwardsOperator(task_id="prints_afterwards")
    PreOperator(task_id="pre_execute")
    SkipsWhenKilledOperator(task_id="skips_when_killed")
    ToldOperator(task_id="has_timeout", execution_timeout=timedelta(seconds=LONG))
    PokeSensor(task_id="sensor", poke_interval=TICK, mode="poke", timeout=LONG)
    ToldTriggerOperator(
        task_id="triggers", trigger_dag_id="other", wait_for_completion=True, poke_interval=TICK
    )
    BashAfterRunnerOperator(
        task_id="bash",
        bash_command=f"""sleep {LONG} | sleep {LONG} & echo '{{"event": "ready"}}' > "$TOLD"; wait""",
    )

    @task
    def sleeps() -> None:
        tell("ready")
        time.sleep(LONG)

    @task
    def has_finally() -> None:
        try:
            tell("ready")
            time.sleep(LONG)
        finally:
            ask("finally")
            tell("finally")

    @task
    def asks() -> None:
        try:
            ask_for_ever()
        finally:
            for number in range(WARM_UP):
                ask(f"finally {number}")
            tell("finally")

    @task
    def blocked() -> None:
        Thread(target=tell_when_busy, args=(read_cpu_clock(),), daemon=True).start()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 80_000_000)

    @task
    def blocked_with_gil() -> None:
        sum(chain(tell_once(), repeat(0)))

    @task
    def asks_with_default() -> None:
        for number in count():
            Variable.get(f"v{number}", default="nothing")
            if number == WARM_UP:
                tell("ready")

    @task
    def swallows_all() -> str:
        try:
            tell("ready")
            time.sleep(LONG)
        except BaseException:  # noqa: BLE001  # what some tasks do
            tell("swallowed")
        return "done"

    @task
    def swallows_errors() -> None:
        tell("ready")
        while True:
            try:
                time.sleep(LONG)
            except Exception:  # noqa: BLE001  # what many tasks do
                tell("swallowed")

    @task
    def finalizes() -> None:
        Finalized()
        time.sleep(LONG)

    @task
    def complains() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: time.sleep(TICK))
        tell("ready")
        while True:
            # Nobody asks for the exception before the future is collected, and asyncio complains.
            loop.create_future().set_exception(ValueError("nobody asks"))

    @task
    def deaf() -> None:
        while True:
            try:
                tell("ready")
                time.sleep(LONG)
            except BaseException:  # noqa: BLE001  # what a few tasks do
                tell("swallowed")

    @task
    def pool() -> None:
        reader, writer = os.pipe()
        with ProcessPoolExecutor(WORKERS) as executor:
            workers = [executor.submit(be_worker, writer) for _ in range(WORKERS)]
            for _ in workers:
                os.read(reader, 1)
            tell("ready")
            workers[0].result()

    @task
    def forks() -> None:
        if os.fork() == 0:
            try:
                tell("ready")
                time.sleep(LONG)
            except BaseException:  # noqa: BLE001  # whatever is raised here is wrong
                tell("interrupted_child")
            os._exit(0)
        time.sleep(LONG)

    @task
    def crowd() -> None:
        for command in CHILDREN.values():
            start(command)
        for command in DAEMONS.values():
            start(command, detaches=True)
        tell("ready")
        time.sleep(LONG)

    @task
    def prints_beside_daemon() -> None:
        start(DAEMONS["deaf_daemon"], detaches=True)
        print_for_ever()

    @task
    def logs_beside_daemon() -> None:
        start(DAEMONS["deaf_daemon"], detaches=True)
        log_for_ever(logging.getLogger("airflow.task"))

    @task
    def asks_beside_daemon() -> None:
        start(DAEMONS["deaf_daemon"], detaches=True)
        ask_for_ever()

    @task
    def fills() -> None:
        for _ in range(SMALL_CHILDREN):
            subprocess.Popen(["sleep", str(LONG)])
        if os.fork() == 0:
            take_all_memory()
        time.sleep(LONG)

    @task
    def stands_by() -> None:
        tell("stands_by")
        wait_until_freed()
        tell("stood_by")

    @task
    def finishes() -> str:
        tell("ready")
        wait_until_freed()
        return "done"

    @task
    def returns() -> str:
        tell("ready")
        return "done"

    @task
    def leaves_daemon() -> str:
        start_daemon()
        return "done"

    @task
    def fails() -> None:
        start_daemon()
        raise RuntimeError("it fails by itself")

    @task
    def sleeps_with_daemon() -> None:
        start_daemon()
        tell("ready")
        time.sleep(LONG)

    @task
    def asks_in_vain() -> None:
        start_daemon()
        try:
            Variable.get("away")
        except Exception as error:
            tell("refused", error=type(error).__name__)
            raise

    @task
    def crashes_after_success() -> str:
        start_daemon()
        atexit.register(crash)
        return "done"

    def exit_at_once(_context: Any) -> None:
        os._exit(1)

    def hang(_context: Any) -> None:
        time.sleep(LONG)

    @task(on_success_callback=hang)
    def hangs_after_success() -> str:
        start_daemon()
        return "done"

    @task(on_success_callback=exit_at_once)
    def exits_after_success() -> str:
        start_daemon()
        return "done"

    @task
    def defers() -> None:
        defer()

    @task(execution_timeout=timedelta(seconds=0.3))
    def times_out() -> None:
        time.sleep(LONG)

    for each in (
        *(sleeps, has_finally, asks, blocked, swallows_all, swallows_errors),
        *(finalizes, complains, deaf, pool, forks),
        *(blocked_with_gil, prints_beside_daemon, logs_beside_daemon, asks_beside_daemon),
        *(asks_with_default, crowd, fills, stands_by, leaves_daemon),
        *(make_parent(name, command, detaches=True) for name, command in DAEMONS.items()),
        *(make_parent(name, command, detaches=False) for name, command in CHILDREN.items()),
        make_parent("free_daemon", FREE_DAEMON, detaches=True),
        *(finishes, returns, fails, sleeps_with_daemon, asks_in_vain),
        *(crashes_after_success, exits_after_success, hangs_after_success, defers, times_out),
    ):
        each()

    @task
    async def sleeps_async() -> None:
        try:
            tell("ready")
            await asyncio.sleep(LONG)
        finally:
            tell("finally")

    @task
    async def several_3() -> None:
        await ask_at_once(3)

    @task
    async def several_finally() -> None:
        try:
            await ask_at_once(5)
        finally:
            for number in range(WARM_UP):
                ask(f"finally {number}")
            tell("finally")

    # Before SDK 1.2 a coroutine function is called, and nobody awaits what it returns.
    for each in (sleeps_async, several_3, several_finally):
        each()
