"""Change files: what loading and linting refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from patches.errors import PatchError
from patches.linting import lint_changes
from patches.rules import load_changes
from tests.tool.made_up import ADDED, FILE, HEAD, load, write_change, write_rule

if TYPE_CHECKING:
    from pathlib import Path

HEADER = HEAD.format(name="politeness", files="[]")


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
        (HEADER.replace("[]", ""), "10-politeness.yml has no list for files"),
        (HEADER.replace("[]", "[/etc/passwd]"), "give a path that begins with airflow/"),
        (HEADER.replace("[]", "[airflow/../../x.py]"), "give a path that begins with airflow/"),
        (HEADER + write_rule() + "---\n", "10-politeness.yml has a document that is no mapping"),
        (HEADER + write_rule().replace("fix:", "fixx:"), "Rule say-moin (10-politeness.yml) lacks fix"),
        (HEADER + write_rule().replace("note:", "notes:"), "Rule say-moin (10-politeness.yml) lacks note"),
        (
            HEADER + write_rule() + "constraint: {}",
            "Rule say-moin (10-politeness.yml) has keys that mean nothing",
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
    write_change(tmp_path, name="zeal")
    write_change(tmp_path, name="ardour")
    (tmp_path / "10-zeal.yml").rename(tmp_path / "05-zeal.yml")
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


def test_lint_compares_files_with_claims(tmp_path: Path) -> None:
    """A file that no change claims is found, and so is a claim without a file."""
    sources = tmp_path / "src"
    (sources / FILE).parent.mkdir(parents=True)
    (sources / FILE).touch()
    with pytest.raises(PatchError) as refusal:
        lint_changes(load(tmp_path, files=f"[{ADDED}]"), sources)
    unclaimed, missing = refusal.value.sentences
    assert unclaimed.startswith(f"{FILE} belongs to no change")
    assert missing.startswith(f"{ADDED} of change politeness is not below")


def test_our_changes_are_sound() -> None:
    """The lint has nothing against the changes of this repository."""
    lint_changes(load_changes())
