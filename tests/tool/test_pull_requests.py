"""Commits for upstream, in made-up checkouts: what they hold, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patches.__main__ import main
from patches.breeze import COMPATIBLE_WITH
from patches.errors import PatchError
from patches.pull_requests import NEWS, NEWSFRAGMENTS, Wishes, make_pull_request
from patches.releases import last_of_lines
from patches.rules import ADVICE, load_changes
from tests.harness.checkouts import commit_all, git, record_state
from tests.tool.made_up import (
    ADDED,
    FILE,
    SDK_FILE,
    SOURCE,
    TEST,
    make_checkout,
    refuse,
    write_change,
    write_insertion,
    write_rule,
)
from tests.tool.running import TIMEOUT, interrupt, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from patches.pull_requests import PullRequest
    from patches.rules import Change

FRAGMENT = f"{NEWSFRAGMENTS}/65505.bugfix.rst"
CONFIGURATION = "airflow-core/src/airflow/config_templates/config.yml"
CONFIGURATION_RULE = (
    write_rule("{pattern: quiet}", "loud", id="be-loud")
    .replace(FILE, CONFIGURATION)
    .replace("language: python", "language: yaml")
)
DOCS = "task-sdk/docs"
INDEX, PAGE = f"{DOCS}/index.rst", f"{DOCS}/manners.rst"
LIST = ".. toctree::\n\n  concepts\n  api\n"
MANNERS = "Manners\n=======\n\nLimits\n------\n\nNone.\n"
SECTION = "Waving\n------\n\nOnce.\n\n"
# What older lines of upstream have; the order of its parts, and its comments, are made up.
TEMPLATE = """\
.. A comment

* Types of change

  * [ ] Dag changes
  * [ ] Behaviour changes

.. Another

* Migration rules needed
"""
MEBIBYTE = 1 << 20
# A git that waits at the command in the variable BLOCKED until it is told to go on.
BLOCKING_GIT = """\
#!/bin/sh
case " $* " in
*" $BLOCKED "*) echo reached > "$REACHED"; read -r _ < "$GO_ON" ;;
esac
exec {git} "$@"
"""
STYLE = {
    "pyproject.toml": '[tool.ruff.lint]\nselect = ["F", "I"]\n[tool.ruff.format]\nquote-style = "single"\n'
}
# What users set for the patches that they read.
HOSTILE = {
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "format.attach": "x",
    "format.useAutoBase": "true",
}


pytestmark = pytest.mark.usefixtures("isolated_git")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


@pytest.fixture
def changes(tmp_path: Path, sources: Path) -> list[Change]:
    """Return three changes: one with files, one without, and one that needs the first."""
    folder = tmp_path / "changes"
    write_change(folder, write_rule(), name="politeness", files=f"[{ADDED}]", tests=f"[{TEST}]")
    write_change(
        folder, write_rule("{pattern: 'say(\"HALLO\", $N)'}", "cry($N)", id="cry"), number=20, name="noise"
    )
    rule = write_rule("{pattern: 'say(\"moin\", $N)'}", "wave($N)", id="wave")
    write_change(folder, rule, number=30, name="gestures", needs="[politeness]", tests=f"[{TEST}]")
    return load_changes(folder)


def test_commits_all(checkout: Path, changes: list[Change]) -> None:
    """Edits, whole files, tests and newsfragment are one commit on a new branch, which is checked out and clean."""
    request = make_pull_request(checkout, changes, Wishes())
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "symbolic-ref", "HEAD") == "refs/heads/task-sdk-teardown\n"
    assert git(checkout, "rev-parse", "HEAD~1") == git(checkout, "rev-parse", "main")
    assert git(checkout, "log", "-1", "--format=%an <%ae>") == "A Contributor <contributor@example.org>\n"
    assert git(checkout, "diff", "--name-status", "HEAD~1").split() == [
        *("A", FRAGMENT),
        *("A", f"task-sdk/src/{ADDED}"),
        *("M", SDK_FILE),
        *("A", f"task-sdk/tests/{TEST}"),
    ]
    assert (checkout / FRAGMENT).read_text() == f"{NEWS}\n"
    assert "wave(name)" in (checkout / SDK_FILE).read_text()
    assert request.added == [f"task-sdk/src/{ADDED}", f"task-sdk/tests/{TEST}", FRAGMENT]


def test_message_is_in_upstreams_style(checkout: Path, changes: list[Change]) -> None:
    """A short subject, an empty line, and a body whose lines are not too long."""
    make_pull_request(checkout, changes, Wishes())
    subject, empty, *body = git(checkout, "log", "-1", "--format=%B").splitlines()
    assert (len(subject) <= 65, empty) == (True, "")
    assert "It greets." in body
    assert all(len(line) <= 72 for line in body)


def test_our_subjects_are_short() -> None:
    """Upstream's log shows subjects whole."""
    assert [change.subject for change in load_changes() if len(change.subject) > 72] == []


def test_our_news_take_one_line() -> None:
    """Upstream's static checks demand that of a newsfragment."""
    assert [news for news in (NEWS, *(change.news for change in load_changes())) if "\n" in news] == []


def test_keeps_the_mode(checkout: Path, changes: list[Change]) -> None:
    """A file that can be executed stays so."""
    (checkout / SDK_FILE).chmod(0o755)
    git(checkout, "commit", "--all", "--quiet", "--message", "Make it a program")
    make_pull_request(checkout, changes, Wishes())
    assert git(checkout, "diff", "--summary", "HEAD~1", "--", SDK_FILE) == ""


def test_commit_of_one_change(checkout: Path, changes: list[Change]) -> None:
    """It has its own subject, branch, news and tests, and brings nothing else."""
    request = make_pull_request(checkout, changes, Wishes(only=("noise",), number=7))
    assert (request.branch, sorted(request.files)) == (
        "task-sdk-noise",
        [f"{NEWSFRAGMENTS}/7.bugfix.rst", SDK_FILE],
    )
    assert request.message.startswith("Greet politely\n\n")
    assert request.notices == [
        "Left out: the check of the style, for the checkout has no ruff configuration.",
        "Left out: the check of the types, with --no-types.",
    ]


def test_leaves_out_what_is_not_for_upstream(tmp_path: Path, checkout: Path, changes: list[Change]) -> None:
    """A change without the words for upstream is for the wheels alone."""
    file = tmp_path / "changes" / "20-noise.yml"
    file.write_text("".join(line for line in file.open() if not line.startswith(("subject:", "news:"))))
    changes = load_changes(tmp_path / "changes")
    assert "noise is no change for upstream" in refuse(checkout, changes, Wishes(only=("noise",)))
    request = make_pull_request(checkout, changes, Wishes())
    assert [change.name for change in request.changes] == ["politeness", "gestures"]


def test_takes_along_what_is_needed(checkout: Path, changes: list[Change]) -> None:
    """A change that builds on another brings that along, and says so."""
    request = make_pull_request(checkout, changes, Wishes(only=("gestures",)))
    assert [change.name for change in request.changes] == ["politeness", "gestures"]
    assert "politeness is needed, and so part of the commit." in request.notices


@pytest.mark.parametrize("styled", [False, True])
def test_builds_on_what_is_there(
    tmp_path: Path, changes: list[Change], sources: Path, *, styled: bool
) -> None:
    """On a branch that has what a change needs, the commit is that change alone; tests that both share stay."""
    settings = {"ruff.toml": '[format]\nquote-style = "single"\n[lint]\nignore = ["F821"]\n'}
    checkout = make_checkout(tmp_path / "checkout", files=settings if styled else None)
    for file in (sources / "files" / ADDED, sources / "tests" / TEST):
        file.write_text('BYE = "bye"\n')
    make_pull_request(checkout, changes, Wishes(only=("politeness",), number=1))
    request = make_pull_request(checkout, changes, Wishes(only=("gestures",), number=2))
    assert "politeness is needed, and there already." in request.notices
    assert sorted(request.files) == [f"{NEWSFRAGMENTS}/2.bugfix.rst", SDK_FILE]


@pytest.mark.parametrize("styled", [False, True])
def test_shared_file_comes_with_the_first_change(tmp_path: Path, sources: Path, *, styled: bool) -> None:
    """What two changes share is in the first commit of a stack, in the checkout's style, and not in the second."""
    checkout = make_checkout(tmp_path / "checkout", files=STYLE if styled else None)
    (sources / "files" / ADDED).write_text('BYE = "bye"\n')
    rules = write_rule(), write_rule("{pattern: 'say(\"HALLO\", $N)'}", "say($N, name)", id="cry")
    for number, (name, rule) in enumerate(zip(("politeness", "noise"), rules, strict=True)):
        write_change(tmp_path / "changes", rule, number=number, name=name, more=f"shared: [{ADDED}]\n")
    changes = load_changes(tmp_path / "changes")
    first = make_pull_request(checkout, changes, Wishes(only=("politeness",), number=1))
    second = make_pull_request(checkout, changes, Wishes(only=("noise",), number=2))
    assert f"task-sdk/src/{ADDED}" in first.files
    assert sorted(second.files) == [f"{NEWSFRAGMENTS}/2.bugfix.rst", SDK_FILE]


LAST = {".".join(release.version.split(".")[:2]): release.version for release in last_of_lines()}
NEWEST = last_of_lines()[-1].version


@pytest.mark.parametrize(
    ("version", "line", "expected"),
    [
        ("1.3.1", None, "1.3.1"),
        ("1.3.99", None, LAST["1.3"]),
        ("1.4.99", None, LAST["1.4"]),
        ("1.3.0.dev0", None, "1.3.0"),
        ("1.2.0b1", None, "1.2.0"),
        ("1.0.5rc1", None, "1.0.6"),
        ("1.99.0", None, NEWEST),
        ("1.3.2", "main", NEWEST),
        ("1.3.2", "v3-0-test", LAST["1.0"]),
        ("1.3.2", "v3-2-stable", LAST["1.2"]),
        ("1.3.2", "3.1", LAST["1.1"]),
        ("1.3.2", "3.1.4", "1.1.4"),
    ],
)
def test_chooses_rules(
    tmp_path: Path, changes: list[Change], version: str, line: str | None, expected: str
) -> None:
    """The rules are as asked, or those of the checkout's release, the next or the last of its line, or the newest."""
    checkout = make_checkout(tmp_path / "checkout", version=version)
    request = make_pull_request(checkout, changes, Wishes(line=line))
    assert request.release.version == expected
    said = [notice for notice in request.notices if "is not in the table" in notice]
    assert bool(said) is (line is None and version != expected)


@pytest.mark.parametrize("line", ["v3-9-test", "nonsense", "3.0.5", ""])
def test_refuses_unknown_line(checkout: Path, changes: list[Change], line: str) -> None:
    """A line or version that nothing is known of is not guessed at."""
    assert "is not a supported" in refuse(checkout, changes, Wishes(line=line))


@pytest.mark.parametrize("version", ["0.9.0", "soon"])
def test_refuses_checkout_of_another_age(tmp_path: Path, changes: list[Change], version: str) -> None:
    """A version before all supported ones, or none at all, needs a word of the user."""
    checkout = make_checkout(tmp_path / "checkout", version=version)
    assert "with --line" in refuse(checkout, changes, Wishes())


def test_edits_the_core_where_it_is(tmp_path: Path) -> None:
    """A rule for the core edits it in a checkout, is counted there, and is left out where the file is missing."""
    write_change(tmp_path / "changes", CONFIGURATION_RULE)
    changes = load_changes(tmp_path / "changes")
    whole = make_checkout(tmp_path / "whole", files={CONFIGURATION: "default: quiet\n"})
    make_pull_request(whole, changes, Wishes())
    assert (whole / CONFIGURATION).read_text() == "default: loud\n"
    other = make_checkout(tmp_path / "other", files={CONFIGURATION: "default: shy\n"})
    failure, advice = refuse(other, changes, Wishes()).splitlines()
    assert failure.endswith(f"{CONFIGURATION} of SDK 1.3.2: 0 matches instead of 1.")
    assert advice == ADVICE
    part = make_checkout(tmp_path / "part")
    request = make_pull_request(part, changes, Wishes())
    assert f"Left out: rule be-loud, for there is no {CONFIGURATION}." in request.notices


@pytest.fixture
def pages(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """Return two changes: one brings a page and lists it, and one adds a section to the page."""
    (tmp_path / "pages" / "docs").mkdir(parents=True)
    (tmp_path / "pages" / "docs" / "manners.rst").write_text(MANNERS)
    monkeypatch.setattr("patches.pull_requests.PAGES", tmp_path / "pages")
    folder = tmp_path / "documented"
    listing = write_insertion("  manners", "  concepts", file=INDEX)
    write_change(folder, write_rule(), listing, files=f"[{ADDED}]", more="docs: [docs/manners.rst]\n")
    wave = write_rule("{pattern: 'say(\"moin\", $N)'}", "wave($N)", id="wave")
    section = write_insertion(SECTION, "Limits\n------", file=PAGE, where="before", id="say-wave")
    write_change(folder, wave, section, number=20, name="gestures", needs="[politeness]")
    return load_changes(folder)


def test_brings_documentation(tmp_path: Path, pages: list[Change]) -> None:
    """A page is listed where upstream lists its own, and has the sections of all changes, be they sent together or not."""
    whole = make_checkout(tmp_path / "whole", files={INDEX: LIST})
    request = make_pull_request(whole, pages, Wishes())
    assert (whole / INDEX).read_text() == LIST.replace("  concepts\n", "  concepts\n  manners\n")
    assert (whole / PAGE).read_text() == MANNERS.replace("Limits\n", f"{SECTION}Limits\n")
    assert PAGE in request.added
    stack = make_checkout(tmp_path / "stack", files={INDEX: LIST})
    make_pull_request(stack, pages, Wishes(only=("politeness",), number=1))
    assert (stack / PAGE).read_text() == MANNERS
    make_pull_request(stack, pages, Wishes(only=("gestures",), number=2, branch="second"))
    assert git(stack, "rev-parse", f"HEAD:{DOCS}") == git(whole, "rev-parse", f"HEAD:{DOCS}")


def test_section_goes_into_a_page_that_was_reworded(tmp_path: Path, pages: list[Change]) -> None:
    """Upstream may have changed the page since; the next change looks for its place alone."""
    checkout = make_checkout(tmp_path / "checkout", files={INDEX: LIST})
    make_pull_request(checkout, pages, Wishes(only=("politeness",), number=1))
    commit_text(PAGE, MANNERS.replace("None.", "Some."))(checkout)
    make_pull_request(checkout, pages, Wishes(only=("gestures",), number=2))
    assert f"{SECTION}Limits\n------\n\nSome.\n" in (checkout / PAGE).read_text()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {INDEX: "Nothing is listed.\n"},
            f"Rule list-it (10-politeness.yml) on {INDEX} of SDK 1.3.2: 0 matches",
        ),
        (
            {INDEX: LIST + LIST},
            f"Rule list-it (10-politeness.yml) on {INDEX} of SDK 1.3.2: 2 matches instead of 1",
        ),
        ({INDEX: LIST, PAGE: ""}, f"has {PAGE} already: upstream now has a page of that name"),
    ],
)
def test_refuses_other_documentation(
    tmp_path: Path, pages: list[Change], files: dict[str, str], message: str
) -> None:
    """Where the place for a page is gone, or not one, or taken, nothing is committed."""
    checkout = make_checkout(tmp_path / "checkout", files=files)
    assert message in refuse(checkout, pages, Wishes())


def test_says_that_there_is_no_documentation(checkout: Path, pages: list[Change]) -> None:
    """A checkout without the folder gets the commit without the page, and its user is told so."""
    request = make_pull_request(checkout, pages, Wishes())
    assert PAGE not in request.files
    assert [notice for notice in request.notices if DOCS in notice] == [
        f"Left out: {PAGE}, for there is no {DOCS}.",
        f"Left out: rule list-it, for there is no {INDEX}.",
    ]


@pytest.fixture
def significant(tmp_path: Path) -> list[Change]:
    """Return three changes, of which the first and the last alter what users see."""
    folder = tmp_path / "significant"
    write_change(folder, write_rule(), name="politeness", more=f"significant: {'It greets. ' * 20}\n")
    rule = write_rule("{pattern: 'say(\"HALLO\", $N)'}", "cry($N)", id="cry")
    write_change(folder, rule, number=20, name="noise")
    rule = write_rule("{pattern: 'say(\"moin\", $N)'}", "wave($N)", id="wave")
    more = "significant: It waves.\n"
    write_change(folder, rule, number=30, name="gestures", needs="[politeness]", more=more)
    return load_changes(folder)


def test_significant_news(checkout: Path, significant: list[Change]) -> None:
    """A change of behaviour has a summary, an empty line, and what the changes of the commit say of it."""
    request = make_pull_request(checkout, significant, Wishes(only=("gestures",), number=7))
    news = request.files[f"{NEWSFRAGMENTS}/7.significant.rst"].decode()
    summary, empty, *body = news.splitlines()
    assert (summary, empty) == ("The SDK greets politely.", "")
    assert " ".join(body).split() == [*("It greets. " * 20).split(), "It", "waves."]
    assert all(len(line) <= 110 for line in body)
    assert (news.endswith(".\n\nIt waves.\n"), len(body) > 3) == (True, True)


def test_all_news_are_significant_if_one_is(tmp_path: Path, significant: list[Change]) -> None:
    """The commit of all changes has its own summary, and the words of those that alter what users see."""
    request = make_pull_request(make_checkout(tmp_path / "all"), significant, Wishes())
    (file,) = (file for file in request.files if file.startswith(NEWSFRAGMENTS))
    assert file == f"{NEWSFRAGMENTS}/65505.significant.rst"
    assert request.files[file].decode().startswith(f"{NEWS}\n\nIt greets.")
    request = make_pull_request(
        make_checkout(tmp_path / "one"), significant, Wishes(only=("noise",), number=8)
    )
    assert f"{NEWSFRAGMENTS}/8.bugfix.rst" in request.files


def test_significant_news_have_the_list_that_a_line_asks_for(
    tmp_path: Path, significant: list[Change]
) -> None:
    """Where upstream has a template, its types of change follow, with the one for behaviour ticked."""
    template = f"{NEWSFRAGMENTS}/template.significant.rst"
    checkout = make_checkout(tmp_path / "checkout", files={template: TEMPLATE})
    request = make_pull_request(checkout, significant, Wishes(number=7))
    assert (
        request.files[f"{NEWSFRAGMENTS}/7.significant.rst"]
        .decode()
        .endswith("\n\nIt waves.\n\n* Types of change\n\n  * [ ] Dag changes\n  * [x] Behaviour changes\n")
    )


def test_patch_gives_the_same_tree(tmp_path: Path, checkout: Path, changes: list[Change]) -> None:
    """`git am` takes the patch, whatever the user has set for patches, and makes the same tree of it."""
    for key, value in HOSTILE.items():
        git(checkout, "config", key, value)
    patch = tmp_path / "it.patch"
    make_pull_request(checkout, changes, Wishes(patch_file=patch))
    other = make_checkout(tmp_path / "other")
    git(other, "am", "--quiet", str(patch))
    assert git(other, "rev-parse", "HEAD^{tree}") == git(checkout, "rev-parse", "HEAD^{tree}")


def dirty(checkout: Path) -> None:
    (checkout / SDK_FILE).write_text("")


def litter(checkout: Path) -> None:
    (checkout / "stray.py").touch()


def take_branch(checkout: Path) -> None:
    git(checkout, "branch", "task-sdk-teardown")


def take_prefix_of_branch(checkout: Path) -> None:
    git(checkout, "branch", "task-sdk-teardown/more")


def drop_identity(checkout: Path) -> None:
    git(checkout, "config", "--remove-section", "user")


def commit_text(file: str, text: str) -> Callable[[Path], None]:
    def commit(checkout: Path) -> None:
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text(text)
        git(checkout, "add", "--force", file)
        git(checkout, "commit", "--quiet", "--message", "Change it")

    return commit


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (dirty, "is not clean (1 files, task-sdk/src/airflow/sdk/greeting.py among them): commit them, or"),
        (litter, "is not clean (1 files, stray.py among them)"),
        (take_branch, "has a branch task-sdk-teardown already: delete it, or name another one with --branch"),
        (
            take_prefix_of_branch,
            "has a branch task-sdk-teardown/more beside which git cannot have task-sdk-teardown: delete it, or",
        ),
        (drop_identity, "git does not know who commits: set your name and address"),
        (
            commit_text(SDK_FILE, "pass\n"),
            "Rule say-moin (10-politeness.yml) on airflow/sdk/greeting.py of SDK 1.3.2: 0",
        ),
        (commit_text(f"task-sdk/src/{ADDED}", "BYE = 2\n"), f"{ADDED} of change politeness is there already"),
        (
            commit_text(f"task-sdk/src/{ADDED}", "BYE = 1\n"),
            "has the change politeness already: start from a branch",
        ),
        (commit_text(f"task-sdk/tests/{TEST}", "BYE = 2\n"), f"has another task-sdk/tests/{TEST}"),
        (
            commit_text(FRAGMENT, "News.\n"),
            f"has {FRAGMENT} already: give the number of the pull request with",
        ),
    ],
)
def test_refusal_changes_nothing(
    checkout: Path, changes: list[Change], prepare: Callable[[Path], None], message: str
) -> None:
    """Whatever is in the way is said, and HEAD, branches, index, status and files are as before."""
    prepare(checkout)
    assert message in refuse(checkout, changes, Wishes())


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (
            Wishes(only=("absent",)),
            "absent is no change for upstream: give some of politeness, noise, gestures.",
        ),
        (
            Wishes(branch="no..name"),
            "'no..name' cannot be the name of a branch: give another one with --branch.",
        ),
        (Wishes(branch="--all"), "'--all' cannot be the name of a branch"),
        (Wishes(branch="main"), "has a branch main already"),
        (
            Wishes(branch="main/more"),
            "has a branch main beside which git cannot have main/more: delete it, or",
        ),
    ],
)
def test_refuses_bad_wishes(checkout: Path, changes: list[Change], wishes: Wishes, message: str) -> None:
    """So is what was asked for and cannot be."""
    assert message in refuse(checkout, changes, wishes)


def test_refuses_second_time(checkout: Path, changes: list[Change]) -> None:
    """On its own branch the command says that there is nothing to do."""
    make_pull_request(checkout, changes, Wishes())
    assert "has the change politeness already" in refuse(checkout, changes, Wishes(branch="other"))


def test_refuses_patch_file(tmp_path: Path, checkout: Path, changes: list[Change]) -> None:
    """A file that is there is not overwritten, and one in the checkout would make it dirty."""
    there = tmp_path / "there.patch"
    there.write_text("mine")
    assert "is there already" in refuse(checkout, changes, Wishes(patch_file=there))
    assert there.read_text() == "mine"
    assert "is no folder" in refuse(checkout, changes, Wishes(patch_file=tmp_path / "absent" / "x"))
    assert "is in the checkout" in refuse(checkout, changes, Wishes(patch_file=checkout / "x.patch"))


@pytest.mark.parametrize("lock", ["refs/heads/task-sdk-teardown.lock", "index.lock"])
def test_failure_at_the_end_takes_the_patch_back(
    tmp_path: Path, checkout: Path, changes: list[Change], lock: str
) -> None:
    """When the branch cannot be made after all, or not be checked out, no patch file stays either, and no branch."""
    (checkout / ".git" / lock).touch()  # as another git has it that is at work there
    assert f"{lock}'" in refuse(checkout, changes, Wishes(patch_file=tmp_path / "it.patch"))
    assert not (tmp_path / "it.patch").exists()


def test_patch_is_written_whole_or_not_at_all(tmp_path: Path, checkout: Path, sources: Path) -> None:
    """Where there is no room for it no part stays, which would be in the way of the next try, and nothing is committed."""
    # Longer than a file may be; git's objects, which are compressed, are not.
    (sources / "files" / ADDED).write_text(f"# {'long ' * MEBIBYTE}\n")
    write_change(tmp_path / "changes", write_rule(), files=f"[{ADDED}]")
    changes, wishes = load_changes(tmp_path / "changes"), Wishes(patch_file=tmp_path / "it.patch")
    with limit_files(MEBIBYTE):
        assert "it.patch cannot take the patch (File too large)" in refuse(checkout, changes, wishes)
    make_pull_request(checkout, changes, wishes)
    assert (tmp_path / "it.patch").stat().st_size > MEBIBYTE


@contextmanager
def limit_files(size: int) -> Iterator[None]:
    """Let no file that is written here grow beyond a number of bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("absent", "is no folder: give the top folder of an apache/airflow checkout."),
        (".", "is not in a git repository that can be used (not a git repository"),
        ("checkout/task-sdk", "is not the top folder of its repository: give"),
        (
            "other",
            "has no task-sdk/src/airflow/sdk/__init__.py: give a checkout of apache/airflow, 3.0 or newer.",
        ),
        ("empty", "has no commit yet: give a checkout of apache/airflow."),
    ],
)
def test_refuses_wrong_folder(
    tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str], folder: str, message: str
) -> None:
    """A path that is not the top folder of a checkout gives one sentence on stderr and status 1."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README").touch()
    commit_all(tmp_path / "other")
    make_checkout(tmp_path / "empty")
    git(tmp_path / "empty", "update-ref", "-d", "HEAD")
    before = record_state(checkout)
    assert main(["pr", str(tmp_path / folder)]) == 1
    assert record_state(checkout) == before
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_says_that_there_is_no_git(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without git one sentence says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["pr", str(checkout)]) == 1
    assert capsys.readouterr() == ("", "git is not installed: install it, and try again.\n")


def restyle(tmp_path: Path, sources: Path, added: str, *, settings: dict[str, str] = STYLE) -> PullRequest:
    """Commit a change with a whole file in a checkout that asks for a style."""
    (sources / "files" / ADDED).write_text(added)
    write_change(tmp_path / "styled", write_rule(), files=f"[{ADDED}]")
    checkout = make_checkout(tmp_path / "checkout", files=settings)
    return make_pull_request(checkout, load_changes(tmp_path / "styled"), Wishes())


def test_new_files_get_the_checkouts_style(tmp_path: Path, sources: Path) -> None:
    """New files are fixed and formatted; a file that was not in style before is edited and left in its own."""
    request = restyle(tmp_path, sources, 'import os\nBYE = "bye"\n')
    assert request.files[f"task-sdk/src/{ADDED}"] == b"BYE = 'bye'\n"
    assert request.files[SDK_FILE].decode() == SOURCE.replace('say("hallo"', 'say("moin"')


def test_file_in_style_stays_so(tmp_path: Path) -> None:
    """A file that was in style before is so afterwards, whatever a rule has written."""
    before = "def greet(name):\n    say('hallo', name)\n"
    write_change(tmp_path / "changes", write_rule("{pattern: 'say($WORD, $NAME)'}", "'say(\"moin\",$NAME)'"))
    settings = STYLE["pyproject.toml"].replace("tool.ruff.", "")
    checkout = make_checkout(tmp_path / "checkout", files={"ruff.toml": settings, SDK_FILE: before})
    request = make_pull_request(checkout, load_changes(tmp_path / "changes"), Wishes())
    assert request.files[SDK_FILE].decode() == before.replace("hallo", "moin")


def test_refuses_what_the_style_cannot_mend(tmp_path: Path, sources: Path) -> None:
    """A fault that ruff finds and cannot fix is named with its file, and nothing is committed."""
    with pytest.raises(PatchError) as refusal:
        restyle(tmp_path, sources, "print(undefined)\n")
    fault, advice = refusal.value.sentences
    assert fault.startswith(f"task-sdk/src/{ADDED}: F821 ")
    assert "mend these files where this repository has them" in advice
    assert git(tmp_path / "checkout", "branch", "--list").split() == ["*", "main"]


def test_says_that_style_was_not_checked(tmp_path: Path, sources: Path) -> None:
    """Where ruff does not take the configuration, an sdist's without the root say, that is no reason to refuse."""
    request = restyle(tmp_path, sources, "BYE = 1\n", settings={"ruff.toml": 'extend = "absent.toml"\n'})
    (notice,) = (notice for notice in request.notices if "style" in notice)
    assert notice.startswith("Left out: the check of the style, for ruff says: ")


def test_tells_what_it_did_and_what_comes_next(
    checkout: Path, changes: list[Change], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The branch, every file, the notices, and the commands that test and send the commit are printed."""
    monkeypatch.setattr("patches.__main__.load_changes", lambda: changes)
    release = last_of_lines()[0]
    assert main(["pr", str(checkout), "--line", "v3-0-test"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    commit = git(checkout, "rev-parse", "--short=10", "HEAD").strip()
    assert head == (
        f"Commit {commit} on the new branch task-sdk-teardown, with the rules for SDK {release.version}: "
        "politeness, noise, gestures."
    )
    assert [line for line in lines if line.startswith(("  A ", "  M "))] == [
        f"  A {FRAGMENT}",
        f"  A task-sdk/src/{ADDED}",
        f"  M {SDK_FILE}",
        f"  A task-sdk/tests/{TEST}",
    ]
    assert f"Next, in {checkout}:" in lines
    assert "  pre-commit run --from-ref 'HEAD~1' --to-ref HEAD" in lines
    assert "  breeze testing task-sdk-tests" in lines
    providers = [line for line in lines if line.startswith("  breeze testing providers-tests ")]
    tested_with = [re.findall(r"--use-airflow-version (\S+) ", line) for line in providers]
    assert tested_with == [[], *([version] for version in COMPATIBLE_WITH)]
    assert "  git push YOUR-FORK task-sdk-teardown" in lines


def fake_programs(folder: Path, *names: str) -> dict[str, str]:
    """Write programs that say how they were called, of which breeze fails with the tests of providers."""
    folder.mkdir()
    for name in names:
        program = folder / name
        program.write_text('#!/bin/sh\necho "${0##*/} $*" >> "$CALLS"\ntest "$2" != providers-tests\n')
        program.chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(shutil.which('git') or '').parent}{os.pathsep}/bin"
    return {"PATH": path, "CALLS": str(folder / "calls")}


def test_breeze_says_what_is_missing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Docker or Breeze nothing runs, and what can be run without them is named."""
    there = {name: f"/bin/{name}" for name in ("git", "docker", "prek")}
    monkeypatch.setattr("patches.breeze.shutil.which", there.get)
    assert main(["breeze", str(checkout)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("Not run, for breeze cannot be found here.")
    assert f"nox -s upstream -- --checkout {checkout}" in err


def test_breeze_runs_the_checks(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They run in the checkout in order, and the first that fails ends it."""
    for name, value in fake_programs(tmp_path / "bin", "docker", "breeze", "prek").items():
        monkeypatch.setenv(name, value)
    assert main(["breeze", str(checkout)]) == 1
    providers = "Providers[celery,cncf.kubernetes,edge3,standard]"
    assert (tmp_path / "bin" / "calls").read_text().splitlines() == [
        "prek run --from-ref HEAD~1 --to-ref HEAD",
        "breeze testing task-sdk-tests",
        f"breeze testing providers-tests --test-type {providers}",
    ]
    assert "ended with 1, see above; what follows was not run." in capfd.readouterr().err


class BlockingGit:
    """A git that waits at one command until it is told to go on."""

    def __init__(self, folder: Path, command: str) -> None:
        folder.mkdir()
        program = folder / "git"
        program.write_text(BLOCKING_GIT.format(git=shutil.which("git")))
        program.chmod(0o755)
        pipes = [str(folder / name) for name in ("reached", "go-on")]
        for pipe in pipes:
            os.mkfifo(pipe)
        # Open at both ends: nobody waits for the other to open it (fifo(7)).
        self._reached, self._go_on = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "BLOCKED": command, "REACHED": pipes[0], "GO_ON": pipes[1]}

    def wait_until_reached(self) -> None:
        assert select.select([self._reached], [], [], TIMEOUT)[0], "the command was not run"

    def let_go_on(self) -> None:
        os.write(self._go_on, b"go on\n")

    def close(self) -> None:
        os.close(self._reached)
        os.close(self._go_on)


@pytest.fixture
def blocking_git(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BlockingGit]:
    blocking = BlockingGit(tmp_path / "bin", request.param)
    yield blocking
    blocking.close()


@pytest.fixture
def polite_clone(clone: Path) -> Path:
    """Return a copy of the tool whose only change is made up."""
    for path in (clone / "patches" / "changes").iterdir():
        path.unlink()
    write_change(clone / "patches" / "changes", write_rule())
    return clone


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("blocking_git", ["status", "GIT_AUTHOR_IDENT"], indirect=True)
def test_interrupt_changes_nothing(
    polite_clone: Path, checkout: Path, blocking_git: BlockingGit, signum: signal.Signals
) -> None:
    """An interrupt before the commit is ready ends the tool and its git, and the checkout is as it was."""
    before = record_state(checkout)
    with start(polite_clone, "pr", str(checkout), **blocking_git.environment) as process:
        blocking_git.wait_until_reached()
        assert "Interrupted" in interrupt(process, signum)
    assert record_state(checkout) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("blocking_git", ["write-tree", "update-ref", "switch"], indirect=True)
def test_commit_is_not_interrupted(
    polite_clone: Path, checkout: Path, blocking_git: BlockingGit, signum: signal.Signals
) -> None:
    """An interrupt while the commit is written comes too late: there is no half of a commit."""
    with start(polite_clone, "pr", str(checkout), **blocking_git.environment) as process:
        blocking_git.wait_until_reached()
        process.send_signal(signum)
        blocking_git.let_go_on()
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stderr) == (0, "")
    assert git(checkout, "symbolic-ref", "HEAD") == "refs/heads/task-sdk-politeness\n"
    assert git(checkout, "status", "--porcelain") == ""
