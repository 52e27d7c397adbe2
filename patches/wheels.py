"""Patched wheels: upstream's wheel, unpacked, patched and packed again under a local version."""

from __future__ import annotations

import calendar
import difflib
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from patches.commands import run_command
from patches.errors import PatchError
from patches.releases import PROJECT, local_version
from patches.rules import apply_changes, write_files
from patches.upstream import wheel_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from patches.releases import Release
    from patches.rules import Change, Patch

NOTICE_NAME = "NOTICE.teardown"
NOTICE_WIDTH = 100


def build_wheel(release: Release, upstream: Path, changes: Sequence[Change], output: Path) -> Path:
    """Write the patched wheel of a release, and beside it the diff against upstream's; return the wheel's path.

    The bytes depend on upstream's wheel, the changes, and the versions of the tools alone.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=output) as work:
            built = _build_in(Path(work), release, upstream, changes)
            for file in (built.with_suffix(".diff"), built):
                file.replace(output / file.name)
    except OSError as error:
        raise _explain_refusal(output, error) from None
    return output / built.name


def patched_name(release: Release) -> str:
    """Return the file name of a release's patched wheel."""
    return wheel_name(f"{release.version}+{local_version()}")


def prepare_output(output: Path) -> None:
    """Make the folder for the wheels, or say that it cannot take them."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise _explain_refusal(output, error) from None


def _explain_refusal(output: Path, error: OSError) -> PatchError:
    return PatchError(
        f"{output} cannot take the wheels ({error.strerror}): name another folder with --output."
    )


def _build_in(work: Path, release: Release, upstream: Path, changes: Sequence[Change]) -> Path:
    """Make the wheel and its diff in an empty folder, and return the wheel's path."""
    tree = _unpack(upstream, work)
    patch = apply_changes(tree, release, changes)
    _add_notices(tree, release, changes, patch)
    _pack(tree, upstream, work)
    built = work / patched_name(release)
    _check_extent(upstream, built, patch)
    built.with_suffix(".diff").write_text(_diff_wheels(upstream, built), encoding="utf-8")
    return built


def _unpack(wheel: Path, work: Path) -> Path:
    _run_wheel("unpack", "--dest", str(work), str(wheel))
    (tree,) = work.iterdir()
    return tree


def _pack(tree: Path, upstream: Path, work: Path) -> None:
    arguments = ["pack", "--dest-dir", str(work), "--local-version", local_version(), str(tree)]
    _run_wheel(*arguments, environment={"SOURCE_DATE_EPOCH": str(_find_build_time(upstream))})


def _run_wheel(*arguments: str, environment: dict[str, str] | None = None) -> None:
    result = run_command([sys.executable, "-m", "wheel", *arguments], environment=environment)
    if result.returncode:
        complaint = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise PatchError(f"wheel {arguments[0]} {arguments[-1]} failed: {' '.join(complaint)}")


def _find_build_time(wheel: Path) -> int:
    """Return when a wheel's newest file was made, in seconds since the epoch."""
    with zipfile.ZipFile(wheel) as archive:
        return calendar.timegm(max(info.date_time for info in archive.infolist()))


def _add_notices(tree: Path, release: Release, changes: Sequence[Change], patch: Patch) -> None:
    """Say in each changed file, and in one notice, what was changed: Apache-2.0 §4b."""
    (dist_info,) = tree.glob("*.dist-info")
    notice = f"{dist_info.name}/licenses/{NOTICE_NAME}"
    marked = {file: _mark_changed(content) for file, content in patch.changed.items()}
    write_files(tree, marked | {notice: _write_notice(release, changes, patch).encode()})


def _mark_changed(content: bytes) -> bytes:
    """Add a line to the comment that a file begins with."""
    lines = content.splitlines(keepends=True)
    header = next((number for number, line in enumerate(lines) if not line.startswith(b"#")), len(lines))
    mark = f"# Modified by task-sdk-teardown ({local_version()}); see {NOTICE_NAME} in the dist-info.\n"
    return b"".join([*lines[:header], mark.encode(), *lines[header:]])


def _write_notice(release: Release, changes: Sequence[Change], patch: Patch) -> str:
    sections = [
        _fill(
            f"This is {PROJECT} {release.version} with changes, {release.version}+{local_version()}. The changes are "
            "not the Apache Software Foundation's. They are under the Apache License 2.0, like the rest."
        ),
        "\n".join(["Changed files:", *_list_files(patch.changed, release, changes)]),
        "\n".join(["Added files:", *_list_files(patch.added, release, changes)]),
        *(_describe_change(change) for change in changes),
    ]
    return "\n\n".join(sections) + "\n"


def _list_files(files: Iterable[str], release: Release, changes: Sequence[Change]) -> Iterator[str]:
    for file in sorted(files):
        names = [change.name for change in changes if change.touches(file, release)]
        yield f"  {file} ({', '.join(names)})"


def _describe_change(change: Change) -> str:
    return "\n".join(
        [
            f"{change.name}: {change.what}",
            _fill(change.why, "  Why: "),
            _fill(change.upstream, "  Upstream: "),
        ]
    )


def _fill(text: str, prefix: str = "") -> str:
    return textwrap.fill(text, NOTICE_WIDTH, initial_indent=prefix, subsequent_indent=" " * len(prefix))


def _check_extent(upstream: Path, built: Path, patch: Patch) -> None:
    """Refuse a wheel that differs from upstream's in anything but what the changes name."""
    before, after = _read_code(upstream), _read_code(built)
    different = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    unexpected = different ^ (patch.changed.keys() | patch.added.keys())
    if unexpected:
        raise PatchError(
            f"{built.name} was not kept, for it differs from upstream's wheel otherwise than the changes say: "
            f"{', '.join(sorted(unexpected))}."
        )


def _diff_wheels(upstream: Path, built: Path) -> str:
    before, after = _read_code(upstream), _read_code(built)
    different = sorted(file for file in after if before.get(file) != after[file])
    return "".join(line for file in different for line in _diff_file(file, before.get(file), after[file]))


def _diff_file(file: str, before: bytes | None, after: bytes) -> Iterator[str]:
    return difflib.unified_diff(
        (before or b"").decode().splitlines(keepends=True),
        after.decode().splitlines(keepends=True),
        fromfile=f"a/{file}" if before is not None else "/dev/null",
        tofile=f"b/{file}",
    )


def _read_code(wheel: Path) -> dict[str, bytes]:
    """Return the content of each file of a wheel outside its dist-info, whose name has the version in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name: archive.read(name) for name in names}
