"""One Airflow on this machine: its database, its servers on loopback, and a home that goes with it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from patches.errors import PatchError
from patches.releases import ROOT
from tests.e2e.client import ApiError, Client
from tests.e2e.servers import Server, find_free_port, is_listening, run_server, tail, wait_until
from tests.harness.environments import CACHE, clean_env, create_environment
from tests.harness.processes import kill_inside
from tests.harness.supervised import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from patches.releases import Release
    from tests.harness.environments import Environment

Executor = Literal["local", "celery"]
EXECUTORS: tuple[Executor, ...] = get_args(Executor)

EXECUTOR_CLASSES: dict[Executor, str] = {"local": "LocalExecutor", "celery": "CeleryExecutor"}
DAGS = "tests/e2e/dags"
PACKAGES = ("apache-airflow-providers-celery",)

SLOTS = 14
"""Tasks that run at a time: those of a run, and once more when they are cleared."""
SETUP_TIMEOUT = 300.0
"""Seconds for a command that migrates the database or reads the DAGs."""
SQLITE_LOCK_TIMEOUT = 60
"""Seconds that a writer waits for another one; sqlite3's own 5 are less than a busy machine may take over a write."""
EXECUTION_API_TIMEOUT = 60.0
"""Seconds that a supervisor waits for an answer, from 3.1.1 on; before, it is always Airflow's default, 5."""
# Nothing here is secret: it all listens on loopback, for minutes, with made-up tasks.
SECRET = "not-a-secret-" * 8


class SetupFailedError(PatchError):
    """What a deployment needs could not be had; the message says why."""


@dataclass(frozen=True)
class Installation:
    """An Airflow ready to be started: an environment, and a database that has been migrated and knows the DAGs."""

    environment: Environment
    patched: bool
    database: Path
    logs: Path
    """Where every log of a deployment goes when it ends."""
    place: Path = ROOT
    """Where the tasks find the DAGs and what these import from the repository."""

    @property
    def release(self) -> Release:
        return self.environment.release


@dataclass(frozen=True)
class Airflow:
    """A running Airflow."""

    installation: Installation
    executor: Executor
    folder: Path
    client: Client
    worker: Server
    """The server below which the supervisors run: the Celery worker, or the scheduler with a LocalExecutor."""
    servers: list[Server] = field(default_factory=list)

    def read_logs(self) -> dict[str, str]:
        """Return every log, those of the tasks among them, by its path in the folder."""
        return {
            str(log.relative_to(self.folder)): log.read_text(errors="replace")
            for log in find_logs(self.folder)
        }

    def tail_logs(self) -> str:
        """Return the last lines of every log, each under a heading."""
        return "\n".join(tail(log) for log in find_logs(self.folder))

    def read_task_log(self, dag: str, run: str, task: str, attempt: int = 1) -> str:
        """Return what a try of a task has in its log, JSON lines; "" if there is none."""
        path = f"airflow/logs/dag_id={dag}/run_id={run}/task_id={task}/attempt={attempt}.log"
        return self.read_logs().get(path, "")


def install(
    release: Release, wheel: Path | None, python: str | None = None, cache: Path = CACHE
) -> Environment:
    """Return an environment from which all servers can be started; patched if there is a `wheel`."""
    return create_environment(
        release, packages=PACKAGES, wheel=wheel, python=python, complete=True, cache=cache
    )


def prepare_database(environment: Environment, folder: Path) -> Path:
    """Make a database in `folder` that knows the DAGs, and return its path; each deployment gets a copy."""
    env = airflow_env(environment, folder, "local", find_free_port())
    log = folder / "setup.log"
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        with log.open("ab") as output:
            try:
                subprocess.run(
                    [environment.python, "-m", "airflow", *command],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=SETUP_TIMEOUT,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                raise SetupFailedError(
                    f"`airflow {' '.join(command)}` failed: {error}\n{tail(log)}"
                ) from None
    return folder / "airflow" / "airflow.db"


@contextmanager
def run_airflow(
    installation: Installation,
    executor: Executor,
    *,
    worker_prefix: Sequence[str] = (),
    user: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Airflow]:
    """Run an Airflow until the block ends; then nothing that it has started is there any more.

    `worker_prefix` is a command that starts the worker (see Airflow.worker) with a change of its own, such as env(1).
    `user` is the one that every server runs as, this process's unless it is given, and `variables` are in the environment
    of all of them. Everything of an Airflow has its working directory in the Airflow's folder, and is known by it.

    Raises ServerFailedError when a server does not get ready.
    """
    environment = installation.environment
    with make_home(installation, executor, user) as (folder, env, client), ExitStack() as stack:
        env.update(variables or {})
        airflow = [str(environment.python), "-m", "airflow"]

        def start(name: str, *command: str) -> Server:
            return stack.enter_context(run_server(name, command, folder=folder, env=env, user=user))

        servers = []
        if executor == "celery":
            servers.append(start_broker(start, env))
        api = start("api-server", *airflow, "api-server")
        local_prefix = worker_prefix if executor == "local" else ()
        scheduler = start("scheduler", *local_prefix, *airflow, "scheduler", "--skip-serve-logs")
        servers += [api, scheduler]
        worker = scheduler
        if executor == "celery":
            worker = start("worker", *worker_prefix, *airflow, "celery", "worker", "--skip-serve-logs")
            servers.append(worker)
        wait_until(lambda: is_api_ready(client), *servers, what="the API server answers")
        if executor == "celery":
            ready = lambda: " ready." in worker.log.read_text(errors="replace")  # noqa: E731
            wait_until(ready, *servers, what="the Celery worker is ready")
        client.log_in()
        yield Airflow(installation, executor, folder, client, worker, servers)


@contextmanager
def make_home(
    installation: Installation, executor: Executor, user: str | None = None
) -> Iterator[tuple[Path, dict[str, str], Client]]:
    """Yield a folder with the database, a user's own if one is given, the variables and a client of an Airflow in it.

    When the block ends, the logs are kept, and every process in the folder is killed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="e2e-", ignore_cleanup_errors=True) as folder_name,
        ExitStack() as stack,
    ):
        folder = Path(folder_name).resolve()
        stack.callback(keep_logs, folder, installation.logs)
        stack.callback(kill_inside, folder)
        port = find_free_port()
        env = airflow_env(installation.environment, folder, executor, port, installation.place)
        shutil.copy(installation.database, folder / "airflow" / "airflow.db")
        if user:
            give_to(user, folder)
        yield folder, env, Client(f"http://127.0.0.1:{port}")


def give_to(user: str, folder: Path) -> None:
    """Make an Airflow's folder a user's own, which those may enter that the tasks run as."""
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, user)
    folder.chmod(0o755)
    (folder / "tmp").chmod(0o1777)


def find_logs(folder: Path) -> list[Path]:
    """Return the logs of the servers and the tasks of an Airflow."""
    return sorted([*folder.glob("*.log"), *folder.glob("airflow/logs/**/*.log")])


def keep_logs(folder: Path, destination: Path) -> None:
    """Copy the logs of an Airflow, in place of those of a run before."""
    shutil.rmtree(destination, ignore_errors=True)
    for log in find_logs(folder):
        copy = destination / log.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, copy)


def start_broker(start: Callable[..., Server], env: dict[str, str]) -> Server:
    """Start a Redis, and tell Airflow of it."""
    port = find_free_port()
    env["AIRFLOW__CELERY__BROKER_URL"] = f"redis://127.0.0.1:{port}/0"
    options = ("--bind", "127.0.0.1", "--save", "")
    broker = start("redis", find_redis(), "--port", str(port), *options)
    wait_until(lambda: is_listening(port), broker, what="Redis listens")
    return broker


def check_tools(executors: Sequence[Executor]) -> None:
    """Raise SetupFailedError if something is missing that the executors need."""
    if "celery" in executors:
        find_redis()


def find_redis() -> str:
    """Return the path of redis-server; raise SetupFailedError if there is none."""
    found = shutil.which("redis-server")
    if found is None:
        raise SetupFailedError(
            "redis-server is not installed, and the Celery executor needs it: `apt-get install redis-server` gets it "
            "on Debian and Ubuntu. Without it, give `local` as the executor."
        )
    return found


def is_api_ready(client: Client) -> bool:
    """Tell whether the API answers, and have the part imported that the tasks will speak to."""
    try:
        client.request("GET", "/execution/health")
    except (ApiError, OSError):
        return False
    return True


def airflow_env(
    environment: Environment, folder: Path, executor: Executor, port: int, place: Path = ROOT
) -> dict[str, str]:
    """Return the environment variables of every command of an Airflow whose home is below `folder`."""
    database = folder / "airflow" / "airflow.db"
    env = clean_env(folder, python=environment.python)
    settings: dict[str, dict[str, object]] = {
        "CORE": {
            "DAGS_FOLDER": place / DAGS,
            "LOAD_EXAMPLES": False,
            "EXECUTOR": EXECUTOR_CLASSES[executor],
            "PARALLELISM": SLOTS,
            "DAGS_ARE_PAUSED_AT_CREATION": False,
            "SIMPLE_AUTH_MANAGER_ALL_ADMINS": True,
            "EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        },
        "DATABASE": {"SQL_ALCHEMY_CONN": f"sqlite:///{database}?timeout={SQLITE_LOCK_TIMEOUT}"},
        "API": {
            "HOST": "127.0.0.1",
            "PORT": port,
            "BASE_URL": f"http://127.0.0.1:{port}",
            "WORKERS": 1,
            "SECRET_KEY": SECRET,
        },
        "API_AUTH": {"JWT_SECRET": SECRET},
        "SCHEDULER": {
            "SCHEDULER_IDLE_SLEEP_TIME": 0.2,
            "SCHEDULER_HEARTBEAT_SEC": 1,
            "ENABLE_HEALTH_CHECK": False,
        },
        "WORKERS": {"EXECUTION_API_TIMEOUT": EXECUTION_API_TIMEOUT},
        "LOGGING": {"WORKER_LOG_SERVER_PORT": find_free_port()},
        # The other method is uv, which would fetch the seeds of a virtual environment from a package index.
        "STANDARD": {"VENV_INSTALL_METHOD": "pip"},
        "CELERY": {
            "RESULT_BACKEND": f"db+sqlite:///{folder}/results.db?timeout={SQLITE_LOCK_TIMEOUT}",
            "SYNC_PARALLELISM": 1,
            "WORKER_CONCURRENCY": SLOTS,
        },
    }
    return {
        **env,
        "PYTHONPATH": str(place),  # the DAGs use the actors of the harness
        "C_FORCE_ROOT": "1",
        **SETTINGS,
        **{
            f"AIRFLOW__{section}__{option}": str(value)
            for section, options in settings.items()
            for option, value in options.items()
        },
    }
