"""A commit for apache/airflow: the same changes, with their tests, a newsfragment and documentation."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from patches.checkouts import (
    SDK_FOLDER,
    SDK_SOURCES,
    SDK_TESTS,
    SDK_VERSION_FILE,
    check_branch,
    check_identity,
    commit_files,
    open_checkout,
)
from patches.environments import EnvironmentFailedError
from patches.errors import PatchError
from patches.releases import all_releases, find_nearest, find_release, last_of_lines
from patches.rules import (
    ADVICE,
    PAGES,
    SDK,
    SOURCES,
    TESTS,
    Patch,
    add_needed,
    apply_rule,
    compute_patch,
    select_names,
)
from patches.styling import NoStyleError, apply_style, style_new_file
from patches.type_checking import NoTypesError, check_types

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from patches.checkouts import Checkout
    from patches.releases import Release
    from patches.rules import Change

NEWSFRAGMENTS = "airflow-core/newsfragments"
# Older lines have it, and want its list in every significant newsfragment.
TEMPLATE = f"{NEWSFRAGMENTS}/template.significant.rst"
MAIN = "main"
MESSAGE_WIDTH = 72

# What the commit of several changes says; one alone has its own words in its change file.
SUBJECT = "Stop tasks completely, whatever processes they have started"
NEWS = (
    "End everything that a task has started when it is killed, crashes or fails, and notice the end of a task at once. "
    "What is meant to outlive such a task is started by ``prlimit --rttime=unlimited setsid --fork``."
)
NUMBER = 65505
BRANCH = "task-sdk-teardown"


@dataclass(frozen=True)
class Wishes:
    """What the user asks for. `None` stands for what the checkout or the changes say."""

    line: str | None = None
    only: tuple[str, ...] = ()
    branch: str | None = None
    number: int | None = None
    patch_file: Path | None = None
    types: bool = False


@dataclass
class PullRequest:
    """A commit that is ready to be sent, and what its author should know about it."""

    release: Release
    changes: list[Change]
    branch: str
    files: dict[str, bytes]
    message: str
    commit: str = ""
    added: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def make_pull_request(folder: Path, changes: Sequence[Change], wishes: Wishes) -> PullRequest:
    """Commit the changes on a new branch of a clean checkout of apache/airflow, and check it out.

    Whatever is in the way is said in a PatchError, and the checkout is as it was.
    """
    checkout = open_checkout(folder)
    request = prepare(checkout, changes, wishes)
    if wishes.patch_file:
        _check_patch_file(checkout, wishes.patch_file)
    check_branch(checkout, request.branch)
    check_identity(checkout)
    _check_types(checkout, request, wishes)
    request.commit = commit_files(checkout, request.files, request.message, request.branch, wishes.patch_file)
    return request


def prepare(checkout: Checkout, changes: Sequence[Change], wishes: Wishes) -> PullRequest:
    """Return what is to be committed, without writing anything."""
    release, notices = choose_release(checkout, wishes.line)
    wanted = _choose_changes(changes, wishes.only)
    selected = _select_changes(checkout, changes, wanted, release, notices)
    alone = wanted[0] if len(wanted) == 1 else None
    files = _collect_files(checkout, selected, release, notices)
    files |= _write_newsfragment(checkout, alone, selected, wishes.number, notices)
    try:
        files = apply_style(checkout, files, notices)
    except NoStyleError as error:
        notices.append(f"Left out: the check of the style, for {error}.")
    return PullRequest(
        release=release,
        changes=selected,
        branch=wishes.branch or (f"task-sdk-{alone.name}" if alone else BRANCH),
        files=files,
        message=_write_message(alone, selected),
        added=[file for file in files if checkout.read(file) is None],
        notices=notices,
    )


def choose_release(checkout: Checkout, line: str | None) -> tuple[Release, list[str]]:
    """Return the release whose rules fit the line that is asked for or found, and what is to be said about it."""
    if line is not None:
        return _find_line(line), []
    version = _read_version(checkout)
    for release in all_releases():
        if release.version == str(version):
            return release, []
    nearest = find_nearest(version)
    if nearest is None:
        raise PatchError(
            f"The checkout has SDK {version}, which belongs to no supported line: name one with --line."
        )
    return nearest, [
        f"The checkout has SDK {version}, which is not in the table: the rules for {nearest.version} apply."
    ]


def _find_line(line: str) -> Release:
    """Return the last release of a line, named like main, v3-2-test or 3.2, or the release of a version."""
    if line == MAIN:
        return last_of_lines()[-1]
    match = re.fullmatch(r"v?[13][-.](\d+)(-test|-stable)?", line)
    if match is None:
        return find_release(line)
    for release in last_of_lines():
        if Version(release.version).minor == int(match[1]):
            return release
    known = ", ".join(f"v3-{Version(release.version).minor}-test" for release in last_of_lines())
    raise PatchError(f"{line} is not a supported line: give {MAIN}, or one of {known}.")


def _read_version(checkout: Checkout) -> Version:
    text = (checkout.read(SDK_VERSION_FILE) or b"").decode()
    match = re.search(r"^__version__ = [\"'](.+)[\"']$", text, re.MULTILINE)
    try:
        return Version(match[1] if match else "")
    except InvalidVersion:
        raise PatchError(
            f"{SDK_VERSION_FILE} does not say which version it is: name the line with --line, like {MAIN} or "
            "v3-2-test."
        ) from None


def _choose_changes(changes: Sequence[Change], only: Iterable[str]) -> list[Change]:
    by_name = {change.name: change for change in changes if change.goes_upstream}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise PatchError(f"{unknown[0]} is no change for upstream: give some of {', '.join(by_name)}.")
    return [by_name[name] for name in dict.fromkeys(only)] or list(by_name.values())


def _select_changes(
    checkout: Checkout,
    changes: Sequence[Change],
    wanted: Sequence[Change],
    release: Release,
    notices: list[str],
) -> list[Change]:
    """Return what is to be applied: what is wanted, and what that needs and the checkout does not have yet."""
    selected = add_needed(changes, (change.name for change in wanted), release)
    applied = [change for change in selected if _is_applied(checkout, change, release)]
    for change in applied:
        if change in wanted:
            raise PatchError(
                f"{checkout.folder} has the change {change.name} already: start from a branch without it."
            )
        notices.append(f"{change.name} is needed, and there already.")
    selected = [change for change in selected if change not in applied]
    notices += [
        f"{change.name} is needed, and so part of the commit." for change in selected if change not in wanted
    ]
    return selected


def _is_applied(checkout: Checkout, change: Change, release: Release) -> bool:
    """Whether all files that a change brings are there as it brings them."""
    files = select_names(change.files, release)
    return bool(files) and all(
        _is_there(checkout, f"{SDK_SOURCES}/{file}", (SOURCES / file).read_bytes()) for file in files
    )


def _is_there(checkout: Checkout, file: str, content: bytes) -> bool:
    """Whether the checkout has a file of ours, be it in its own style."""
    there = checkout.read(file)
    return there is not None and there in (content, style_new_file(checkout, file, content))


def _collect_files(
    checkout: Checkout, changes: Sequence[Change], release: Release, notices: list[str]
) -> dict[str, bytes]:
    """Return all that the changes edit and add, by path in the checkout."""
    patch = compute_patch(
        checkout.folder / SDK_SOURCES,
        release,
        changes,
        SOURCES,
        lambda file, content: _is_there(checkout, f"{SDK_SOURCES}/{file}", content),
    )
    files = {f"{SDK_SOURCES}/{file}": content for file, content in (patch.changed | patch.added).items()}
    files |= _collect_tests(checkout, changes, release)
    return files | _edit_beyond_sdk(checkout, changes, release, notices)


def _collect_tests(checkout: Checkout, changes: Sequence[Change], release: Release) -> dict[str, bytes]:
    """Return the tests of the changes, apart from what they share with a change that is there already."""
    tests: dict[str, bytes] = {}
    for name in dict.fromkeys(name for change in changes for name in select_names(change.tests, release)):
        file, content = f"{SDK_TESTS}/{name}", (TESTS / name).read_bytes()
        if checkout.read(file) is None:
            tests[file] = content
        elif not _is_there(checkout, file, content):
            raise PatchError(f"{checkout.folder} has another {file}: upstream now has a test of that name.")
    return tests


def _collect_pages(
    checkout: Checkout, changes: Sequence[Change], release: Release, notices: list[str]
) -> dict[str, bytes]:
    """Return the pages of documentation that the changes bring; not every checkout has a place for them."""
    pages: dict[str, bytes] = {}
    for name in (name for change in changes for name in select_names(change.docs, release)):
        file = f"{SDK_FOLDER}/{name}"
        folder = PurePosixPath(file).parent
        if checkout.read(file) is not None:
            raise PatchError(f"{checkout.folder} has {file} already: upstream now has a page of that name.")
        if (checkout.folder / folder).is_dir():
            pages[file] = (PAGES / name).read_bytes()
        else:
            notices.append(f"Left out: {file}, for there is no {folder}.")
    return pages


def _edit_beyond_sdk(
    checkout: Checkout, changes: Sequence[Change], release: Release, notices: list[str]
) -> dict[str, bytes]:
    """Return our pages, and the files outside the SDK's sources that rules edit; what is not there is not edited."""
    ours = {f"{SDK_FOLDER}/{page.name}" for change in changes for page in change.docs}
    patch = Patch(changed=_collect_pages(checkout, changes, release, notices))
    failures: list[str] = []
    for rule in (rule for change in changes for rule in change.rules if not rule.file.startswith(SDK)):
        if not rule.count_expected(release):
            continue
        if rule.file not in patch.changed and checkout.read(rule.file) is None:
            if rule.file not in ours:  # what is left out of ours was said already
                notices.append(f"Left out: rule {rule.id}, for there is no {rule.file}.")
        else:
            failures += apply_rule(checkout.folder, patch, rule, release)
    if failures:
        raise PatchError(*failures, ADVICE)
    return patch.changed


def _write_newsfragment(
    checkout: Checkout,
    alone: Change | None,
    selected: Sequence[Change],
    number: int | None,
    notices: list[str],
) -> dict[str, bytes]:
    """Return the newsfragment: one line, and more below it only if it is significant, as upstream's checks demand."""
    if not (checkout.folder / NEWSFRAGMENTS).is_dir():
        notices.append(f"Left out: the newsfragment, for there is no {NEWSFRAGMENTS}.")
        return {}
    referred = re.search(r"\d+", alone.refers) if alone else None
    paragraphs = [alone.news if alone else NEWS]
    paragraphs += [_fill(change.significant) for change in selected if change.significant]
    kind = "bugfix" if len(paragraphs) == 1 else "significant"
    if kind == "significant":
        paragraphs += _list_types_of_change(checkout)
    file = f"{NEWSFRAGMENTS}/{number or (referred[0] if referred else NUMBER)}.{kind}.rst"
    if checkout.read(file) is not None:
        raise PatchError(
            f"{checkout.folder} has {file} already: give the number of the pull request with --number."
        )
    if number is None:
        notices.append(f"Rename {file} when the pull request has a number, or give it with --number.")
    return {file: ("\n\n".join(paragraphs) + "\n").encode()}


def _list_types_of_change(checkout: Checkout) -> list[str]:
    """Return the paragraphs of the template's list, in which behaviour is ticked; nothing without a template."""
    template = (checkout.read(TEMPLATE) or b"").decode()
    titles = re.findall(r"^\* Types of change$", template, re.MULTILINE)
    boxes = re.findall(r"^  \* \[ \] .+$", template, re.MULTILINE)
    ticked = "\n".join(box.replace("[ ] Behaviour", "[x] Behaviour") for box in boxes)
    return [*titles, ticked] if titles and boxes else []


def _write_message(alone: Change | None, selected: Sequence[Change]) -> str:
    """Return the commit message in upstream's style: a subject, why, and the issues."""
    paragraphs = [alone.subject if alone else SUBJECT]
    for change in selected:
        paragraphs += [_fill(change.what), _fill(change.why)]
    paragraphs.append("\n".join(dict.fromkeys(change.refers for change in selected if change.refers)))
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _fill(text: str) -> str:
    return textwrap.fill(text, MESSAGE_WIDTH, break_long_words=False, break_on_hyphens=False)


def _check_types(checkout: Checkout, request: PullRequest, wishes: Wishes) -> None:
    if not wishes.types:
        request.notices.append("Left out: the check of the types, with --no-types.")
        return
    try:
        check_types(checkout, request.files, request.release)
    except (NoTypesError, EnvironmentFailedError) as error:
        request.notices.append(f"Left out: the check of the types. {error}")


def _check_patch_file(checkout: Checkout, file: Path) -> None:
    if file.exists():
        raise PatchError(f"{file} is there already: name another file with --format-patch.")
    if not file.parent.is_dir():
        raise PatchError(f"{file} cannot take the patch, for {file.parent} is no folder: name another file.")
    if file.resolve().is_relative_to(checkout.folder.resolve()):
        raise PatchError(f"{file} is in the checkout, which it would make dirty: name a file outside.")
