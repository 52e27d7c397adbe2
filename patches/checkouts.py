"""A git checkout of apache/airflow, in which nothing changes until a whole commit is ready."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patches.commands import run_command
from patches.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SDK_FOLDER = "task-sdk"
SDK_SOURCES = f"{SDK_FOLDER}/src"
SDK_TESTS = f"{SDK_FOLDER}/tests"
SDK_VERSION_FILE = f"{SDK_SOURCES}/airflow/sdk/__init__.py"

NEW_FILE_MODE = "100644"
SHORT_DIGITS = 10
# Settings of a user that would have format-patch write what `git am` does not take, or git ask for an identity.
PLAIN = ("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false", "-c", "user.useConfigOnly=true")
PATCH_OPTIONS = (
    *("--stdout", "--full-index", "--binary"),
    *("--no-ext-diff", "--no-attach", "--no-base", "--no-cover-letter"),
)


@dataclass(frozen=True)
class Checkout:
    """A clean checkout: its top folder, and the commit that is checked out."""

    folder: Path
    head: str

    def read(self, file: str) -> bytes | None:
        """Return the content of a file, None if there is none."""
        path = self.folder / file
        return path.read_bytes() if path.is_file() else None

    def git(self, *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None) -> str:
        """Run git in the checkout and return what it printed; raise a PatchError with what it complains about."""
        command = ["git", "--no-optional-locks", *PLAIN, "-C", str(self.folder), *arguments]
        result = run_command(command, stdin=stdin, environment=environment)
        if result.returncode:
            raise PatchError(f"git {arguments[0]} failed in {self.folder}: {_find_complaint(result.stderr)}")
        return result.stdout.decode(errors="surrogateescape")


def open_checkout(folder: Path) -> Checkout:
    """Return the checkout whose top folder this is, or say in a PatchError why nothing can be committed there."""
    if not folder.is_dir():
        raise PatchError(f"{folder} is no folder: give the top folder of an apache/airflow checkout.")
    if shutil.which("git") is None:
        raise PatchError("git is not installed: install it, and try again.")
    result = run_command(["git", "-C", str(folder), "rev-parse", "--show-toplevel"])
    if result.returncode:
        raise PatchError(
            f"{folder} is not in a git repository that can be used ({_find_complaint(result.stderr)}): give the top "
            "folder of an apache/airflow checkout."
        )
    top = Path(result.stdout.decode().removesuffix("\n"))
    if top.resolve() != folder.resolve():
        raise PatchError(f"{folder} is not the top folder of its repository: give {top}.")
    if not (top / SDK_VERSION_FILE).is_file():
        raise PatchError(
            f"{folder} has no {SDK_VERSION_FILE}: give a checkout of apache/airflow, 3.0 or newer."
        )
    result = run_command(["git", "-C", str(folder), "rev-parse", "--verify", "--quiet", "HEAD^{commit}"])
    if result.returncode:
        raise PatchError(f"{folder} has no commit yet: give a checkout of apache/airflow.")
    checkout = Checkout(top, result.stdout.decode().strip())
    _refuse_changes(checkout)
    return checkout


def check_branch(checkout: Checkout, branch: str) -> None:
    """Raise a PatchError unless a branch of this name can be made."""
    try:
        checkout.git("check-ref-format", "--branch", branch)
    except PatchError:
        raise PatchError(
            f"{branch!r} cannot be the name of a branch: give another one with --branch."
        ) from None
    for taken in checkout.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads").splitlines():
        if _exclude_each_other(taken, branch):
            reason = "already" if taken == branch else f"beside which git cannot have {branch}"
            raise PatchError(
                f"{checkout.folder} has a branch {taken} {reason}: delete it, or name another one with --branch."
            )


def check_identity(checkout: Checkout) -> None:
    """Raise a PatchError unless git knows who commits."""
    try:
        for identity in ("GIT_AUTHOR_IDENT", "GIT_COMMITTER_IDENT"):
            checkout.git("var", identity)
    except PatchError:
        raise PatchError(
            "git does not know who commits: set your name and address, with `git config --global user.name NAME` and "
            "`git config --global user.email ADDRESS`."
        ) from None


def commit_files(
    checkout: Checkout, files: Mapping[str, bytes], message: str, branch: str, patch_file: Path | None
) -> str:
    """Commit files on a new branch and check it out; write the commit as a mail, too; return its abbreviated id.

    Takes less than a second, and is not interrupted. Until the branch appears, all that a failure leaves are objects
    that nothing refers to, which git collects.
    """
    with _hold_interrupts():
        commit = _write_commit(checkout, files, message)
        with _write_patch(checkout, commit, patch_file) if patch_file else contextlib.nullcontext():
            _check_out(checkout, commit, branch)
    return commit[:SHORT_DIGITS]


def export_files(checkout: Checkout, folder: Path) -> None:
    """Write the files of the commit that is checked out into a folder."""
    with _read_own_index(checkout) as own_index:
        checkout.git("checkout-index", "--all", f"--prefix={folder}/", environment=own_index)


def _exclude_each_other(branch: str, other: str) -> bool:
    """Whether git cannot have branches of both names: a/b needs a folder where a is a file."""
    return f"{branch}/".startswith(f"{other}/") or f"{other}/".startswith(f"{branch}/")


def _refuse_changes(checkout: Checkout) -> None:
    changes = checkout.git("status", "--porcelain").splitlines()
    if changes:
        raise PatchError(
            f"{checkout.folder} is not clean ({len(changes)} files, {changes[0][3:]} among them): commit them, or put "
            "them away with `git stash --include-untracked`."
        )


@contextlib.contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Have this process, and what it starts, ignore Ctrl-C and SIGTERM."""
    signals = (signal.SIGINT, signal.SIGTERM)
    former = [signal.signal(signum, signal.SIG_IGN) for signum in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, former):
            signal.signal(signum, handler)


def _write_commit(checkout: Checkout, files: Mapping[str, bytes], message: str) -> str:
    """Write the commit's objects by way of an index of their own, and return the commit's id."""
    with _read_own_index(checkout) as own_index:
        entries = [
            f"{_find_mode(checkout, file)} {_write_blob(checkout, content)}\t{file}\n"
            for file, content in files.items()
        ]
        checkout.git("update-index", "--index-info", stdin="".join(entries).encode(), environment=own_index)
        tree = checkout.git("write-tree", environment=own_index).strip()
    return checkout.git("commit-tree", tree, "-p", checkout.head, stdin=message.encode()).strip()


@contextlib.contextmanager
def _read_own_index(checkout: Checkout) -> Iterator[dict[str, str]]:
    """Give the variable that has git use an index of our own, with the commit that is checked out."""
    with tempfile.TemporaryDirectory() as work:
        own_index = {"GIT_INDEX_FILE": str(Path(work, "index"))}
        checkout.git("read-tree", checkout.head, environment=own_index)
        yield own_index


def _find_mode(checkout: Checkout, file: str) -> str:
    entry = checkout.git("ls-tree", checkout.head, "--", file)
    return entry.partition(" ")[0] or NEW_FILE_MODE


def _write_blob(checkout: Checkout, content: bytes) -> str:
    return checkout.git("hash-object", "-w", "--stdin", stdin=content).strip()


@contextlib.contextmanager
def _write_patch(checkout: Checkout, commit: str, file: Path) -> Iterator[None]:
    """Write the commit as a mail; unless it gets there whole, and the block succeeds, there is no such file."""
    mail = checkout.git("format-patch", *PATCH_OPTIONS, "-1", commit)
    with contextlib.ExitStack() as undo:
        try:
            with file.open("xb") as stream:
                undo.callback(file.unlink)
                stream.write(mail.encode(errors="surrogateescape"))
        except OSError as error:
            raise PatchError(f"{file} cannot take the patch ({error.strerror}): name another file.") from None
        yield
        undo.pop_all()


def _check_out(checkout: Checkout, commit: str, branch: str) -> None:
    reference = f"refs/heads/{branch}"
    checkout.git("update-ref", reference, commit, "")
    try:
        checkout.git("switch", "--quiet", branch)
    except BaseException:
        checkout.git("update-ref", "-d", reference, commit)
        raise


def _find_complaint(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[0].removeprefix("fatal: ").removesuffix(".") if lines else "it did not say why"
