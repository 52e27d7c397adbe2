"""PID namespaces: what runs in one neither ends nor sees the orphans of what runs beside it."""

from __future__ import annotations

import functools
import subprocess

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
UNSHARE_NETWORK = (*UNSHARE, "--net")
# The shell collects whom the command orphans, as init would: for a last command it would not stay.
BE_INIT = ("sh", "-c", '"$@"; exit $?', "init")


@functools.cache
def find_refusal(*, network: bool = False) -> str | None:
    """Return why there can be no such namespaces, None if there can."""
    try:
        tried = subprocess.run(
            [*(UNSHARE_NETWORK if network else UNSHARE), "true"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unshare is not installed"
    return (tried.stderr.strip() or f"unshare exited {tried.returncode}") if tried.returncode else None


def isolate() -> tuple[str, ...]:
    """Return what goes before a command that is to have a PID namespace of its own, nothing if there can be none."""
    return () if find_refusal() else (*UNSHARE, *BE_INIT)
