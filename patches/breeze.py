"""The commands of apache/airflow's own development environment that test a commit of ours."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

from packaging.version import Version

from patches.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patches.releases import Release

# As in PROVIDERS_COMPATIBILITY_TESTS_MATRIX of dev/breeze/src/airflow_breeze/global_constants.py.
COMPATIBLE_WITH = ("2.11.1", "3.0.6", "3.1.8")
# The providers that start or run tasks.
PROVIDERS = "Providers[celery,cncf.kubernetes,edge3,standard]"
NEEDED = ("docker", "breeze")


def list_commands(release: Release) -> list[list[str]]:
    """Return the static checks, the SDK's tests and the providers' tests, to be run in the checkout.

    The tests of the providers run with the checkout's SDK, then with that of each released Airflow, as upstream's CI has it.
    """
    # Upstream changed from pre-commit to prek with 3.1.
    checker = "prek" if Version(release.version) >= Version("1.1") else "pre-commit"
    test_providers = ["breeze", "testing", "providers-tests", "--test-type", PROVIDERS]
    return [
        [checker, "run", "--from-ref", "HEAD~1", "--to-ref", "HEAD"],
        ["breeze", "testing", "task-sdk-tests"],
        test_providers,
        *(
            [*test_providers, "--use-airflow-version", version, "--mount-sources", "providers-and-tests"]
            for version in COMPATIBLE_WITH
        ),
    ]


def run_commands(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands in the checkout, one after the other, up to the first that fails."""
    needed = dict.fromkeys([*NEEDED, *(command[0] for command in commands)])
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise PatchError(
            f"Not run, for {' and '.join(missing)} cannot be found here. Upstream's tests run without them, against a "
            f"wheel that is built from the checkout: nox -s upstream -- --checkout {shlex.quote(str(folder))}"
        )
    for command in commands:
        print(f"$ {shlex.join(command)}", flush=True)  # noqa: T201 - which command the output below is of
        status = subprocess.run(command, cwd=folder, check=False).returncode
        if status:
            raise PatchError(
                f"`{shlex.join(command)}` ended with {status}, see above; what follows was not run."
            )
