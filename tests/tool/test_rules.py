"""Rules, applied to a made-up tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from patches.errors import PatchError
from patches.rules import ADVICE, apply_changes, load_changes, write_files
from tests.tool import made_up
from tests.tool.made_up import ADDED, FILE, SOURCE, load, write_change, write_rule

if TYPE_CHECKING:
    from pathlib import Path

BOTH = "{pattern: say($$$WORDS)}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return made_up.write_tree(tmp_path / "tree")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "changes"


def patch(tree: Path, folder: Path, *rules: str, version: str = "1.1.8") -> str:
    """Apply rules to the tree and return the text of its file."""
    apply_changes(tree, made_up.release(version), load(folder, *rules))
    return (tree / FILE).read_text("utf-8")


def refuse(tree: Path, folder: Path, *rules: str, version: str = "1.1.8") -> str:
    """Apply rules that must be refused, and return the message."""
    with pytest.raises(PatchError) as refusal:
        patch(tree, folder, *rules, version=version)
    assert (tree / FILE).read_text("utf-8") == SOURCE
    return str(refusal.value)


def test_replaces_exactly_what_matched(tree: Path, folder: Path) -> None:
    """An edit lands where it belongs although characters of several bytes stand before it and behind it."""
    assert patch(tree, folder, write_rule()) == SOURCE.replace('say("hallo"', 'say("moin"')


def test_makes_all_edits_of_a_rule(tree: Path, folder: Path) -> None:
    """A rule that expects two matches edits both, each at its own place."""
    rule = write_rule(BOTH, "'mumble($$$WORDS)'", metadata="matches: 2")
    assert patch(tree, folder, rule) == SOURCE.replace("say(", "mumble(")


def test_deletes_the_whole_line(tree: Path, folder: Path) -> None:
    """A deletion that leaves nothing on its line takes the line along."""
    rule = write_rule("{kind: comment, regex: TODO}", '""')
    assert patch(tree, folder, rule) == SOURCE.replace("    # TODO: be polite\n", "")


def test_deletion_leaves_one_empty_line(tree: Path, folder: Path) -> None:
    """Where a deleted line stood between two empty ones, one of them goes along."""
    spaced = write_rule("{kind: comment, regex: TODO}", '"\\n    # TODO: be polite\\n"', id="space")
    rule = write_rule("{kind: comment, regex: TODO}", '""')
    assert patch(tree, folder, spaced, rule) == SOURCE.replace("    # TODO: be polite\n", "\n")


def test_deletion_keeps_the_rest_of_the_line(tree: Path, folder: Path) -> None:
    """A deletion at the end of a line leaves the code before it, without the blanks between them."""
    rule = write_rule("{kind: comment, regex: ü}", '""')
    assert patch(tree, folder, rule) == SOURCE.replace("  # ü\n", "\n")


def test_template_leaves_no_blanks_at_line_ends(tree: Path, folder: Path) -> None:
    """The empty line of an indented template stays empty."""
    rule = write_rule(fix='|-\n  say("moin", $NAME)\n\n  say("moin moin", $NAME)')
    expected = '    say("moin", name)\n\n    say("moin moin", name)  # ü\n'
    assert patch(tree, folder, rule) == SOURCE.replace('    say("hallo", name)  # ü\n', expected)


def test_rule_sees_what_the_one_before_it_did(tree: Path, folder: Path) -> None:
    """Rules are applied in their order, each to the outcome of the one before."""
    second = write_rule("{pattern: 'say(\"moin\", $NAME)'}", "'wave($NAME)'", id="wave")
    assert "    wave(name)  # ü\n" in patch(tree, folder, write_rule(), second)


@pytest.mark.parametrize(("metadata", "found"), [("", 2), ("matches: 3", 2)])
def test_refuses_another_number_of_matches(tree: Path, folder: Path, metadata: str, found: int) -> None:
    """A rule that matches more or less often than it says is refused by name, release, file and count."""
    expected = 3 if metadata else 1
    message = refuse(tree, folder, write_rule(BOTH, "'x($$$WORDS)'", metadata=metadata))
    assert message == (
        f"Rule say-moin (10-politeness.yml) on {FILE} of SDK 1.1.8: {found} matches instead of {expected}.\n{ADVICE}"
    )


def test_lists_every_rule_that_does_not_match(tree: Path, folder: Path) -> None:
    """One message names all rules that fail, then what to do, and nothing is written although others match."""
    first, second = (write_rule("{pattern: absent()}", "x", id=name) for name in ("first", "second"))
    *failures, advice = refuse(tree, folder, first, write_rule(), second).splitlines()
    assert [line.split()[1] for line in failures] == ["first", "second"]
    assert advice == ADVICE


@pytest.mark.parametrize(
    ("releases", "version", "applies"),
    [
        (">=1.3.1", "1.3.0", False),
        (">=1.3.1", "1.3.1", True),
        (">=1.4.0b1", "1.4.0b2", True),
        ("<1.4.0b1", "1.4.0b2", False),
        ("<1.4.0b1", "1.3.2rc1", True),
    ],
)
def test_runs_rule_for_its_releases_only(
    tree: Path, folder: Path, releases: str, version: str, applies: bool
) -> None:
    """A rule runs for the releases that it names, pre-releases among them."""
    patched = patch(tree, folder, write_rule(metadata=f"releases: '{releases}'"), version=version)
    assert (patched != SOURCE) is applies


@pytest.mark.parametrize(("version", "expected"), [("1.1.8", 2), ("1.3.0", 5)])
def test_number_of_matches_may_depend_on_the_release(
    tree: Path, folder: Path, version: str, expected: int
) -> None:
    """Of a map from releases to numbers the one for the release counts."""
    rule = write_rule("{pattern: absent()}", "x", metadata="matches: {'<1.3': 2, '>=1.3': 5}")
    assert f"0 matches instead of {expected}" in refuse(tree, folder, rule, version=version)


def test_refuses_release_without_number_of_matches(tree: Path, folder: Path) -> None:
    """A map that leaves a release out is an error, not a rule that is skipped."""
    rule = write_rule(metadata="matches: {'<1.1': 1}")
    assert "gives 0 numbers of matches for SDK 1.1.8" in refuse(tree, folder, rule)


def test_refuses_fix_without_effect(tree: Path, folder: Path) -> None:
    """A fix that writes what was there before is an error."""
    assert "changes nothing" in refuse(tree, folder, write_rule(fix="'say(\"hallo\", $NAME)'"))


def test_refuses_nested_matches(tree: Path, folder: Path) -> None:
    """Matches inside one another would overwrite each other."""
    rule = write_rule("{any: [{kind: call}, {kind: argument_list}]}", "'()'", metadata="matches: 4")
    message = refuse(tree, folder, rule)
    assert message.startswith("Rule say-moin (10-politeness.yml) has matches inside one another")


def test_refuses_outcome_that_does_not_compile(tree: Path, folder: Path) -> None:
    """ast-grep writes syntax errors without a word; the tool does not."""
    message = refuse(tree, folder, write_rule(fix="'say(]'"))
    assert message.startswith(f"{FILE} of SDK 1.1.8 does not compile once patched")


def test_refuses_syntax_that_the_oldest_python_lacks(tree: Path, folder: Path) -> None:
    """A match statement is refused for a release that runs on Python 3.9."""
    rule = write_rule(fix="|-\n  match $NAME:\n      case _: pass")
    assert "does not compile" in refuse(tree, folder, rule)
    apply_changes(tree, made_up.release(python=">=3.10,<3.14"), load(folder, rule))


def test_refuses_file_that_upstream_lacks(tree: Path, folder: Path) -> None:
    """A rule for a file that is not there is named as such."""
    rule = write_rule().replace(FILE, "airflow/sdk/absent.py")
    assert "airflow/sdk/absent.py of SDK 1.1.8: there is no such file" in refuse(tree, folder, rule)


def test_applies_once_only(tree: Path, folder: Path, tmp_path: Path) -> None:
    """The second application is refused: the added file is there, and the rule finds nothing."""
    sources = tmp_path / "src"
    (sources / ADDED).parent.mkdir(parents=True)
    (sources / ADDED).write_text("BYE = 1\n")
    changes = load(folder, write_rule(), files=f"[{ADDED}]")
    patch = apply_changes(tree, made_up.release(), changes, sources)
    assert (set(patch.changed), set(patch.added)) == ({FILE}, {ADDED})
    assert (tree / ADDED).read_text() == "BYE = 1\n"
    with pytest.raises(PatchError) as refusal:
        apply_changes(tree, made_up.release(), changes, sources)
    there, unmatched, _ = refusal.value.sentences
    assert "is there already: patch pristine upstream only" in there
    assert "0 matches instead of 1" in unmatched


def test_adds_shared_file_once(tree: Path, folder: Path, tmp_path: Path) -> None:
    """A file that two changes share is added by the first, and left alone by the second; another's is refused."""
    sources = tmp_path / "src"
    (sources / ADDED).parent.mkdir(parents=True)
    (sources / ADDED).write_text("BYE = 1\n")
    rules = write_rule(), write_rule("{pattern: 'say(\"HALLO\", $N)'}", "cry($N)", id="cry")
    for number, (name, rule) in enumerate(zip(("politeness", "noise"), rules, strict=True)):
        write_change(folder, rule, number=number, name=name, more=f"shared: [{ADDED}]\n")
    first, second = load_changes(folder)
    assert list(apply_changes(tree, made_up.release(), [first], sources).added) == [ADDED]
    assert list(apply_changes(tree, made_up.release(), [second], sources).added) == []
    (tree / ADDED).write_text("BYE = 2\n")
    with pytest.raises(PatchError, match="is there already"):
        apply_changes(tree, made_up.release(), [second], sources)


def test_keeps_the_mode_of_a_changed_file(tree: Path, folder: Path) -> None:
    """Patching does not change a file's permissions, and leaves no other file behind."""
    (tree / FILE).chmod(0o755)
    patch(tree, folder, write_rule())
    assert (tree / FILE).stat().st_mode & 0o777 == 0o755
    assert list((tree / FILE).parent.iterdir()) == [tree / FILE]


def test_writes_all_files_or_none(tree: Path) -> None:
    """When one of several files cannot be written the others stay as they were."""
    with pytest.raises(OSError, match=FILE):
        write_files(tree, {FILE: b"changed", f"{FILE}/impossible.py": b""})
    assert (tree / FILE).read_text("utf-8") == SOURCE
    assert list((tree / FILE).parent.iterdir()) == [tree / FILE]
