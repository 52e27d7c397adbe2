"""Supervise random trees: `python -m tests.random_trees.driver COOKIE [BUG]`, by an interpreter that has the SDK.

An example is a JSON line on stdin, and so is what came of it on stdout (examples.py has both). Each has a supervisor process
of its own, and beside it a second one with the same tree. Orphans become children of the driver, which finds and ends all of
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from airflow.sdk.execution_time import supervisor
from airflow.sdk.execution_time.supervisor import ActivitySubprocess
from tests.harness.processes import Process, kill_if, read_state, set_subreaper, wait_for_exit
from tests.harness.scenario import EXITS, TaskInstances, describe_task, make_recorder
from tests.harness.shapes import NOT_ENDED_EVENT
from tests.random_trees.bugs import BUGS
from tests.random_trees.member import Tree, announce, count_members, do_steps, stay

if TYPE_CHECKING:
    from collections.abc import Iterator

HEARTBEAT_INTERVAL = 0.05
SOCKET_CLEANUP_TIMEOUT = 0.1
"""Seconds that a task which succeeded waits for those that it leaves and that hold its sockets."""
SETTLE_TIMEOUT = 20.0
"""Seconds that a tree has to grow, on a machine that is busy."""
RETURN_TIMEOUT = 15.0
"""Seconds after which a supervisor hangs."""
CLEANUP_TIMEOUT = 10.0

TASK, OTHER = "task", "other"
BYSTANDERS = {"in the supervisor's group": False, "in a session of its own": True}


class Scene:
    """What the processes of one example have told so far."""

    def __init__(self, example: dict[str, Any], cookie: str) -> None:
        self.example = example
        self.cookie = cookie
        self.reader, self.writer = os.pipe()
        self._unread = b""
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
            self.runners[told["tree"]] = told["runner"]
        elif "returned_at" in told:
            self.returned[told["tree"]] = told
        else:
            self.bystanders[told["bystander"]] = told["pid"]

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def run_example(example: dict[str, Any], cookie: str) -> dict[str, Any]:
    """Let a task grow its tree beside another task with the same, end it, and tell what became of them."""
    size = count_members(example["script"])
    with contextlib.closing(Scene(example, cookie)) as scene:
        others_order = start_supervisor(scene, OTHER)
        settle(scene, OTHER, size)
        order = start_supervisor(scene, TASK)
        settle(scene, TASK, size - example["early"])
        began = time.monotonic()
        if example["ending"] == "killed":
            os.kill(scene.runners[TASK], signal.SIGKILL)
        os.close(order)
        answer = observe(scene, began)
        os.close(others_order)
    return answer


def start_supervisor(scene: Scene, name: str) -> int:
    """Return a descriptor; closing it is the task's order to end."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        try:
            supervise(scene, name, {"ending": scene.example["ending"], "order": reader})
        except BaseException:  # noqa: BLE001  # a forked copy of the driver must not go on driving
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(reader)
    return writer


def supervise(scene: Scene, name: str, plan: dict[str, Any]) -> NoReturn:
    os.setsid()
    os.environ["AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME"] = str(scene.example["grace"])
    if name == TASK:
        start_bystanders(scene)
    api = TaskInstances(plan)
    log: list[dict[str, Any]] = []
    task = describe_task(api, lambda: run_task(scene, name, plan), make_recorder(log))
    process = ActivitySubprocess.start(**task)
    scene.tell(tree=name, runner=process.pid)
    exception = None
    try:
        process.wait()
    except Exception as error:  # noqa: BLE001  # whatever the supervisor dies of is the result
        traceback.print_exc()
        exception = f"{type(error).__name__}: {error}"
    end = {"exception": exception, "conflict_at": api.conflict_at, "returned_at": time.monotonic()}
    scene.tell(tree=name, told_of_rest=any(event["event"] == NOT_ENDED_EVENT for event in log), **end)
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
    tree = Tree(scene.cookie, name, scene.writer)
    do_steps(scene.example["script"], tree)
    announce(scene.example["script"], tree)
    if plan["ending"] in EXITS:
        os.read(plan["order"], 1)
        sys.exit(EXITS[plan["ending"]])
    stay()


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


def observe(scene: Scene, began: float) -> dict[str, Any]:
    """Wait for the supervisor's return, and describe the scene at that moment."""
    deadline = time.monotonic() + RETURN_TIMEOUT
    try:
        while TASK not in scene.returned:
            scene.hear(deadline)
    except TimeoutError:
        return {
            "hung": True,
            "alive": list_alive(),
            "harmed": list_harmed(scene),
            "seconds": RETURN_TIMEOUT,
        }
    alive = list_alive()
    end = scene.returned[TASK]
    return {
        "hung": False,
        "alive": alive,
        "harmed": list_harmed(scene),
        "seconds": end["returned_at"] - (end["conflict_at"] or began),
        "exception": end["exception"],
        "told_of_rest": end["told_of_rest"],
    }


def list_alive() -> list[int]:
    """Return the ids of the task's members that are alive, themselves or in what they forked."""
    pids = [process.pid for process in psutil.Process().children(recursive=True)]
    ids = {read_id(pid) for pid in pids if read_state(pid) not in {"Z", "X", "gone"}}
    return sorted(number for number in ids if number is not None)


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
    harmed = [name for name, pid in neighbours.items() if read_state(pid) in {"Z", "X", "T", "gone"}]
    return harmed + [name for name, pid in may_be_stopped.items() if read_state(pid) in {"Z", "X", "gone"}]


def end_descendants() -> None:
    """Kill and collect everything that an example has started."""
    deadline = time.monotonic() + CLEANUP_TIMEOUT
    while children := psutil.Process().children(recursive=True):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still there after SIGKILL: {children}")
        for process in children:
            kill_if(lambda _pid: process.is_running(), process.pid)  # noqa: B023  # called at once
        collect_children()


def collect_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    set_subreaper(wanted=True)
    # Whatever the SDK prints must not end up among the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    supervisor.MIN_HEARTBEAT_INTERVAL = HEARTBEAT_INTERVAL
    supervisor.SOCKET_CLEANUP_TIMEOUT = SOCKET_CLEANUP_TIMEOUT
    ActivitySubprocess._upload_logs = lambda _self: None
    for answer in drive(*sys.argv[1:]):
        os.write(answers, json.dumps(answer).encode() + b"\n")


def drive(cookie: str, *bugs: str) -> Iterator[dict[str, Any]]:
    """Plant bugs, and run the examples on stdin; yield that one is ready, and then what came of each."""
    if unknown := set(bugs) - set(BUGS):
        yield {"failed": f"there is no bug {' or '.join(sorted(unknown))}: choose from {', '.join(BUGS)}"}
        return
    for bug in bugs:
        BUGS[bug]()
    yield {}
    for line in sys.stdin:
        try:
            answer = run_example(json.loads(line), cookie)
        except TimeoutError:
            answer = {"failed": "the tree did not grow"}
        finally:
            end_descendants()
        yield answer


if __name__ == "__main__":
    main()
