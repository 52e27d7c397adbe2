"""A made-up SDK for tests of the tool: its files, its change files, its wheel and sdist, and an index that serves them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from patches.errors import PatchError
from patches.pull_requests import NEWSFRAGMENTS, Wishes, make_pull_request
from patches.releases import Release
from patches.rules import load_changes
from patches.upstream import sdist_name, wheel_name
from tests.harness.checkouts import commit_all, record_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from patches.rules import Change

FILE = "airflow/sdk/greeting.py"
ADDED = "airflow/sdk/farewell.py"
TEST = "task_sdk/test_farewell.py"
SDK_FILE = f"task-sdk/src/{FILE}"
SOURCE = '''\
# A header
# of two lines
"""Grüße — die Umlaute sind länger als ein Byte."""


def greet(name):
    # TODO: be polite
    say("hallo", name)  # ü
    return name


def shout(name):
    say("HALLO", name)
'''
HEAD = """\
change: {name}
what: It greets.
why: Nobody did.
upstream: Not there.
subject: Greet politely
news: The SDK greets politely.
needs: {needs}
files: {files}
tests: {tests}
"""
RULE = """\
---
id: {id}
language: python
message: Say it otherwise.
note: A made-up need.
metadata: {metadata}
rule: {rule}
fix: {fix}
"""
INSERTION = """\
---
id: {id}
message: List it.
note: A page that is in no list is not found.
metadata: {{file: {file}}}
{where}: {anchor}
insert: {text}
"""
TIMEOUT = 60
"""Seconds."""

INDEX_PATH = "apache-airflow-task-sdk"
SDIST_BACKEND = '''\
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder, "{stem}.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text("""{metadata}""")
    return info.name
'''
METADATA = """\
Metadata-Version: 2.1
Name: apache-airflow-task-sdk
Version: {version}
Requires-Python: <3.99,>=3.9
"""


def release(version: str = "1.1.8", python: str = ">=3.9,<3.13") -> Release:
    """Return a release that need not exist."""
    return Release(
        version=version, airflow=f"3{version[1:]}", python=python, as_of="2026-01-01", wheel="0", sdist="0"
    )


def write_rule(
    rule: str = "{pattern: 'say(\"hallo\", $NAME)'}",
    fix: str = "'say(\"moin\", $NAME)'",
    *,
    id: str = "say-moin",  # noqa: A002
    metadata: str = "",
) -> str:
    """Return the YAML document of a rule; without arguments it matches once."""
    return RULE.format(id=id, rule=rule, fix=fix, metadata=f"{{file: {FILE}, {metadata}}}")


def write_insertion(
    text: str,
    anchor: str,
    *,
    file: str,
    where: str = "after",
    id: str = "list-it",  # noqa: A002
) -> str:
    """Return the YAML document that inserts lines into a page of documentation."""
    return INSERTION.format(id=id, file=file, where=where, anchor=json.dumps(anchor), text=json.dumps(text))


def write_change(
    folder: Path,
    *rules: str,
    number: int = 10,
    name: str = "politeness",
    needs: str = "[]",
    files: str = "[]",
    tests: str = "[]",
    more: str = "",
) -> None:
    """Write a change file with these rules, and more lines in its first document."""
    folder.mkdir(exist_ok=True)
    head = HEAD.format(name=name, needs=needs, files=files, tests=tests) + more
    (folder / f"{number:02}-{name}.yml").write_text(head + "".join(rules), "utf-8")


def load(folder: Path, *rules: str, files: str = "[]", tests: str = "[]") -> list[Change]:
    """Write a change file with these rules and load its folder."""
    write_change(folder, *rules, files=files, tests=tests)
    return load_changes(folder)


def write_tree(folder: Path) -> Path:
    """Write the SDK's only file below a folder, and return the folder."""
    file = folder / FILE
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE, "utf-8")
    return folder


def make_checkout(folder: Path, *, version: str = "1.3.2", files: dict[str, str] | None = None) -> Path:
    """Make a checkout with the SDK of a version, a place for newsfragments, and files."""
    write_tree(folder / "task-sdk" / "src")
    (folder / "task-sdk/src/airflow/sdk/__init__.py").write_text(f'__version__ = "{version}"\n')
    (folder / NEWSFRAGMENTS).mkdir(parents=True)
    for file, text in {f"{NEWSFRAGMENTS}/config.toml": "", **(files or {})}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    commit_all(folder)
    return folder


def refuse(folder: Path, changes: list[Change], wishes: Wishes) -> str:
    """Ask for a commit that is refused, and return why; the checkout is as it was."""
    before = record_state(folder)
    with pytest.raises(PatchError) as refusal:
        make_pull_request(folder, changes, wishes)
    assert record_state(folder) == before
    return str(refusal.value)


def pack_wheel(folder: Path, version: str) -> Path:
    """Write the SDK's wheel into a folder, from a tree beside that folder."""
    folder.mkdir(exist_ok=True)
    tree = write_tree(folder.with_name(f"tree-{version}"))
    info = tree / f"apache_airflow_task_sdk-{version}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(METADATA.format(version=version))
    info.joinpath("WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    command = [sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)
    return folder / wheel_name(version)


def pack_sdist(folder: Path, version: str) -> Path:
    """Write the SDK's sdist, whose metadata can be made without a network, into a folder."""
    stem = f"apache_airflow_task_sdk-{version}"
    metadata = METADATA.format(version=version)
    files = {
        "PKG-INFO": metadata,
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": SDIST_BACKEND.format(stem=stem, metadata=metadata),
    }
    path = folder / sdist_name(version)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"{stem}/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def confine_pip(url: str) -> dict[str, str]:
    """Return the variables that have pip ask one index only, and once."""
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    return pip | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Have pip ask one index only."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in confine_pip(url).items():
        monkeypatch.setenv(name, value)


def use_dead_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pip an index that nobody serves any more."""
    with contextlib.closing(listen()) as server:
        port = server.getsockname()[1]
    use_index(monkeypatch, f"http://127.0.0.1:{port}/")


def listen() -> socket.socket:
    """Return a socket that listens on a port of its own on loopback."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(TIMEOUT)
    return server


@contextlib.contextmanager
def serve_index(folder: Path) -> Iterator[str]:
    """Serve the files below folder/apache-airflow-task-sdk as a package index on loopback; give its URL."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Leave the test's output alone."""
