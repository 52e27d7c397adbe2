"""Change files: what loading and linting refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from patches.errors import PatchError
from patches.linting import lint_changes
from patches.rules import TESTS, add_needed, load_changes, select_names
from tests.tool.made_up import ADDED, FILE, HEAD, load, release, write_change, write_insertion, write_rule

if TYPE_CHECKING:
    from pathlib import Path

HEADER = HEAD.format(name="politeness", files="[]", tests="[]", needs="[]")
INDEX = "task-sdk/docs/index.rst"
INSERTION = write_insertion("  manners", "  concepts", file=INDEX)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "10-politeness.yml is empty"),
        ("change: [", "10-politeness.yml is not YAML"),
        ("- politeness", "10-politeness.yml has a document that is no mapping: '- politeness'"),
        (HEADER.replace("why:", "reason:"), "10-politeness.yml lacks why"),
        (HEADER + "since: 1", "10-politeness.yml has keys that mean nothing: since"),
        (HEADER.replace("It greets.", "''"), "10-politeness.yml has no text for what"),
        (HEADER.replace("politeness", "manners"), "call the file NN-manners.yml"),
        (HEADER.replace("news:", "refers:"), "10-politeness.yml has only one of subject and news"),
        (HEADER.replace("files: []", "files:"), "10-politeness.yml has no list for files"),
        (HEADER.replace("files: []", "files: [/etc/passwd]"), "give a path that begins with airflow/"),
        (HEADER.replace("files: []", "files: [airflow/../../x.py]"), "give a path that begins with airflow/"),
        (HEADER.replace("files: []", "files: [1]"), "10-politeness.yml has 1 among its files: give a name"),
        (HEADER.replace("files: []", f"files: [{FILE}: 1.x]"), "names releases '1.x': write them like"),
        (HEADER.replace("tests: []", "tests: [test_a.py]"), "give a path that begins with task_sdk/"),
        (HEADER + write_rule() + "---\n", "10-politeness.yml has a document that is no mapping"),
        (HEADER + write_rule().replace("fix:", "fixx:"), "Rule say-moin (10-politeness.yml) lacks fix"),
        (HEADER + write_rule().replace("note:", "notes:"), "Rule say-moin (10-politeness.yml) lacks note"),
        (
            HEADER + write_rule() + "constraint: {}",
            "Rule say-moin (10-politeness.yml) has keys that mean nothing",
        ),
        (HEADER + "docs: [manners.rst]", "give a path that begins with docs/"),
        (HEADER + "significant: ''", "10-politeness.yml has no text for significant"),
        (
            HEADER.replace("news:", "significant:").replace("subject:", "refers:"),
            "10-politeness.yml has significant without news",
        ),
        (HEADER + INSERTION.replace("insert:", "fix:"), "Rule list-it (10-politeness.yml) lacks"),
        (HEADER + INSERTION.replace("message:", "why:"), "Rule list-it (10-politeness.yml) lacks message"),
        (HEADER + INSERTION + "fix: x", "Rule list-it (10-politeness.yml) has keys that mean nothing: fix"),
        (HEADER + INSERTION.replace("after:", "at:"), "has keys that mean nothing: at"),
        *(
            (
                HEADER + insertion,
                "Rule list-it (10-politeness.yml) needs one place: give either after or before",
            )
            for insertion in (INSERTION + "before: x", INSERTION.replace('after: "  concepts"\n', ""))
        ),
        (
            HEADER + INSERTION.replace('"  concepts"', '""'),
            "Rule list-it (10-politeness.yml) has no text for",
        ),
        (
            HEADER + INSERTION.replace(INDEX, "task-sdk/README.md"),
            "give a path that begins with airflow-core/docs/ or docker-stack-docs/ or task-sdk/docs/",
        ),
        (HEADER + write_rule(metadata="match: 2"), "in its metadata, has keys that mean nothing: match"),
        (HEADER + write_rule().replace("file:", "path:"), "in its metadata, lacks file"),
        (HEADER + write_rule(metadata="matches: 0"), "says that it matches 0 times"),
        (HEADER + write_rule(metadata="matches: true"), "says that it matches True times"),
        (HEADER + write_rule(metadata="matches: {'<1.3': many}"), "says that it matches 'many' times"),
        (HEADER + write_rule(metadata="releases: 1.3"), "names releases 1.3: write them like"),
        (
            HEADER + write_rule() + write_rule(),
            "Rule say-moin is in 10-politeness.yml and in 10-politeness.yml",
        ),
    ],
)
def test_refuses_what_means_nothing(tmp_path: Path, text: str, message: str) -> None:
    """A change file that is not as patches/__init__.py describes it is refused in one sentence that names it."""
    (tmp_path / "10-politeness.yml").write_text(text, "utf-8")
    with pytest.raises(PatchError) as refusal:
        load_changes(tmp_path)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_refuses_empty_folder(tmp_path: Path) -> None:
    """Without change files there is nothing to build."""
    with pytest.raises(PatchError, match="has no change file"):
        load_changes(tmp_path)


def test_refuses_file_of_two_changes(tmp_path: Path) -> None:
    """Only one change brings a file."""
    for name in ("politeness", "rudeness"):
        write_change(tmp_path, name=name, files=f"[{ADDED}]")
    with pytest.raises(PatchError, match=f"File {ADDED} is in politeness and in rudeness"):
        load_changes(tmp_path)


def test_loads_changes_in_the_order_of_their_names(tmp_path: Path) -> None:
    """The number in front of a change file's name decides when it is applied."""
    write_change(tmp_path, name="zeal", number=5)
    write_change(tmp_path, name="ardour")
    assert [change.name for change in load_changes(tmp_path)] == ["zeal", "ardour"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (write_rule("{patern: x}"), "ast-grep does not take rule say-moin (10-politeness.yml): "),
        (write_rule() + "fix: twice", "duplicate"),
        (write_rule(metadata="releases: '>=1.4'"), "says >=1.4, which is ambiguous for 1.4.0b2"),
        (
            write_rule(metadata="matches: {'<1.4': 1, '>=1.4.0b1': 2}"),
            "says <1.4, which is ambiguous for 1.4.0b2",
        ),
        (write_rule(metadata="releases: '>=7'"), "is for no supported release"),
        (write_rule(metadata="matches: {'<1.3': 1}"), "gives 0 numbers of matches for SDK 1.3.0"),
    ],
)
def test_lint_finds_faulty_rule(tmp_path: Path, rule: str, message: str) -> None:
    """What is wrong with a rule whatever upstream looks like is found without upstream."""
    with pytest.raises(PatchError) as refusal:
        lint_changes(load(tmp_path, rule), tmp_path)
    assert any(message in sentence for sentence in refusal.value.sentences)


def test_lint_compares_pages_with_claims(tmp_path: Path) -> None:
    """So are a page of documentation that no change claims, and a claim without a page."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "stray.rst").touch()
    write_change(tmp_path / "changes", more="docs: [docs/absent.rst]\n")
    with pytest.raises(PatchError) as refusal:
        lint_changes(load_changes(tmp_path / "changes"), pages=tmp_path)
    unclaimed, missing = (sentence for sentence in refusal.value.sentences if "docs" in sentence)
    assert unclaimed.startswith("docs/stray.rst belongs to no change: name it under docs")
    assert missing.startswith("docs/absent.rst, which a change names under docs, is not below")


def test_refuses_page_of_two_changes(tmp_path: Path) -> None:
    """Only one change brings a page; others insert their sections into it."""
    for name in ("politeness", "rudeness"):
        write_change(tmp_path, name=name, more="docs: [docs/manners.rst]\n")
    with pytest.raises(PatchError, match=r"Page docs/manners\.rst is in politeness and in rudeness"):
        load_changes(tmp_path)


def test_lint_compares_files_with_claims(tmp_path: Path) -> None:
    """A file that no change claims is found, and so is a claim without a file."""
    sources = tmp_path / "src"
    (sources / FILE).parent.mkdir(parents=True)
    (sources / FILE).touch()
    changes = load(tmp_path, files=f"[{ADDED}]", tests="[task_sdk/test_absent.py]")
    with pytest.raises(PatchError) as refusal:
        lint_changes(changes, sources, TESTS, pages=tmp_path)
    claims, (missing_test,) = refusal.value.sentences[:-1], refusal.value.sentences[-1:]
    unclaimed, missing, *unclaimed_tests = claims
    assert unclaimed.startswith(f"{FILE} belongs to no change")
    assert missing.startswith(f"{ADDED}, which a change names under files, is not below")
    assert unclaimed_tests
    assert all(sentence.startswith("task_sdk/execution_time/") for sentence in unclaimed_tests)
    assert missing_test.startswith("task_sdk/test_absent.py, which a change names under tests, is not below")


def test_loads_items_for_some_releases(tmp_path: Path) -> None:
    """A file, a test or a need may be for some releases alone."""
    (change,) = load(tmp_path, files=f"[{FILE}, {ADDED}: '>=1.4.0b1']", tests="[task_sdk/test_a.py: '<1.2']")
    assert select_names(change.files, release("1.3.2")) == [FILE]
    assert select_names(change.files, release("1.4.0b2")) == [FILE, ADDED]
    assert select_names(change.tests, release("1.1.8")) == ["task_sdk/test_a.py"]
    assert not select_names(change.tests, release("1.2.0"))


def test_adds_what_is_needed(tmp_path: Path) -> None:
    """A change takes along what it needs for the release, and what that needs; nothing else."""
    write_change(tmp_path, number=10, name="words")
    write_change(tmp_path, number=20, name="voice")
    write_change(tmp_path, number=30, name="manners", needs="[words, voice: '<1.4.0b1']")
    write_change(tmp_path, number=40, name="greeting", needs="[manners]")
    changes = load_changes(tmp_path)

    def add(name: str, version: str) -> list[str]:
        return [change.name for change in add_needed(changes, [name], release(version))]

    assert add("greeting", "1.3.2") == ["words", "voice", "manners", "greeting"]
    assert add("greeting", "1.4.0b2") == ["words", "manners", "greeting"]
    assert add("voice", "1.3.2") == ["voice"]


@pytest.mark.parametrize("need", ["voice", "absent", "manners"])
def test_refuses_need_that_does_not_come_before(tmp_path: Path, need: str) -> None:
    """What a change needs is applied before it, and so has the lower number."""
    write_change(tmp_path, number=10, name="manners", needs=f"[{need}]")
    write_change(tmp_path, number=20, name="voice")
    with pytest.raises(
        PatchError, match=f"Change manners needs {need}, which is no change that comes before"
    ):
        load_changes(tmp_path)


def test_our_changes_are_sound() -> None:
    """The lint has nothing against the changes of this repository."""
    lint_changes(load_changes())
