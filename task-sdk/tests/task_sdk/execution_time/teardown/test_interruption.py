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
from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import io
import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import msgspec
import pytest
import structlog
from task_sdk.execution_time.teardown.supervised.supervised_task import (
    PATIENCE,
    Relay,
    ended_by,
    find_exception,
    forked,
    in_turn,
    list_request_methods,
    pause_for_ever,
    wait_for_interruption,
)

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.comms import ErrorResponse, GetVariable, VariableResult
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.sdk.execution_time.teardown import interruption
from airflow.sdk.execution_time.teardown.interruption import (
    AirflowTaskTerminated,
    TaskInterrupted,
    ask_in_thread,
    begin_request,
    end_request,
    handle_sigterm,
    interrupt_on_sigterm,
    prepare_interruptibly,
    report_state,
    run_interruptibly,
    trigger_interruptibly,
    uninterrupted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_mock import MockerFixture

FLOOD = 1 << 20
"""Bytes, more than a pipe takes."""

ANSWER_TIME = 0.005
"""Seconds, so that requests of several coroutines overlap."""

LONG_LOOP = 10**9
"""Rounds that nobody waits for."""

GOOD_ENDS = [find_exception(name) for name in ("AirflowSkipException", "TaskDeferred")]
"""Exceptions by which a task does not fail."""

DagRunTriggerException = find_exception("DagRunTriggerException")


class Operator(BaseOperator):
    """A task with an ``on_kill`` of our choice."""

    def __init__(self, *, on_kill: Callable[[], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._on_kill = on_kill

    def on_kill(self) -> None:
        self._on_kill()


def make_task(on_kill: Callable[[], Any]) -> Operator:
    return Operator(task_id="task", on_kill=on_kill)


def make_ti(on_kill: Callable[[], Any] = lambda: None) -> RuntimeTaskInstance:
    """Return a task instance that has nothing but its task."""
    ti: RuntimeTaskInstance = RuntimeTaskInstance.model_construct(task=make_task(on_kill))
    return ti


class Runner:
    """A runner of tasks in this process, as far as SIGTERM goes; notes what happens, and restores all of it."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.on_kill: Callable[[], Any] = lambda: None
        self.error: BaseException | None = None
        self._former = signal.getsignal(signal.SIGTERM)
        # Other tests may have run a task in this process.
        self._former_task = interruption._current
        interruption._current = None

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self._former)
        interruption._current = self._former_task
        interruption._requests_in_flight = 0
        # A coroutine that was never completed logs when it is collected, which is to happen in no other test.
        gc.collect()

    def note(self, what: str) -> None:
        self.notes.append(what)

    def prepare(self, name: str = "on_kill", is_ordered: Callable[[], bool] | None = None) -> None:
        """Be a runner that has a task."""

        def on_kill() -> None:
            self.note(name)
            self.on_kill()

        interrupt_on_sigterm(make_ti(on_kill), is_ordered)

    def run(self, execute: Callable[[], Any]) -> list[str]:
        """Run a task that is interrupted; return what it has noted."""
        self.prepare()
        with pytest.raises(TaskInterrupted) as raised:
            run_interruptibly(execute)
        self.error = raised.value
        return self.notes


@pytest.fixture
def runner() -> Iterator[Runner]:
    with contextlib.closing(Runner()) as runner:
        yield runner


def stop() -> None:
    """Have SIGTERM come here and now."""
    signal.raise_signal(signal.SIGTERM)


def stop_for(seconds: float) -> None:
    """Have SIGTERM come, and whatever follows in some seconds."""
    stop()
    time.sleep(seconds)


def fail() -> None:
    raise ConnectionError("nobody listens")


class TestOrder:
    """A task that fails, for its supervisor is dying, a moment before it is told to stop."""

    def test_on_its_way(self, runner: Runner) -> None:
        """It is waited for, and on_kill runs."""

        def order() -> bool:
            runner.note("ordered")
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return True

        runner.prepare(is_ordered=order)
        with pytest.raises(TaskInterrupted):
            run_interruptibly(fail)
        assert runner.notes == ["ordered", "on_kill"]

    def test_that_does_not_come(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not waited for without an end; the task has failed by itself then."""
        monkeypatch.setattr(interruption, "ORDER_TIME", 0.01)
        runner.prepare(is_ordered=lambda: True)
        with pytest.raises(ConnectionError):
            run_interruptibly(fail)
        assert runner.notes == []

    def test_none(self, runner: Runner, mocker: MockerFixture) -> None:
        """A task whose supervisor lives fails at once."""
        sleep = mocker.patch.object(interruption.time, "sleep", autospec=True)
        runner.prepare(is_ordered=lambda: False)
        with pytest.raises(ConnectionError):
            run_interruptibly(fail)
        sleep.assert_not_called()
        assert runner.notes == []

    def test_that_cannot_be_told(self, runner: Runner) -> None:
        """What goes wrong in asking does not take the place of the task's own exception."""

        def fail_to_tell() -> bool:
            raise OSError("no descriptor is left")

        runner.prepare(is_ordered=fail_to_tell)
        with pytest.raises(ConnectionError):
            run_interruptibly(fail)

    def test_that_has_come(self, runner: Runner) -> None:
        """One that was told to stop already is not asked."""

        def is_ordered() -> bool:
            runner.note("asked")
            return False

        runner.prepare(is_ordered=is_ordered)
        with pytest.raises(TaskInterrupted):
            run_interruptibly(in_turn(contextlib.suppress(BaseException).__enter__, stop))
        assert runner.notes == ["on_kill"]


class TestExecute:
    def test_interrupted(self, runner: Runner) -> None:
        """After ``on_kill`` an exception that is no ``Exception`` is raised where ``execute()`` is."""

        def execute() -> None:
            try:
                stop()
            except Exception:  # noqa: BLE001 - as operators do
                runner.note("swallowed")
            except BaseException:
                runner.note("interrupted")
                raise
            runner.note("unreachable")

        assert runner.run(execute) == ["on_kill", "interrupted"]
        assert runner.error
        assert isinstance(runner.error.__cause__, AirflowTaskTerminated)
        assert not isinstance(runner.error, Exception)

    def test_arguments_and_result(self, runner: Runner) -> None:
        """A task that nobody stops is none of our business."""
        runner.prepare()
        assert run_interruptibly(lambda *args, **kwargs: (args, kwargs), 1, context=2) == (
            (1,),
            {"context": 2},
        )
        with pytest.raises(ZeroDivisionError):
            run_interruptibly(lambda: 1 / 0)
        assert runner.notes == []

    def test_finalizer(self, runner: Runner) -> None:
        """Python ignores what is raised in a finalizer, so it is raised again when that is over, be it by and by."""

        class Finalized:
            def __del__(self) -> None:
                runner.note("finalizer")
                # No more, so that a signal may come outside.
                stop() if runner.notes.count("finalizer") < 3 else None

        def execute() -> None:
            try:
                while time.monotonic() < deadline:
                    Finalized()
                runner.note("unreachable")
            finally:
                runner.note("interrupted")

        deadline = time.monotonic() + PATIENCE
        hook = sys.unraisablehook
        assert runner.run(execute)[:2] == ["finalizer", "on_kill"]
        assert runner.notes.count("on_kill") == 1
        assert runner.notes[-1] == "interrupted"
        assert "unreachable" not in runner.notes
        assert sys.unraisablehook is hook

    def test_other_unraisable(self, runner: Runner, mocker: MockerFixture) -> None:
        """What else is ignored is told as ever."""

        class Finalized:
            def __del__(self) -> None:
                raise ValueError("told")

        def execute() -> None:
            try:
                stop()
            finally:
                Finalized()

        hook = mocker.patch.object(sys, "unraisablehook", autospec=True)
        assert runner.run(execute) == ["on_kill"]
        [call] = hook.call_args_list
        assert str(call.args[0].exc_value) == "told"

    def test_many_signals(self, runner: Runner) -> None:
        """``on_kill`` runs once, however many signals come, also while it runs, and is not cut short by the next one."""

        def on_kill() -> None:
            stop()
            runner.note("done")

        def execute() -> None:
            try:
                stop()
            finally:
                stop()
                runner.note("cleaned up")

        runner.on_kill = on_kill
        assert runner.run(execute) == ["on_kill", "done", "cleaned up"]

    @pytest.mark.parametrize("error", [None, ValueError, SystemExit, KeyboardInterrupt, *GOOD_ENDS])
    def test_swallowed(self, runner: Runner, error: Any) -> None:
        """However ``execute()`` ends once the task was told to stop, it has neither succeeded, nor deferred or skipped."""

        def execute() -> str:
            with contextlib.suppress(BaseException):
                stop()
            if error is None:
                return "result"
            raise error.__new__(error)

        assert runner.run(execute) == ["on_kill"]

    def test_on_kill_that_fails(self, runner: Runner) -> None:
        """The task ends all the same, and its log tells what was wrong."""

        def on_kill() -> None:
            raise OSError("not there")

        runner.on_kill = on_kill
        with structlog.testing.capture_logs() as logs:
            assert runner.run(stop) == ["on_kill"]
        [entry] = logs
        assert (entry["log_level"], entry["event"]) == ("error", "on_kill failed")
        assert isinstance(entry["exc_info"], OSError)

    def test_timeout_is_disarmed(self, runner: Runner) -> None:
        """The timer of ``execution_timeout`` does not cut ``on_kill`` short."""
        runner.on_kill = lambda: runner.note(str(signal.getitimer(signal.ITIMER_REAL)))
        former = signal.setitimer(signal.ITIMER_REAL, 1000)
        assert runner.run(stop) == ["on_kill", "(0.0, 0.0)"]
        signal.setitimer(signal.ITIMER_REAL, *former)

    def test_timeout_at_the_same_time(self, runner: Runner, mocker: MockerFixture) -> None:
        """An ``execution_timeout`` that comes just before it is disarmed does not keep ``on_kill`` from running."""
        timeout = find_exception("AirflowTaskTimeout")
        mocker.patch.object(
            interruption.signal, "setitimer", autospec=True, side_effect=[timeout.__new__(timeout), None]
        )
        assert runner.run(stop) == ["on_kill"]
        assert isinstance(runner.error and runner.error.__cause__, timeout)

    def test_task_that_was_replaced(self, runner: Runner) -> None:
        """The ``on_kill`` of the task that runs is called, which may be an unmapped one."""
        ti = make_ti(lambda: runner.note("template"))
        interrupt_on_sigterm(ti)
        ti.task = make_task(lambda: runner.note("unmapped"))
        with pytest.raises(TaskInterrupted):
            run_interruptibly(stop)
        assert runner.notes == ["unmapped"]


class TestPhases:
    def test_before(self, runner: Runner) -> None:
        """A signal while the task is prepared calls ``on_kill``, and ``execute()`` does not begin."""
        runner.prepare()
        stop()
        runner.note("prepared")
        with pytest.raises(TaskInterrupted):
            run_interruptibly(lambda: runner.note("unreachable"))
        assert runner.notes == ["on_kill", "prepared"]

    @pytest.mark.parametrize("error", [None, *GOOD_ENDS])
    def test_preparation(self, runner: Runner, error: Any) -> None:
        """``pre_execute()`` is interrupted, and has not skipped the task, however it ends."""

        def prepare(_context: Any) -> None:
            with contextlib.suppress(BaseException):
                stop()
                runner.note("unreachable")
            if error is not None:
                raise error.__new__(error)

        runner.prepare()
        with pytest.raises(TaskInterrupted):
            prepare_interruptibly(prepare, "context")
        assert runner.notes == ["on_kill"]

    def test_between(self, runner: Runner) -> None:
        """A signal between ``pre_execute()`` and ``execute()`` is not lost."""
        runner.prepare()
        assert prepare_interruptibly(lambda context: context, "context") == "context"
        stop()
        with pytest.raises(TaskInterrupted):
            run_interruptibly(lambda: runner.note("unreachable"))
        assert runner.notes == ["on_kill"]

    def test_preparation_that_fails(self, runner: Runner) -> None:
        """After it the task is over."""
        runner.prepare()
        with pytest.raises(ConnectionError):
            prepare_interruptibly(fail)
        stop()
        assert runner.notes == []

    def test_after(self, runner: Runner) -> None:
        """A signal when ``execute()`` has returned changes nothing: its result stands."""
        runner.prepare()
        assert run_interruptibly(lambda: "result") == "result"
        stop()
        assert runner.notes == []

    def test_without_a_task(self, runner: Runner) -> None:
        """What runs tasks without a handler, as a test does, runs them."""
        assert prepare_interruptibly(lambda context: context, "context") == "context"
        assert run_interruptibly(lambda: "result") == "result"


class TestTriggeredRun:
    """A task that triggers another Dag's run leaves that, and the wait for its end, to the runner."""

    def trigger(
        self, runner: Runner, wait: Callable[[], Any], between: Callable[[], None] = lambda: None
    ) -> tuple[list[Any], BaseException | None]:
        """Run the task and what it leaves; return what the supervisor is told, and the task's error."""
        runner.prepare()
        with pytest.raises(DagRunTriggerException):
            run_interruptibly(self.execute)
        between()
        *told, error = trigger_interruptibly(
            lambda error: ("failed", type(error)), lambda state: (state, wait()), "success"
        )
        return told, error

    def execute(self) -> None:
        raise DagRunTriggerException.__new__(DagRunTriggerException)

    def test_that_ends(self, runner: Runner) -> None:
        """It is told; a signal after that changes nothing."""
        assert self.trigger(runner, lambda: "state") == (["success", "state"], None)
        stop()
        assert runner.notes == []

    def test_interrupted(self, runner: Runner) -> None:
        """The wait is interrupted after on_kill, like execute()."""

        def wait() -> None:
            stop()
            runner.note("unreachable")

        told, error = self.trigger(runner, wait)
        assert told == ["failed", TaskInterrupted]
        assert isinstance(error, TaskInterrupted)
        assert runner.notes == ["on_kill"]

    def test_between(self, runner: Runner) -> None:
        """A signal that comes before the wait is not lost, and nothing is triggered."""
        told, _ = self.trigger(runner, lambda: runner.note("unreachable"), between=stop)
        assert told == ["failed", TaskInterrupted]
        assert runner.notes == ["on_kill"]

    def test_that_fails(self, runner: Runner) -> None:
        """What goes wrong is the runner's, as ever."""
        with pytest.raises(ConnectionError):
            self.trigger(runner, fail)

    def test_task_that_is_stopped_before(self, runner: Runner) -> None:
        """A task that swallows the interruption triggers nothing."""

        def execute() -> None:
            with contextlib.suppress(BaseException):
                stop()
            self.execute()

        assert runner.run(execute) == ["on_kill"]


class TestRequests:
    def test_answer_is_read(self, runner: Runner) -> None:
        """A request is not interrupted: the next one would get the answer to this one."""

        @uninterrupted
        def send() -> str:
            stop()
            runner.note("answer")
            return "answer"

        assert runner.run(lambda: runner.note(send())) == ["answer", "on_kill"]

    def test_request_that_fails(self, runner: Runner) -> None:
        """An error is an answer, too."""

        @uninterrupted
        def send() -> None:
            stop()
            runner.note("answer")
            raise ConnectionError

        assert runner.run(send) == ["answer", "on_kill"]

    def test_on_kill_asks(self, runner: Runner) -> None:
        """It does so when the request before is complete, and is not interrupted itself."""

        @uninterrupted
        def send(what: str) -> None:
            stop()
            runner.note(what)

        runner.on_kill = lambda: send("asked by on_kill")
        assert runner.run(lambda: send("asked")) == ["asked", "on_kill", "asked by on_kill"]

    def test_last_request(self, runner: Runner) -> None:
        """One that has put off the stop until ``execute()`` is over has done so for no longer: the task has failed."""

        def execute() -> None:
            begin_request()
            try:
                stop()
            finally:
                runner.note("answer")
                with contextlib.suppress(AirflowTaskTerminated):
                    end_request()

        assert runner.run(execute) == ["answer", "on_kill"]

    def test_coroutine_that_is_cancelled(self, runner: Runner) -> None:
        """A thread completes the request of a coroutine, in the coroutine's context, whatever becomes of that."""
        sent, may_answer = threading.Event(), threading.Event()
        name = contextvars.ContextVar("name", default="")

        def send(what: str) -> None:
            sent.set()
            may_answer.wait(PATIENCE)
            runner.note(f"{what} for {name.get()}")

        async def main() -> None:
            name.set("main")
            asking = asyncio.ensure_future(ask_in_thread(send, "answer"))
            await asyncio.to_thread(sent.wait, PATIENCE)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            may_answer.set()

        asyncio.run(main())
        assert runner.notes == ["answer for main"]

    def test_coroutine_that_begins(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is interrupted while the thread starts; then the coroutine is, which asks nothing more."""

        async def main() -> None:
            loop = asyncio.get_running_loop()
            begin = loop.run_in_executor

            def stop_and_begin(*args: Any) -> Any:
                stop()
                runner.note("begun")
                return begin(*args)

            monkeypatch.setattr(loop, "run_in_executor", stop_and_begin)
            await ask_in_thread(lambda _: None, "first")
            runner.note("unreachable")

        assert runner.run(lambda: asyncio.run(main())) == ["begun", "on_kill"]

    def test_other_threads(self, runner: Runner) -> None:
        """A request of another thread does not put it off: that thread goes on, and gets its answer."""

        def execute() -> None:
            thread = threading.Thread(target=begin_request)
            thread.start()
            thread.join()
            stop()
            runner.note("unreachable")

        assert runner.run(execute) == ["on_kill"]


class InterruptingSocket(socket.socket):
    """A socket over which a signal comes when something is sent."""

    interrupts = False

    def sendall(self, *args: Any) -> None:
        self.interrupt()
        super().sendall(*args)

    def send(self, *args: Any) -> int:
        self.interrupt()
        return super().send(*args)

    def interrupt(self) -> None:
        if self.interrupts:
            self.interrupts = False
            stop()


class TestComms:
    @pytest.mark.skipif(not list_request_methods(), reason="no method sends a request and reads its answer")
    def test_real_comms(self, runner: Runner) -> None:
        """The runner's own requests are such: whatever comes while one is sent, its answer is read."""
        ours, theirs = (InterruptingSocket(fileno=end.detach()) for end in socket.socketpair())
        with ours, theirs:
            theirs.sendall(comms._ResponseFrame(id=0, body=None).as_bytes())
            ours.interrupts = True
            runner.on_kill = lambda: runner.note(f"{len(select.select([ours], [], [], 0)[0])} unread")
            decoder: Any = comms.CommsDecoder(socket=ours)
            assert runner.run(lambda: decoder.send(GetVariable(key="k"))) == ["on_kill", "0 unread"]
            assert select.select([theirs], [], [], 0)[0], "the request was sent"

    @pytest.mark.skipif("asend" not in list_request_methods(), reason="no coroutine asks")
    def test_many_coroutines(self, runner: Runner) -> None:
        """However many coroutines ask, the stop is not put off, and whoever asks then gets his own answer.

        Their requests go on in a loop that does not.
        """
        relay = Relay()

        def main() -> None:
            ours, theirs = socket.socketpair()
            threading.Thread(target=answer_requests, args=(theirs,), daemon=True).start()
            decoder: Any = comms.CommsDecoder(socket=ours)

            def ask(key: str) -> None:
                runner.note(decoder.send(GetVariable(key=key)).value)

            async def ask_for_ever(name: str) -> None:
                for number in itertools.count():
                    key = f"{name}{number}"
                    assert (await decoder.asend(GetVariable(key=key))).value == key
                    if number == 3:
                        stop()

            async def ask_at_once() -> None:
                try:
                    await asyncio.gather(*map(ask_for_ever, "abc"))
                finally:
                    ask("asked in the end")

            runner.on_kill = lambda: ask("asked by on_kill")
            runner.run(lambda: asyncio.new_event_loop().run_until_complete(ask_at_once()))
            ask("asked by the runner")
            relay.tell(runner.notes)

        with contextlib.closing(relay), forked(main):
            expected = ["on_kill", "asked by on_kill", "asked in the end", "asked by the runner"]
            assert relay.hear() == expected

    @pytest.mark.skipif("asend" not in list_request_methods(), reason="no coroutine asks")
    def test_coroutine_that_has_given_up(self, relay: Relay) -> None:
        """A request whose coroutine was cancelled is completed; whoever asks next waits for it, in the loop's thread too."""

        def main() -> None:
            ours, theirs = socket.socketpair()
            decoder: Any = comms.CommsDecoder(socket=ours)

            async def give_up() -> None:
                asking = asyncio.create_task(decoder.asend(GetVariable(key="given up")))
                sent, loop = asyncio.Event(), asyncio.get_running_loop()
                loop.add_reader(theirs, sent.set)
                await sent.wait()
                loop.remove_reader(theirs)
                asking.cancel()
                await asyncio.wait([asking])
                threading.Thread(target=answer_requests, args=(theirs,), daemon=True).start()
                relay.tell(decoder.send(GetVariable(key="next")).value)

            asyncio.run(give_up())

        with forked(main):
            assert relay.hear() == "next"


def answer_requests(connection: socket.socket) -> None:
    """Answer every request for a Variable with its name, after a moment."""
    while header := connection.recv(4, socket.MSG_WAITALL):
        body = connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL)
        request = msgspec.msgpack.decode(body, type=comms._RequestFrame)
        time.sleep(ANSWER_TIME)
        key = (request.body or {})["key"]
        result = VariableResult(key=key, value=key).model_dump()
        connection.sendall(comms._ResponseFrame(id=request.id, body=result).as_bytes())


class Interrupting:
    """The file of a log that a signal comes in the middle of."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.signals = 1

    def write(self, line: bytes) -> int:
        if self.signals:
            self.signals -= 1
            stop()
        self.written.append(line)
        return len(line)

    def flush(self) -> None: ...


class TestLogging:
    """A log call holds the lock of the log's file, which is not reentrant."""

    def log(
        self, runner: Runner, execute: Callable[[Any], Any], kind: type[Interrupting] = Interrupting
    ) -> Any:
        """Have a process of its own, which may hang, log into such a file, and tell what came of it."""
        relay = Relay()

        def main() -> None:
            file = kind()
            logger = structlog.BytesLogger(cast("BinaryIO", file))
            runner.on_kill = lambda: logger.msg(b"from on_kill")
            runner.run(lambda: execute(logger))
            relay.tell([line.decode().strip() for line in file.written] + runner.notes)

        with contextlib.closing(relay), forked(main):
            return relay.hear()

    def test_on_kill_logs(self, runner: Runner) -> None:
        """The log call is complete before ``on_kill``, which may log; then the task is interrupted."""

        def execute(logger: Any) -> None:
            logger.msg(b"from execute")
            runner.note("unreachable")

        assert self.log(runner, execute) == ["from execute", "from on_kill", "on_kill"]

    def test_log_call_within_another(self, runner: Runner) -> None:
        """What a log call calls counts as part of it, and what has called it does not."""

        def execute(logger: Any) -> None:
            def log_twice() -> None:
                logger.msg(b"first")
                logger.msg(b"unreachable")

            log_twice()

        assert self.log(runner, execute) == ["first", "from on_kill", "on_kill"]

    def test_profiler(self, runner: Runner) -> None:
        """Where a profiler takes the place of what waits for the log call's end, the signal comes again."""

        class Profiled(Interrupting):
            def flush(self) -> None:
                sys.setprofile(None)

        def execute(logger: Any) -> None:
            logger.msg(b"from execute")
            wait_for_interruption()
            runner.note("unreachable")

        assert self.log(runner, execute, Profiled) == ["from execute", "from on_kill", "on_kill"]


class TestLoopComplaint:
    """asyncio logs what has gone wrong in a loop, and ignores any exception meanwhile."""

    def test_direct(self, runner: Runner) -> None:
        """The interruption waits for the end of that."""

        def execute() -> None:
            with contextlib.closing(asyncio.new_event_loop()) as loop:
                loop.set_exception_handler(lambda *_: stop())
                loop.call_exception_handler({"message": "something went wrong"})
                wait_for_interruption()
            runner.note("unreachable")

        assert runner.run(execute) == ["on_kill"]

    def test_finalizer(self, runner: Runner) -> None:
        """The same where asyncio logs in finalizers, and a task does hardly anything else."""

        def execute() -> None:
            deadline = time.monotonic() + PATIENCE
            with contextlib.closing(asyncio.new_event_loop()) as loop:
                loop.set_exception_handler(lambda *_: stop_for(5 * interruption.SIGNAL_DELAY))
                while time.monotonic() < deadline:
                    # Nobody asks for the exception before the future is collected.
                    loop.create_future().set_exception(ValueError())
            runner.note("unreachable")

        assert runner.run(execute) == ["on_kill"]


class StringsInBuffer(io.StringIO):
    """An output whose buffer takes no bytes."""

    buffer: Any = io.StringIO()


class NoBuffer(io.StringIO):
    """An output whose buffer nobody may ask for."""

    @property
    def buffer(self) -> Any:
        raise NotImplementedError


class TestOutput:
    """A write holds the lock of its buffer, which is not reentrant, while it waits for its reader."""

    def stop_print(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch, stream: str, execute: Callable[[], None]
    ) -> str:
        """Have SIGTERM come in the middle of a print of ``execute``, read what is printed, and return it."""

        def stop_and_read() -> None:
            while select.select([], [writer], [], 0)[1]:
                pass
            # The print waits now, or will before it can return.
            signal.pthread_kill(main, signal.SIGTERM)
            task = interruption._current
            while not (runner.notes or (task is not None and task.is_requested)):
                pass
            while part := os.read(reader, FLOOD):
                parts.append(part)

        parts: list[bytes] = []
        main = threading.get_ident()
        reader, writer = os.pipe()
        thread = threading.Thread(target=stop_and_read)
        with open(writer, "w") as output:
            monkeypatch.setattr(sys, stream, output)
            runner.on_kill = lambda: print("from on_kill", file=output, flush=True)
            thread.start()
            assert runner.run(execute) == ["on_kill"]
        thread.join()
        os.close(reader)
        return b"".join(parts).decode()

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_on_kill_prints(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture, stream: str
    ) -> None:
        """The print is complete before ``on_kill``, which may print; then the task is interrupted."""

        def execute() -> None:
            print("x" * FLOOD, file=getattr(sys, stream), flush=True)
            wait_for_interruption()
            runner.note("unreachable")

        # No signal would meet a task between two prints that prints all the time.
        mocker.patch.object(interruption, "signal_soon", autospec=True)
        printed = self.stop_print(runner, monkeypatch, stream, execute)
        assert printed == "x" * FLOOD + "\nfrom on_kill\n"

    def test_print_before_a_loop(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that calls nothing after the print is interrupted all the same."""
        finished = False

        def execute() -> None:
            nonlocal finished
            rounds, output = range(LONG_LOOP), sys.stdout
            print("x" * FLOOD, file=output, flush=True)
            for _ in rounds:
                pass
            finished = True

        printed = self.stop_print(runner, monkeypatch, "stdout", execute)
        assert not finished
        assert printed == "x" * FLOOD + "\nfrom on_kill\n"

    @pytest.mark.parametrize("kind", [StringsInBuffer, NoBuffer])
    def test_odd_output(
        self, runner: Runner, monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
    ) -> None:
        """So is one that has put something else in their place, whatever that has for a buffer."""
        monkeypatch.setattr(sys, "stdout", kind())
        assert runner.run(stop) == ["on_kill"]

    def test_closed_output(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """So is one that has closed its output."""
        with open(os.devnull, "w") as output:
            monkeypatch.setattr(sys, "stdout", output)
        assert runner.run(stop) == ["on_kill"]

    def test_no_output(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process without stdout and stderr is interrupted as well."""
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        assert runner.run(stop) == ["on_kill"]


class TestEventLoop:
    def test_waiting_coroutines_are_cancelled(self, runner: Runner) -> None:
        """A loop that waits has all of its tasks cancelled, which clean up."""

        async def wait(name: str) -> None:
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                await asyncio.sleep(0)
                runner.note(f"{name} cleaned up")

        async def main() -> None:
            other = asyncio.ensure_future(wait("other"))
            asyncio.get_running_loop().call_later(0.01, stop)
            await asyncio.gather(other, wait("main"))
            runner.note("unreachable")

        assert sorted(runner.run(lambda: asyncio.run(main()))) == [
            "main cleaned up",
            "on_kill",
            "other cleaned up",
        ]

    def test_loop_of_its_own(self, runner: Runner) -> None:
        """A loop that nobody cleans up after, and that waits for events, has its coroutines clean up."""
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))

        async def main() -> None:
            # Runs when this coroutine waits.
            asyncio.get_running_loop().call_soon(timer.start)
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                runner.note("cleaned up")
                raise

        with contextlib.closing(asyncio.new_event_loop()) as loop:
            assert runner.run(lambda: loop.run_until_complete(main())) == ["on_kill", "cleaned up"]
        timer.join()

    def test_step_of_a_coroutine(self, runner: Runner) -> None:
        """A coroutine that is at work is interrupted there, and the others cancelled, though nobody waits for it."""

        async def work() -> None:
            stop()
            runner.note("unreachable")

        async def main() -> None:
            working = asyncio.ensure_future(work())
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                runner.note("cancelled")
                raise
            finally:
                working.done()

        assert runner.run(lambda: asyncio.run(main())) == ["on_kill", "cancelled"]


class TestProcesses:
    @pytest.mark.parametrize("reinstalled", [False, True])
    def test_forked_child(self, runner: Runner, *, reinstalled: bool) -> None:
        """A child of the task dies of SIGTERM, without an ``on_kill``, also if it comes before the fork is complete."""
        ready = Relay()

        def be_child() -> None:
            runner.on_kill = lambda: ready.tell("on_kill")
            if reinstalled:
                signal.signal(signal.SIGTERM, handle_sigterm)
            ready.tell("ready")
            pause_for_ever()

        def execute() -> None:
            with forked(be_child) as pid:
                assert ready.hear() == "ready"
                os.kill(pid, signal.SIGTERM)
                assert ended_by(pid) == signal.SIGTERM

        runner.prepare()
        run_interruptibly(execute)
        assert runner.notes == []
        ready.close()

    def test_forked_child_needs_no_handler(self, runner: Runner) -> None:
        """SIGTERM ends it by itself: while it is in C code, or waits for a lock, no handler runs."""
        runner.prepare()
        told = Relay()
        with forked(lambda: told.tell(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)):
            assert told.hear() is True
        told.close()

    def test_forked_child_with_a_handler(self, runner: Runner) -> None:
        """One that has a handler of its own keeps it."""
        runner.prepare()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told = Relay()
        with forked(lambda: told.tell(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)):
            assert told.hear() is True
        told.close()

    def test_nested_task(self, runner: Runner) -> None:
        """A task that runs another in its own process, as ``dag.test()`` does, is told to stop after that one."""

        def run_inner() -> None:
            runner.prepare("inner on_kill")
            run_interruptibly(stop)

        def execute() -> None:
            # The second signal may come before the inner task is through with the first.
            with contextlib.suppress(TaskInterrupted):
                run_inner()
            # Whatever it does then.
            wait_for_interruption()
            runner.note("unreachable")

        assert runner.run(execute) == ["inner on_kill", "on_kill"]

    def test_nested_task_that_has_just_ended(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        """So is one whose inner task is interrupted when its execute() has returned, and nothing is restored yet."""
        finish = interruption.Interruption._finish
        interrupting = [stop]

        def finish_interrupted(task: Any, *args: Any) -> None:
            if interrupting:
                interrupting.pop()()
            finish(task, *args)

        def execute() -> None:
            runner.prepare("inner on_kill")
            monkeypatch.setattr(interruption.Interruption, "_finish", finish_interrupted)
            with contextlib.suppress(TaskInterrupted):
                run_interruptibly(lambda: None)
            wait_for_interruption()
            runner.note("unreachable")

        assert runner.run(execute) == ["inner on_kill", "on_kill"]

    def test_nested_task_that_has_ended(self, runner: Runner) -> None:
        """Once it has, SIGTERM is for the task that has run it."""

        def execute() -> None:
            runner.prepare("inner on_kill")
            assert run_interruptibly(lambda: "result") == "result"
            stop()

        assert runner.run(execute) == ["on_kill"]

    def test_next_task(self, runner: Runner) -> None:
        """A task that the same process runs after another one is interrupted as that was."""
        runner.prepare("first")
        run_interruptibly(lambda: None)
        assert runner.run(stop) == ["on_kill"]

    def test_other_threads(self, runner: Runner) -> None:
        """Another thread than the main one gets no signals: it installs nothing, and its task runs as ever."""
        results: list[Any] = []

        def be_thread() -> None:
            interrupt_on_sigterm(make_ti())
            results.append(run_interruptibly(lambda: "result"))

        former = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=be_thread)
        thread.start()
        thread.join()
        assert results == ["result"]
        assert signal.getsignal(signal.SIGTERM) is former
        assert interruption._current is None

    def test_thread_beside_a_task(self, runner: Runner) -> None:
        """A task of another thread is not the main thread's."""

        def execute() -> None:
            thread = threading.Thread(target=lambda: run_interruptibly(lambda: runner.note("thread")))
            thread.start()
            thread.join()
            stop()

        assert runner.run(execute) == ["thread", "on_kill"]


def answer(status: int | None) -> AirflowRuntimeError:
    """Return what the runner gets for an answer of the API that is an error; with no status, without a detail."""
    detail = {"status_code": status} if status else None
    return AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail=detail))


class TestReportState:
    def test_told(self) -> None:
        """The message is sent, however the task has ended."""
        sent: list[Any] = []
        for error in (None, ValueError(), TaskInterrupted()):
            report_state(lambda *, msg: sent.append(msg), "state", error)
        assert sent == ["state"] * 3

    def test_conflict_after_an_interruption(self) -> None:
        """A task that was interrupted because the server has ended it runs no callbacks: its runner exits, with failure."""

        def send(*, msg: Any) -> None:
            raise answer(409)

        with pytest.raises(SystemExit) as raised:
            report_state(send, "state", TaskInterrupted())
        assert raised.value.code == 1

    @pytest.mark.parametrize(
        ("status", "error"),
        [(409, None), (409, ValueError()), (500, TaskInterrupted()), (None, TaskInterrupted())],
    )
    def test_other_failures(self, status: int | None, error: BaseException | None) -> None:
        """They are the runner's, as ever."""

        def send(*, msg: Any) -> None:
            raise answer(status)

        with pytest.raises(AirflowRuntimeError):
            report_state(send, "state", error)
