"""Running upstream's tests, as the sdist has them, against an installed wheel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from packaging.version import Version

from patches.errors import PatchError
from patches.releases import ROOT
from patches.upstream import fetch_sdist
from tests.harness.archives import extract
from tests.harness.environments import clean_env, create_environment
from tests.harness.namespaces import isolate
from tests.harness.processes import kill_all, read_strings
from tests.upstream.results import read_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from patches.releases import Release
    from tests.harness.environments import Environment
    from tests.upstream.results import Result

PLUGIN = Path(__file__).with_name("plugin")
RUNS = ROOT / ".cache" / "upstream-runs"
REPORTS = ROOT / ".cache" / "upstream-reports"
SUPERVISOR_TESTS = "tests/task_sdk/execution_time/test_supervisor.py"
# From 1.4 on.
RUNTIME_TESTS = "tests/task_sdk/coordinators/test_subprocess.py"
SUITE_TIMEOUT = 1200
# Of one test: ten times what the slowest takes on an idle machine.
TEST_TIMEOUT = 60
POLL_INTERVAL = 0.2
QUOTED_LINES = 15
LOG_TAIL_BYTES = 4096
# pytest's: every test passed, or some did not; anything else means that the run itself failed.
FINISHED = {0, 1}

# What upstream's tests and plugin import, beside what the SDK and the core bring along.
PACKAGES = (
    "boto3",
    "kgb",
    "kubernetes",
    "pandas<3",
    "pyarrow",
    "pytest",
    "pytest-asyncio",
    "pytest-mock",
    "pytest-timeout",
    "pytest-unordered",
    "watchtower",
)

PYTEST_OPTIONS = (
    *("-p", "no:cacheprovider"),
    # Early, for upstream's conftest imports airflow before it names the plugin.
    *("-p", "tests_common.pytest_plugin"),
    *("-p", "fill_gaps"),
    "--disable-capture-warnings",
    "--continue-on-collection-errors",
    # The only family with the file of a test, without which a node id cannot be put together.
    *("-o", "junit_family=xunit1"),
)


class SuiteFailedError(PatchError):
    """Upstream's tests could not be run to their end, which says nothing about the wheel, and certainly no good."""


def install_suite(release: Release, wheel: Path | None, flavour: str = "teardown") -> Environment:
    """Return an environment for upstream's tests, stock or with a patched wheel."""
    # From 3 on it no longer fakes time.monotonic, which the tests of the older lines need.
    time_machine = "time-machine>=3" if Version(release.version) >= Version("1.2.0") else "time-machine<3"
    # Its next version fails a test of 1.3.2, and this one a test of 1.4.
    amazon = "<=9.32.0" if Version(release.version) < Version("1.4.0b1") else ""
    return create_environment(
        release,
        packages=[*PACKAGES, time_machine],
        bare_packages=["apache-airflow-devel-common==0.1.1", f"apache-airflow-providers-amazon{amazon}"],
        wheel=wheel,
        flavour=flavour,
    )


def run_suite(
    environment: Environment,
    selection: Sequence[str],
    report: str,
    on_progress: Callable[[int], object] = lambda _percent: None,
    tests: Path | None = None,
) -> dict[str, Result]:
    """Run the selected tests, paths or node ids, and return their results.

    The tests are the sdist's, or those of `tests`, the task-sdk folder of a checkout.

    The log and the JUnit file are kept under the report's name. Raises SuiteFailedError when nothing was collected,
    or the run crashed or hung.
    """
    REPORTS.mkdir(parents=True, exist_ok=True)
    log, junit = REPORTS / f"{report}.log", REPORTS / f"{report}.xml"
    junit.unlink(missing_ok=True)
    arguments = [*selection, f"--timeout={TEST_TIMEOUT}", f"--junit-xml={junit}"]
    with make_folder(report) as folder:
        if tests:
            copy_tests(tests, folder)
        else:
            unpack_tests(fetch_sdist(environment.release), folder)
        status = run_pytest(environment, folder, arguments, log, on_progress)
    if status not in FINISHED or not junit.exists():
        raise SuiteFailedError(f"{report}: pytest ended with status {status}, see {log}:\n{quote_end(log)}")
    results = read_report(junit)
    if not results:
        raise SuiteFailedError(f"{report}: no test was run, see {log}.")
    return results


@contextlib.contextmanager
def make_folder(report: str) -> Iterator[Path]:
    """Make a folder for one run; when it ends, so do the processes that the run has left behind."""
    RUNS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{report}-", dir=RUNS))
    try:
        yield folder
    finally:
        end_processes(folder)
        shutil.rmtree(folder)


def unpack_tests(sdist: Path, folder: Path) -> None:
    """Unpack the tests and their settings, and not the sources: what is tested is installed."""
    with tarfile.open(sdist) as archive:
        extract(archive, folder, select_tests(archive))


def select_tests(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the tests and their settings, named as they are below the top folder."""
    for member in archive:
        path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
        if path.parts[:1] in {("tests",), ("pyproject.toml",)}:
            member.name = str(path)
            yield member


def copy_tests(source: Path, folder: Path) -> None:
    """Copy the tests and their settings of a checkout's task-sdk folder, and not the sources."""
    shutil.copytree(source / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", folder)


def run_pytest(
    environment: Environment,
    folder: Path,
    arguments: Sequence[str],
    log: Path,
    on_progress: Callable[[int], object],
) -> int:
    """Run pytest in the folder, and return its exit status."""
    pretend_checkout(folder)
    command = [*isolate(), str(environment.python), "-m", "pytest", *PYTEST_OPTIONS, *arguments]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=folder,
            env=make_variables(environment, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            return wait_exit(process, log, on_progress)
        finally:
            process.kill()


def pretend_checkout(folder: Path) -> None:
    """Write the files by which upstream's pytest plugin knows that it need not generate them, which takes a checkout."""
    generated = folder / "generated"
    generated.mkdir()
    (generated / "provider_dependencies.json").write_text("{}", encoding="utf-8")
    (generated / "provider_dependencies.json.sha256sum").write_text(
        hashlib.sha256().hexdigest(), encoding="utf-8"
    )


def make_variables(environment: Environment, folder: Path) -> dict[str, str]:
    """Return the variables that upstream's tests and plugin expect, and nothing of ours."""
    return {
        **clean_env(folder / "scratch", python=environment.python),
        "AIRFLOW_SOURCES": str(folder),
        "PYTHONPATH": str(PLUGIN),
        "USE_AIRFLOW_VERSION": environment.release.airflow,
        "_AIRFLOW_SKIP_DB_TESTS": "true",
        "_AIRFLOW__AS_LIBRARY": "true",
    }


def wait_exit(process: subprocess.Popen[bytes], log: Path, on_progress: Callable[[int], object]) -> int:
    """Wait until pytest ends, and pass on the percentage that it prints."""
    deadline = time.monotonic() + SUITE_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_INTERVAL)
        if percentages := re.findall(rb"\[ *(\d+)%\]", read_end(log)):
            on_progress(int(percentages[-1]))
    raise SuiteFailedError(f"The tests did not end within {SUITE_TIMEOUT} s; they hang at:\n{quote_end(log)}")


def end_processes(folder: Path) -> None:
    """Kill what upstream's tests have left: whatever process has its AIRFLOW_HOME in the run's folder."""
    home = f"AIRFLOW_HOME={folder}{os.sep}".encode()
    kill_all(lambda pid: any(variable.startswith(home) for variable in read_strings(pid, "environ")))


def read_end(log: Path) -> bytes:
    """Return the last bytes of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read()


def quote_end(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(read_end(log).decode(errors="replace").splitlines()[-QUOTED_LINES:])
