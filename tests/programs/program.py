"""What the session runs: a program, and a way in which the task that has started it ends."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.real.running import Case

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SHELL = "shell"
"""The task of the Dag that runs a script, as BashOperator does."""

TOOLS = os.pathsep.join(
    [
        *(os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"),
        *map(str, Path("/usr/lib/postgresql").glob("*/bin")),  # where Debian has pg_ctl
    ]
)
"""Where programs are looked for."""

# `await` waits for what belongs to nobody who could be waited for.
BEFORE = """\
set -eu
cd "$DATA"
exec > log 2>&1 < /dev/null
PATH=$TOOLS
await() { until "$@" > /dev/null 2>&1; do sleep 0.1; done; }
as_user() { if [ "$(id -u)" = 0 ]; then setpriv --reuid="$1" --regid="$1" --clear-groups "${@:2}"; else "${@:2}"; fi; }
"""
AFTER = """
echo '{"event": "ready"}' > "$TOLD"
read -r _ < "$FREED"
exit 1
"""
"""Waits without a process of its own: `read` opens a FIFO that nobody writes to before the task may end, and fail."""


@dataclass(frozen=True)
class Program:
    """A program, by the command with which people start it."""

    name: str
    script: str = ""
    """What the shell does until the program is there; in a folder of its own, which DATA names. PORT is free on loopback,
    PYTHON the interpreter that Airflow runs on."""
    task: str = SHELL
    needs: tuple[str, ...] = ()
    """Other programs."""
    packages: tuple[str, ...] = ()
    """What is installed beside Airflow, as of the release's day."""
    large: bool = False
    """Whether these are so large that they are installed only where somebody asks for them."""
    root: bool = False
    """Whether it takes root to start it so."""
    public: bool = False
    """Whether it listens on every network: it is run only where these can be kept from it."""
    stays: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Names of processes that the patched side may leave, each with the documented reason."""
    stays_after: tuple[str, ...] = ()
    """Names of the ways after which it may; all without any."""

    @property
    def text(self) -> str:
        """The whole script."""
        return f"{BEFORE}{self.script.strip()}{AFTER}"

    def list_missing(self) -> Iterator[str]:
        """Yield what the machine has not."""
        for tool in self.needs:
            if shutil.which(tool, path=TOOLS) is None:
                yield tool
        if self.root and os.geteuid() != 0:
            yield "root"


GRACE = 5
"""Seconds of [core] killed_task_cleanup_time."""
SETTLE = 2.0
"""Seconds that what is left has to end by itself, before it counts as left."""
ORPHAN_TIME = GRACE + 7.0
"""The same where nobody is left to end it but the task itself: the grace, and the time that a busy machine needs."""
PATIENCE = 15.0
"""Seconds after which a supervisor hangs; more than the grace."""
BY_ITSELF = "by itself"
STOP = {"AIRFLOW__WORKERS__STOP_SIGNAL_POLICY": "stop"}


@dataclass(frozen=True)
class Way:
    """How a task ends."""

    name: str
    title: str
    end: str
    """A signal, the status of the answer to a heartbeat, or BY_ITSELF."""
    to: str = "supervisor"
    left_for: float = SETTLE

    def make_case(self, program: Program, settings: Mapping[str, str], *, everything: bool) -> Case:
        """Return the case in which the task that has started a program ends so."""
        return Case(
            program.task,
            self.end,
            to=self.to,
            dag="programs",
            grace=GRACE,
            patience=PATIENCE,
            left_for=self.left_for,
            everything=everything,
            free=self.end == BY_ITSELF,
            settings={**STOP, **settings, "TOOLS": TOOLS, "PROGRAM": program.text},
        )


WAYS = (
    Way("409", "set to failed", "409"),
    Way("SIGTERM", "SIGTERM to the supervisor", "SIGTERM"),
    Way("runner", "SIGKILL of the runner", "SIGKILL", to="runner"),
    Way("fails", "the task fails", BY_ITSELF),
    Way("SIGKILL", "SIGKILL of the supervisor", "SIGKILL", left_for=ORPHAN_TIME),
)
