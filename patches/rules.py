"""Change files, and their application to a tree of upstream's files."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from patches.commands import find_tool, run_command
from patches.errors import PatchError
from patches.releases import ROOT

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Union

    from patches.releases import Release

    Tree = Union[Path, zipfile.Path]

CHANGES = ROOT / "patches" / "changes"
SOURCES = ROOT / "task-sdk" / "src"
TESTS = ROOT / "task-sdk" / "tests"
PAGES = ROOT / "task-sdk"
# Where a rule's file is: in the SDK, which is in the wheel, or in the core, which is in a checkout alone.
SDK, CORE = "airflow/", "airflow-core/"
# Where the page of documentation is that lines are inserted into; a checkout alone has it.
DOCUMENTATION = ("airflow-core/docs/", "docker-stack-docs/", "task-sdk/docs/")
# Below task-sdk/tests, as upstream has it.
TEST_FOLDER = "task_sdk/"
# Below task-sdk.
PAGE_FOLDER = "docs/"

CHANGE_KEYS = {"change", "what", "why", "upstream", "files", "tests"}
OPTIONAL_CHANGE_KEYS = {"needs", "subject", "news", "significant", "refers", "shared", "docs"}
RULE_KEYS = {"id", "language", "message", "note", "rule", "fix", "metadata"}
OPTIONAL_RULE_KEYS = {"constraints", "utils", "transform", "rewriters"}
INSERTION_KEYS = {"id", "message", "note", "insert", "metadata"}
PLACE_KEYS = {"after", "before"}
METADATA_KEYS = {"file"}
OPTIONAL_METADATA_KEYS = {"matches", "releases"}
# Follows the rules that fail.
ADVICE = 'Where upstream\'s code has changed, CONTRIBUTING.md says what to do, under "Add a release".'
NEW_FILE_MODE = 0o644
QUOTED_LENGTH = 40


@dataclass(frozen=True)
class Insertion:
    """Whole lines that go after, or before, others of a text that ast-grep cannot parse."""

    lines: str
    place: str
    is_after: bool


@dataclass(frozen=True)
class Rule:
    """One ast-grep rule or insertion: its text, the file that it edits, and how often it matches in which releases."""

    id: str
    origin: str
    """The name of the change file, for messages."""
    text: str
    file: str
    releases: SpecifierSet
    counts: tuple[tuple[SpecifierSet, int], ...]
    insertion: Insertion | None = None
    """None for an ast-grep rule."""

    def count_expected(self, release: Release) -> int:
        """Return how often the rule must match in a release; 0 means that the rule is not for it."""
        if not _contains(self.releases, release):
            return 0
        counts = [count for versions, count in self.counts if _contains(versions, release)]
        if len(counts) != 1:
            raise PatchError(
                f"Rule {self.id} ({self.origin}) gives {len(counts)} numbers of matches for SDK {release.version}: "
                "give one."
            )
        return counts[0]


@dataclass(frozen=True)
class Item:
    """A file or a change, and the releases that it is for."""

    name: str
    releases: SpecifierSet


@dataclass(frozen=True)
class Change:
    """What one change file says: why the change exists, the files that it adds and the rules that it applies."""

    name: str
    what: str
    why: str
    upstream: str
    subject: str
    news: str
    significant: str
    refers: str
    needs: tuple[Item, ...]
    files: tuple[Item, ...]
    shared: tuple[Item, ...]
    """Files that it brings unless another change has brought them before."""
    tests: tuple[Item, ...]
    docs: tuple[Item, ...]
    rules: tuple[Rule, ...]

    @property
    def goes_upstream(self) -> bool:
        """Whether it is meant for apache/airflow, too, and not for the wheels alone."""
        return bool(self.subject)

    def touches(self, file: str, release: Release) -> bool:
        """Say whether it adds or edits a file of a release."""
        return file in select_names((*self.files, *self.shared), release) or any(
            rule.file == file and rule.count_expected(release) for rule in self.rules
        )


@dataclass
class Patch:
    """The outcome of all changes on one tree: content by path relative to the tree."""

    changed: dict[str, bytes] = field(default_factory=dict)
    added: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit:
    """A replacement of the bytes from start to end."""

    start: int
    end: int
    text: bytes


def load_changes(folder: Path = CHANGES) -> list[Change]:
    """Read all change files, in the order in which they are applied."""
    changes = [_load_change(path) for path in sorted(folder.glob("*.yml"))]
    if not changes:
        raise PatchError(f"{folder} has no change file.")
    _refuse_duplicates("Rule", [(rule.id, rule.origin) for change in changes for rule in change.rules])
    _refuse_duplicates("File", [(file.name, change.name) for change in changes for file in change.files])
    _refuse_duplicates("Page", [(page.name, change.name) for change in changes for page in change.docs])
    _refuse_unmet_needs(changes)
    return changes


def select_names(items: Iterable[Item], release: Release) -> list[str]:
    """Return the names of the items that are for a release."""
    return [item.name for item in items if _contains(item.releases, release)]


def add_needed(changes: Sequence[Change], names: Iterable[str], release: Release) -> list[Change]:
    """Return the changes of these names and all that they need for a release, in the order of application."""
    wanted = set(names)
    for change in reversed(changes):  # what a change needs comes before it
        if change.name in wanted:
            wanted.update(select_names(change.needs, release))
    return [change for change in changes if change.name in wanted]


def apply_changes(tree: Path, release: Release, changes: Sequence[Change], sources: Path = SOURCES) -> Patch:
    """Apply all changes to a pristine tree that holds ``airflow/``, and return what was written.

    Unless every rule matches as often as it says, a PatchError lists those that do not and nothing is written.
    """
    patch = compute_patch(tree, release, changes, sources)
    write_files(tree, patch.changed | patch.added)
    return patch


def compute_patch(
    tree: Tree,
    release: Release,
    changes: Sequence[Change],
    sources: Path = SOURCES,
    is_ours: Callable[[str, bytes], bool] | None = None,
) -> Patch:
    """Return what the changes make of a tree, which may be an open wheel, without writing anything.

    `is_ours` says whether the tree has a shared file with our content; unless given, byte for byte.
    """
    is_ours = is_ours or (lambda file, content: _read_file(tree, file) == content)
    patch = Patch()
    problems: list[str] = []
    failures: list[str] = []
    for change in changes:
        problems += _add_files(tree, patch, change, release, sources, is_ours=is_ours)
        for rule in change.rules:
            if rule.file.startswith(SDK):
                failures += apply_rule(tree, patch, rule, release)
    if failures:
        problems += [*failures, ADVICE]
    if not problems:
        problems = list(_find_broken_files(patch, release))
    if problems:
        raise PatchError(*problems)
    return patch


def write_files(tree: Path, files: dict[str, bytes]) -> None:
    """Write files into a tree: all contents first, beside their targets, then the renames."""
    pending: list[tuple[Path, Path]] = []
    try:
        for file, content in files.items():
            target = tree / file
            target.parent.mkdir(parents=True, exist_ok=True)
            pending.append((_write_beside(target, content), target))
        while pending:
            temporary, target = pending[0]
            temporary.replace(target)
            del pending[0]
    finally:
        for temporary, _ in pending:
            temporary.unlink()


def find_edits(rule: Rule, source: bytes) -> list[Edit]:
    """Run one rule on the text of a file and return the edits that it asks for, in order."""
    if rule.insertion is not None:
        return _find_places(rule.insertion, source)
    # The text comes on stdin: ast-grep skips files that git ignores, and says nothing about missing ones.
    result = run_command(
        [find_tool("ast-grep"), "scan", "--inline-rules", rule.text, "--json=compact", "--stdin"],
        stdin=source,
    )
    if result.stderr:
        complaint = " ".join(result.stderr.decode(errors="replace").split())
        cause = complaint.rpartition("╰▻ ")[2]
        raise PatchError(f"ast-grep does not take rule {rule.id} ({rule.origin}): {cause}")
    edits = [
        Edit(
            start=match["replacementOffsets"]["start"],
            end=match["replacementOffsets"]["end"],
            text=match["replacement"].encode(),
        )
        for match in json.loads(result.stdout)
    ]
    edits.sort(key=lambda edit: edit.start)
    if any(later.start < earlier.end for earlier, later in zip(edits, edits[1:])):
        raise PatchError(
            f"Rule {rule.id} ({rule.origin}) has matches inside one another: make it match less."
        )
    return edits


def _find_places(insertion: Insertion, source: bytes) -> list[Edit]:
    place = re.compile(rb"^%b$" % re.escape(insertion.place.encode()), re.MULTILINE)
    lines = insertion.lines.encode()
    if insertion.is_after:
        return [Edit(match.end(), match.end(), b"\n" + lines) for match in place.finditer(source)]
    return [Edit(match.start(), match.start(), lines + b"\n") for match in place.finditer(source)]


def apply_edits(source: bytes, edits: Sequence[Edit]) -> bytes:
    """Return the text with the edits, in its order, made, without the blanks that a template leaves at line ends.

    A line that a deletion has emptied goes altogether, and of two empty lines around it one.
    """
    # From the last one on: what comes before an edit keeps its offsets.
    for edit in reversed(edits):
        line_start = source.rfind(b"\n", 0, edit.start) + 1
        line_end = source.find(b"\n", edit.end)
        line_end = len(source) if line_end < 0 else line_end
        touched = source[line_start : edit.start] + edit.text + source[edit.end : line_end]
        if not touched.strip() and not edit.text.strip():
            before, after = source[:line_start], source[line_end + 1 :]
            source = before + (after[1:] if before.endswith(b"\n\n") and after.startswith(b"\n") else after)
            continue
        stripped = b"\n".join(line.rstrip() for line in touched.split(b"\n"))
        source = source[:line_start] + stripped + source[line_end:]
    return source


def _load_change(path: Path) -> Change:
    texts = _split_documents(path)
    if not texts:
        raise PatchError(f"{path.name} is empty: describe the change in its first document.")
    document = _read_mapping(texts[0], path.name)
    _check_keys(document, CHANGE_KEYS, OPTIONAL_CHANGE_KEYS, path.name)
    name = document["change"]
    if ("subject" in document) != ("news" in document):
        raise PatchError(
            f"{path.name} has only one of subject and news: a change that goes to upstream needs both."
        )
    if "significant" in document and "news" not in document:
        raise PatchError(f"{path.name} has significant without news: news is the line above it.")
    if path.stem.partition("-")[2] != name:
        raise PatchError(f"{path.name} says that its change is {name!r}: call the file NN-{name}.yml.")
    return Change(
        name=name,
        what=_read_text(document, "what", path.name),
        why=_read_text(document, "why", path.name),
        upstream=_read_text(document, "upstream", path.name),
        subject=_read_optional_text(document, "subject", path.name),
        news=_read_optional_text(document, "news", path.name),
        significant=_read_optional_text(document, "significant", path.name),
        refers=_read_optional_text(document, "refers", path.name),
        needs=_read_items(document.get("needs", []), "needs", path.name),
        files=_read_files(document["files"], "files", path.name, SDK),
        shared=_read_files(document.get("shared", []), "shared", path.name, SDK),
        tests=_read_files(document["tests"], "tests", path.name, TEST_FOLDER),
        docs=_read_files(document.get("docs", []), "docs", path.name, PAGE_FOLDER),
        rules=tuple(_load_rule(text, path.name) for text in texts[1:]),
    )


def _load_rule(text: str, origin: str) -> Rule:
    document = _read_mapping(text, origin)
    where = f"Rule {document.get('id', '(without id)')} ({origin})"
    is_insertion = "insert" in document
    if is_insertion:
        _check_keys(document, INSERTION_KEYS, PLACE_KEYS, where)
    else:
        _check_keys(document, RULE_KEYS, OPTIONAL_RULE_KEYS, where)
    metadata = document["metadata"]
    if not isinstance(metadata, dict):
        raise PatchError(f"{where} has no mapping for metadata.")
    _check_keys(metadata, METADATA_KEYS, OPTIONAL_METADATA_KEYS, f"{where}, in its metadata,")
    for key in ("message", "note"):
        _read_text(document, key, where)
    matches = metadata.get("matches", 1)
    counts = matches if isinstance(matches, dict) else {"": matches}
    return Rule(
        id=_read_text(document, "id", where),
        origin=origin,
        text=text,
        file=_check_path(metadata["file"], where, *(DOCUMENTATION if is_insertion else (SDK, CORE))),
        releases=_read_specifiers(metadata.get("releases", ""), where),
        counts=tuple(
            (_read_specifiers(versions, where), _check_count(count, where))
            for versions, count in counts.items()
        ),
        insertion=_read_insertion(document, where) if is_insertion else None,
    )


def _read_insertion(document: dict[str, Any], where: str) -> Insertion:
    places = PLACE_KEYS & document.keys()
    if len(places) != 1:
        raise PatchError(f"{where} needs one place: give either after or before.")
    (place,) = places
    for key in (place, "insert"):
        _read_text(document, key, where)
    # Unlike other texts they keep the blanks and empty lines around them; a block scalar ends in a newline.
    return Insertion(
        lines=document["insert"].removesuffix("\n"),
        place=document[place].removesuffix("\n"),
        is_after=place == "after",
    )


def _split_documents(path: Path) -> list[str]:
    """Return the text of each YAML document, for ast-grep to read as it was written."""
    text = path.read_text(encoding="utf-8")
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise PatchError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    return [text[node.start_mark.index : node.end_mark.index] for node in nodes]


def _read_mapping(text: str, where: str) -> dict[str, Any]:
    document = yaml.safe_load(text)
    if not isinstance(document, dict):
        raise PatchError(f"{where} has a document that is no mapping: {text[:QUOTED_LENGTH]!r}.")
    return document


def _check_keys(document: dict[str, Any], required: set[str], optional: set[str], where: str) -> None:
    missing = required - document.keys()
    unknown = document.keys() - required - optional
    if missing:
        raise PatchError(f"{where} lacks {', '.join(sorted(missing))}.")
    if unknown:
        raise PatchError(f"{where} has keys that mean nothing: {', '.join(sorted(map(str, unknown)))}.")


def _read_text(document: dict[str, Any], key: str, where: str) -> str:
    text = document[key]
    if not isinstance(text, str) or not text.strip():
        raise PatchError(f"{where} has no text for {key}.")
    return text.strip()


def _read_optional_text(document: dict[str, Any], key: str, where: str) -> str:
    return _read_text(document, key, where) if key in document else ""


def _read_specifiers(text: object, where: str) -> SpecifierSet:
    try:
        return SpecifierSet(str(text))
    except InvalidSpecifier:
        raise PatchError(f"{where} names releases {text!r}: write them like '>=1.3.1,<1.4.0b1'.") from None


def _check_count(count: object, where: str) -> int:
    if type(count) is not int or count < 1:
        raise PatchError(f"{where} says that it matches {count!r} times: give a number from 1 on.")
    return count


def _read_files(entries: object, key: str, where: str, folder: str) -> tuple[Item, ...]:
    items = _read_items(entries, key, where)
    for item in items:
        _check_path(item.name, where, folder)
    return items


def _read_items(entries: object, key: str, where: str) -> tuple[Item, ...]:
    """Read a list whose entries are names, or maps from one name to the releases that it is for."""
    if not isinstance(entries, list):
        raise PatchError(f"{where} has no list for {key}: write [] if there are none.")
    items = []
    for entry in entries:
        limited = entry if isinstance(entry, dict) else {entry: ""}
        for name, releases in limited.items():
            if not isinstance(name, str):
                raise PatchError(f"{where} has {name!r} among its {key}: give a name.")
            items.append(Item(name, _read_specifiers(releases, where)))
    return tuple(items)


def _check_path(file: object, where: str, *folders: str) -> str:
    if not isinstance(file, str) or not file.startswith(folders) or ".." in PurePosixPath(file).parts:
        raise PatchError(
            f"{where} names the file {file!r}: give a path that begins with {' or '.join(folders)}."
        )
    return file


def _refuse_unmet_needs(changes: Sequence[Change]) -> None:
    """Refuse a change that needs what does not come before it."""
    before: set[str] = set()
    for change in changes:
        for need in change.needs:
            if need.name not in before:
                raise PatchError(
                    f"Change {change.name} needs {need.name}, which is no change that comes before it."
                )
        before.add(change.name)


def _refuse_duplicates(kind: str, owners: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, owner in owners:
        if name in seen:
            raise PatchError(f"{kind} {name} is in {seen[name]} and in {owner}: only one can have it.")
        seen[name] = owner


def _contains(releases: SpecifierSet, release: Release) -> bool:
    return releases.contains(release.version, prereleases=True)


def _add_files(
    tree: Tree,
    patch: Patch,
    change: Change,
    release: Release,
    sources: Path,
    *,
    is_ours: Callable[[str, bytes], bool],
) -> Iterator[str]:
    shared = select_names(change.shared, release)
    for file in (*select_names(change.files, release), *shared):
        if not (sources / file).is_file():
            yield f"{file} of change {change.name} is not below {sources}."
            continue
        content = (sources / file).read_bytes()
        if not tree.joinpath(file).is_file():
            patch.added[file] = content
        elif file not in shared or not is_ours(file, content):
            yield (
                f"{file} of change {change.name} is there already: patch pristine upstream only (or upstream now has a "
                "file of that name)."
            )


def apply_rule(tree: Tree, patch: Patch, rule: Rule, release: Release) -> Iterator[str]:
    """Apply one rule to what those before it have left in the patch, or say what is wrong with it."""
    expected = rule.count_expected(release)
    if not expected:
        return
    where = f"Rule {rule.id} ({rule.origin}) on {rule.file} of SDK {release.version}"
    source = patch.changed.get(rule.file, _read_file(tree, rule.file))
    if source is None:
        yield f"{where}: there is no such file."
        return
    edits = find_edits(rule, source)
    if len(edits) != expected:
        yield f"{where}: {len(edits)} matches instead of {expected}."
        return
    patched = apply_edits(source, edits)
    if patched == source:
        yield f"{where}: its fix changes nothing."
        return
    patch.changed[rule.file] = patched


def _read_file(tree: Tree, file: str) -> bytes | None:
    path = tree.joinpath(file)
    return path.read_bytes() if path.is_file() else None


def _find_broken_files(patch: Patch, release: Release) -> Iterator[str]:
    # Python cannot check the syntax of a later Python than itself.
    feature_version = min(release.oldest_python, sys.version_info[:2])
    for file, content in (patch.changed | patch.added).items():
        if not file.endswith(".py"):
            continue
        try:
            compile(
                ast.parse(content, file, feature_version=feature_version), file, "exec", dont_inherit=True
            )
        except SyntaxError as error:
            yield f"{file} of SDK {release.version} does not compile once patched: {error.msg} (line {error.lineno})."


def _write_beside(target: Path, content: bytes) -> Path:
    mode = target.stat().st_mode if target.exists() else NEW_FILE_MODE
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    temporary = Path(name)
    temporary.chmod(mode)
    return temporary
