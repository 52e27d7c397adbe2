"""Supervise random trees: `python -m tests.random_trees.driver COOKIE [BUG]`, by an interpreter that has the SDK.

An example is a JSON line on stdin, and so is what came of it on stdout (examples.py has both). Each has a supervisor process
of its own, and beside it a second one with the same tree. If that is allowed, all live in a PID namespace, where strangers take
the numbers of those that have gone. Orphans become children of the driver, which finds and ends all of
them; not of the supervisors, for those in production are no subreapers either. Python 3.9 and the packages of the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
from task_sdk.execution_time.teardown.supervised.supervised_task import ending_all, fork, in_turn, start_task

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess
from airflow.sdk.execution_time.teardown import lifeline, orphans, sweep, watchdog
from tests.harness.processes import DEAD, Process, has_exited, read_state, read_strings, wait_for_exit
from tests.harness.scenario import EXITS, PlannedApi, be_patient, take_startup_message
from tests.random_trees.bugs import BUGS
from tests.random_trees.member import Tree, announce, count_members, do_steps, stay, stop
from tests.random_trees.strangers import Strangers, enter_namespace, find_refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Callable

HEARTBEAT_INTERVAL = 0.05
SOCKET_CLEANUP_TIMEOUT = 0.1
"""Seconds that a task which succeeded waits for those that it leaves and that hold its sockets."""
SETTLE_TIMEOUT = 20.0
"""Seconds that a tree has to grow, on a machine that is busy."""
RETURN_TIMEOUT = 25.0
"""Seconds after which a supervisor hangs."""
POLL_INTERVAL = 0.002
"""Seconds between looks for numbers that are free."""

TASK, OTHER = "task", "other"
ORDERS = {"409": "409", "exit-1": "exit-1", "success": "success", "success-orphaned": "success"}
"""What a task, or its server, is ordered to do in the end, by the ending of the example."""
BYSTANDERS = {"in the supervisor's group": False, "in a session of its own": True}


class Scene:
    """What the processes of one example have told so far."""

    def __init__(self, example: dict[str, Any], cookie: str, *, strangers: bool) -> None:
        self.example = example
        self.cookie = cookie
        self.reader, self.writer = os.pipe()
        self._unread = b""
        self.strangers = Strangers(self.announce_stranger) if strangers else None
        self.supervisors: dict[str, int] = {}
        self.runners: dict[str, int] = {}
        self.members: dict[str, list[dict[str, Any]]] = {TASK: [], OTHER: []}
        self.returned: dict[str, dict[str, Any]] = {}
        self.bystanders: dict[str, int] = {}

    def tell(self, **line: Any) -> None:
        os.write(self.writer, json.dumps(line, default=str).encode() + b"\n")

    def hear(self, deadline: float) -> None:
        """Take one line in; raise TimeoutError when none comes."""
        while b"\n" not in self._unread:
            if not select.select([self.reader], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            self._unread += os.read(self.reader, 1 << 16)
        line, self._unread = self._unread.split(b"\n", 1)
        told = json.loads(line)
        if "id" in told:
            self.members[told["tree"]].append(told)
        elif "runner" in told:
            self.supervisors[told["tree"]] = told["supervisor"]
            self.runners[told["tree"]] = told["runner"]
        elif "returned_at" in told:
            self.returned[told["tree"]] = told
        else:
            self.bystanders[told["bystander"]] = told["pid"]

    def announce_stranger(self, name: str) -> None:
        self.tell(bystander=name, pid=os.getpid())

    def take_numbers(self) -> None:
        """Have strangers take the numbers of those of the task that have gone."""
        if self.strangers:
            self.strangers.take({self.supervisors[TASK]}, may_exit=False)
            self.strangers.take({self.runners[TASK], *(member["pid"] for member in self.members[TASK])})

    def follow(self, is_over: Callable[[], bool], deadline: float) -> None:
        """Hear what is told until something is over, and have strangers take numbers meanwhile."""
        while not is_over():
            self.take_numbers()
            try:
                self.hear(min(deadline, time.monotonic() + POLL_INTERVAL))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def run_example(example: dict[str, Any], cookie: str, *, strangers: bool) -> dict[str, Any]:
    """Let a task grow its tree beside another task with the same, end it, and tell what became of them."""
    size = count_members(example["script"])
    shorten_orphan_grace(example["grace"])
    with contextlib.closing(Scene(example, cookie, strangers=strangers)) as scene:
        others_order = start_supervisor(scene, OTHER)
        settle(scene, OTHER, size)
        order = start_supervisor(scene, TASK)
        settle(scene, TASK, size - example["early"])
        end = {"killed": kill_runner, "orphaned": kill_supervisor}.get(example["ending"], lambda _scene: None)
        runner = os.pidfd_open(scene.runners[TASK])
        began = time.monotonic()
        end(scene)
        os.close(order)
        answer = observe(scene, began, runner)
        os.close(others_order)
        os.close(runner)
    return answer


def shorten_orphan_grace(grace: float) -> None:
    """Have watchdogs and sweeps give the same grace as a kill, in what this process forks from now on."""
    lifeline.ORPHAN_GRACE = grace  # type: ignore[attr-defined]
    sweep.end_orphans = partial(orphans.end_orphans, grace=grace)  # type: ignore[attr-defined]


def start_supervisor(scene: Scene, name: str) -> int:
    """Return a descriptor; closing it is the task's order to end."""
    reader, writer = os.pipe()
    plan = {"ending": ORDERS.get(scene.example["ending"]), "order": reader}

    def lead() -> None:
        os.close(writer)
        os.setsid()
        # A supervisor that leads neither session nor group leaves its number to others when it dies.
        fork(lambda: supervise(scene, name, plan))

    os.waitpid(fork(lead), 0)
    os.close(reader)
    return writer


def supervise(scene: Scene, name: str, plan: dict[str, Any]) -> NoReturn:
    os.environ["AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME"] = str(scene.example["grace"])
    if name == TASK:
        start_bystanders(scene)
    api = PlannedApi(plan)
    process = start_task(in_turn(take_startup_message, lambda: run_task(scene, name, plan)), api)
    scene.tell(tree=name, runner=process.pid, supervisor=os.getpid())
    exception = None
    try:
        process.wait()
    except Exception as error:  # noqa: BLE001  # whatever the supervisor dies of is the result
        traceback.print_exc()
        exception = f"{type(error).__name__}: {error}"
    end = {"exception": exception, "conflict_at": api.conflict_at, "returned_at": time.monotonic()}
    scene.tell(tree=name, **end)
    stay()


def start_bystanders(scene: Scene) -> None:
    for name, new_session in BYSTANDERS.items():
        if os.fork() == 0:
            if new_session:
                os.setsid()
            scene.tell(bystander=name, pid=os.getpid())
            stay()


def run_task(scene: Scene, name: str, plan: dict[str, Any]) -> NoReturn:
    # The kernel's own, for groups with stopped members whose last relative outside exits: setpgid(2).
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    be_runner(scene.example["script"], Tree(scene.cookie, name, scene.writer, supervise_inner_task))
    if plan["ending"] in EXITS:
        os.read(plan["order"], 1)
        sys.exit(EXITS[plan["ending"]])
    stay()


def be_runner(script: dict[str, Any], tree: Tree) -> None:
    do_steps(script, tree)
    announce(script, tree)
    if script["then"] == "stop":
        stop()


def supervise_inner_task(script: dict[str, Any], tree: Tree) -> NoReturn:
    """Supervise a task from within a task, until it ends or this process is told to stop."""

    def run_inner_task() -> NoReturn:
        be_runner(script, tree)
        stay()

    # A runner's own are closed when others replace them, and so are their descriptors, by then those of the inner one.
    kept = sys.stdin, sys.stdout, sys.stderr
    try:
        start_task(in_turn(take_startup_message, run_inner_task)).wait()
    except BaseException:  # noqa: BLE001  # a forked copy of the runner must not go on as such
        traceback.print_exc()
    finally:
        del kept
        os._exit(0)


def settle(scene: Scene, name: str, members: int) -> None:
    """Wait until a tree has so many members, and those that were to exit have done so."""
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while (
        name not in scene.runners
        or (name == TASK and len(scene.bystanders) < len(BYSTANDERS))
        or len(scene.members[name]) < members
    ):
        scene.hear(deadline)
    exiting = [Process(member["pid"], name) for member in scene.members[name] if member["then"] == "exit"]
    if not wait_for_exit(exiting, deadline - time.monotonic()):
        raise TimeoutError


def kill_runner(scene: Scene) -> None:
    os.kill(scene.runners[TASK], signal.SIGKILL)


def kill_supervisor(scene: Scene) -> None:
    """Kill the supervisor, and have a stranger take its number."""
    os.kill(scene.supervisors[TASK], signal.SIGKILL)
    os.waitpid(scene.supervisors[TASK], 0)
    scene.take_numbers()


def observe(scene: Scene, began: float, runner: int) -> dict[str, Any]:
    """Wait until the task is over, and describe the scene at that moment. `runner`: a pidfd."""
    deadline = time.monotonic() + RETURN_TIMEOUT
    orphaned = scene.example["ending"] == "orphaned"
    end: dict[str, Any] = {"exception": None}
    try:
        if orphaned:
            await_end_of_orphans(scene, runner, deadline)
        else:
            scene.follow(lambda: TASK in scene.returned, deadline)
            end = scene.returned[TASK]
    except TimeoutError:
        return {
            "hung": True,
            "alive": list_alive(),
            "harmed": list_harmed(scene),
            "seconds": RETURN_TIMEOUT,
        }
    if scene.example["ending"] == "success-orphaned":
        kill_supervisor(scene)
        sweep_apart(scene, deadline + RETURN_TIMEOUT)
    return {
        "hung": False,
        "alive": list_alive(spares_dying=orphaned),
        "harmed": list_harmed(scene),
        "seconds": end.get("returned_at", time.monotonic()) - (end.get("conflict_at") or began),
        "exception": end["exception"],
    }


def await_end_of_orphans(scene: Scene, runner: int, deadline: float) -> None:
    """Wait until a runner without a supervisor has noticed, and has been ended; look for it if it cannot notice."""

    def is_stopped() -> bool:
        return read_state(scene.runners[TASK]) in {"T", "t"}

    scene.follow(lambda: has_exited(runner) or is_stopped(), deadline)
    if not has_exited(runner):
        sweep_apart(scene, deadline)
    scene.follow(lambda: not list_watchdogs(), deadline)


def sweep_apart(scene: Scene, deadline: float) -> None:
    """Look for orphans as the next supervisor does, in a process that has not done so."""
    sweeper = fork(lambda: sweep.sweep_once(supervisor.conf))
    scene.follow(lambda: os.waitpid(sweeper, os.WNOHANG)[0] == sweeper, deadline)


def list_watchdogs() -> list[int]:
    """Return what runners have executed to end them."""
    pids = [process.pid for process in psutil.Process().children(recursive=True)]
    return [pid for pid in pids if os.fsencode(watchdog.__file__) in read_strings(pid, "cmdline")]


def list_alive(*, spares_dying: bool = False) -> list[int]:
    """Return the ids of the task's members that are alive, themselves or in what they forked.

    `spares_dying`: not those that were sent SIGKILL, and wait for a processor to die. A supervisor tells of them; a watchdog
    has nobody to tell.
    """
    pids = [process.pid for process in psutil.Process().children(recursive=True)]
    ids = {
        read_id(pid) for pid in pids if read_state(pid) not in DEAD and not (spares_dying and is_dying(pid))
    }
    return sorted(number for number in ids if number is not None)


def is_dying(pid: int) -> bool:
    """Whether SIGKILL is pending (proc_pid_status(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [line.split()[1] for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(int(mask, 16) >> signal.SIGKILL - 1 & 1 for mask in pending)


def read_id(pid: int) -> int | None:
    """Return the id of a member of the task's tree; None for anybody else."""
    try:
        name, _, number = Path(f"/proc/{pid}/comm").read_text().strip().partition(".")
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    if name == TASK:
        return int(number)
    # After exec, a process is called as its file until it has got to renaming itself.
    return json.loads(arguments[-2])["id"] if arguments[-4:-3] == [TASK] else None


def list_harmed(scene: Scene) -> list[str]:
    """Return who has ended or been stopped without having to do with the task."""
    neighbours = dict(scene.bystanders)
    may_be_stopped = {"other runner": scene.runners[OTHER]}
    for member in scene.members[OTHER]:
        if member["then"] != "exit":
            group = may_be_stopped if member["then"] == "stop" else neighbours
            group[f"other member {member['id']}"] = member["pid"]
    harmed = [name for name, pid in neighbours.items() if read_state(pid) in {*DEAD, "T"}]
    return harmed + [name for name, pid in may_be_stopped.items() if read_state(pid) in DEAD]


def main() -> None:
    refusal = find_refusal()
    if not refusal:
        enter_namespace()
    # Whatever the SDK prints must not end up among the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    supervisor.MIN_HEARTBEAT_INTERVAL = HEARTBEAT_INTERVAL
    supervisor.SOCKET_CLEANUP_TIMEOUT = SOCKET_CLEANUP_TIMEOUT
    ActivitySubprocess._upload_logs = lambda _self: None
    be_patient()
    for answer in drive(refusal, *sys.argv[1:]):
        os.write(answers, json.dumps(answer).encode() + b"\n")


def drive(refusal: str | None, cookie: str, *bugs: str) -> Iterator[dict[str, Any]]:
    """Plant bugs, and run the examples on stdin; yield that one is ready, and then what came of each.

    `refusal`: why no strangers take numbers that are free, if there are none.
    """
    if unknown := set(bugs) - set(BUGS):
        yield {"failed": f"there is no bug {' or '.join(sorted(unknown))}: choose from {', '.join(BUGS)}"}
        return
    for bug in bugs:
        BUGS[bug]()
    yield {"refusal": refusal}
    for line in sys.stdin:
        try:
            with ending_all():
                answer = run_example(json.loads(line), cookie, strangers=not refusal)
        except TimeoutError:
            answer = {"failed": "the tree did not grow"}
        yield answer


if __name__ == "__main__":
    main()
