"""The commit for upstream, made in the sdist of the last release of every line: it is a checkout's task-sdk folder."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest
import yaml
from packaging.version import Version

from patches.pull_requests import Wishes, make_pull_request
from patches.releases import last_of_lines
from patches.rules import load_changes
from patches.upstream import fetch_sdist, fetch_wheel
from patches.wheels import build_wheel
from tests.harness.checkouts import commit_all, git, unpack_checkout
from tests.harness.lines import MAIN_LINES, find_wanted, mark_rest, skips_without_interpreter
from tests.sdk.running import SCENARIOS, install_release
from tests.upstream.checkouts import build_sdk, export_parent
from tests.upstream.judging import REPEATS
from tests.upstream.results import BROKEN
from tests.upstream.suites import SUPERVISOR_TESTS, install_suite, run_suite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from patches.pull_requests import PullRequest
    from patches.releases import Release
    from patches.rules import Change
    from tests.upstream.results import Result

SOURCES = "task-sdk/src"
OPTIONS = ("leftover_policy", "spared_leftovers", "stop_signal_policy")
CONFIGURATION = "airflow-core/src/airflow/config_templates/config.yml"
DOCUMENTATION = "task-sdk/docs"
SECTIONS = [
    "What ends a task",
    "Signals to a supervisor",
    "The task is interrupted",
    "Processes that the task has started",
    "When the supervisor dies",
    "Limits",
]
CHANGES = [change for change in load_changes() if change.goes_upstream]
# What a pull request goes to first, and the only line on which all tests of a commit run: those of its wheel run on every line.
NEWEST = last_of_lines()[-1]
# The last one needs all others.
ALONE = CHANGES[:-1]
RUNS_AT_A_TIME = 2
# What the licence asks of a patched wheel, in the files that are derived from upstream's; upstream has no use for it.
MARK = b"# Modified by"


@pytest.fixture(
    scope="module",
    params=mark_rest(last_of_lines(), lambda release: release.version in MAIN_LINES),
    ids=lambda release: release.version,
)
def release(request: pytest.FixtureRequest) -> Release:
    release: Release = request.param
    return release


@pytest.fixture(scope="module")
def pristine(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_checkout(fetch_sdist(release), tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def checkout(pristine: Path, tmp_path: Path) -> Path:
    return copy(pristine, tmp_path / "checkout")


def copy(pristine: Path, folder: Path) -> Path:
    shutil.copytree(pristine, folder, symlinks=True)
    return folder


def name_tree(checkout: Path, folder: str = "") -> str:
    """Return the hash of a committed folder."""
    return git(checkout, "rev-parse", f"HEAD:{folder}").strip()


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[dict[str, Result]]]]:
    """Make all commits that are to be tested, then run the tests on them; by the names of the commits."""
    plan = {release.version: (release, Wishes()) for release in last_of_lines()}
    plan |= {change.name: (NEWEST, Wishes(only=(change.name,))) for change in ALONE}
    commits: dict[str, tuple[Path, PullRequest]] = {}
    for name in find_wanted(request, "name"):
        release, wishes = plan[name]
        checkout = unpack_checkout(fetch_sdist(release), tmp_path_factory.mktemp("tested"))
        commits[name] = (checkout, make_pull_request(checkout, CHANGES, wishes))
    with ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
        yield {name: pool.submit(run_tests, *commit) for name, commit in commits.items()}


def run_tests(checkout: Path, request: PullRequest) -> dict[str, Result]:
    """Run upstream's tests of the supervisor and those of the commit, on the SDK that is built from the checkout."""
    name = f"{request.release.version}-{request.branch}"
    with tempfile.TemporaryDirectory() as output:
        wheel = build_sdk(checkout, Path(output))
        environment = install_suite(request.release, wheel, flavour=request.branch)
    # Sorted: pytest 9 loses a folder's conftest when it comes back to the folder.
    ours = sorted(select_tests(request))
    results = run_suite(environment, [SUPERVISOR_TESTS, *map(str, ours)], name, tests=checkout / "task-sdk")
    assert {str(file) for file in ours} < {test.partition("::")[0] for test in results}
    # Some of upstream's tests fail now and then under load: an on_kill that prints fails if the task is printing.
    for number in range(1, REPEATS + 1):
        if broken := find_broken(results):
            results |= run_suite(
                environment, list(broken), f"{name}-repeat-{number}", tests=checkout / "task-sdk"
            )
    return results


def select_tests(request: PullRequest) -> list[PurePosixPath]:
    """Return the tests of a commit that are run, as paths in the SDK's folder."""
    tests = [PurePosixPath(file).relative_to("task-sdk") for file in request.files if "/test_" in file]
    return [
        test for test in tests if request.release.version == NEWEST.version or any(map(test.match, SCENARIOS))
    ]


def find_broken(results: dict[str, Result]) -> dict[str, Result]:
    return {test: result for test, result in results.items() if result.outcome in BROKEN}


@pytest.mark.parametrize(
    "name",
    mark_rest(
        [*(release.version for release in last_of_lines()), *(change.name for change in ALONE)],
        NEWEST.version.__eq__,
    ),
)
def test_passes_all_tests(runs: dict[str, Future[dict[str, Result]]], name: str) -> None:
    """With all changes, or one and what it needs, upstream's tests pass, and those of the commit."""
    with skips_without_interpreter():
        results = runs[name].result()
    assert find_broken(results) == {}


def test_commits_once(release: Release, checkout: Path) -> None:
    """The checkout is one commit further, and clean; the release and the style were known."""
    before = git(checkout, "rev-parse", "HEAD")
    request = make_pull_request(checkout, CHANGES, Wishes())
    assert request.release == release
    assert not [notice for notice in request.notices if "style" in notice]
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "rev-parse", "HEAD~1") == before


def test_configuration_reference(release: Release, checkout: Path) -> None:
    """The reference that the core brings gets the options, and before 1.4 says when the grace period counts."""
    with skips_without_interpreter():
        environment = install_release(release)
    (reference,) = environment.folder.glob(
        "venv/lib/python*/site-packages/airflow/config_templates/config.yml"
    )
    copied = checkout / CONFIGURATION
    copied.parent.mkdir(parents=True)
    shutil.copy(reference, copied)
    commit_all(checkout)
    make_pull_request(checkout, CHANGES, Wishes())
    before, after = (yaml.safe_load(path.read_text()) for path in (reference, copied))
    option = after["core"]["options"]["killed_task_cleanup_time"]
    if Version(release.version) < Version("1.4.0b1"):
        former = before["core"]["options"]["killed_task_cleanup_time"]["description"]
        assert option["description"].startswith(f"{former.rstrip()}\n\nTasks heed it only where")
        option["description"] = former
    added = {name: after["workers"]["options"].pop(name) for name in OPTIONS}
    assert all(option["description"] and option["version_added"] for option in added.values())
    assert after == before


def test_documentation(release: Release, checkout: Path) -> None:
    """From 1.4 on a page about the end of tasks is listed, and pointed to, and each change has its section there."""
    request = make_pull_request(checkout, CHANGES, Wishes())
    changed = sorted(PurePosixPath(file).name for file in request.files if file.startswith(DOCUMENTATION))
    if Version(release.version) < Version("1.4.0b1"):
        assert changed == []
        return
    assert changed == ["concepts.rst", "index.rst", "stopping-tasks.rst"]
    for page in ("concepts", "index"):
        assert (
            git(checkout, "diff", "HEAD~1", "--", f"{DOCUMENTATION}/{page}.rst").count("stopping-tasks") == 1
        )
    lines = (checkout / DOCUMENTATION / "stopping-tasks.rst").read_text().splitlines()
    titles = [title for title, line in zip(lines, lines[1:]) if title and line == "-" * len(title)]
    assert titles == SECTIONS
    (notice,) = (notice for notice in request.notices if "docker-stack-docs" in notice)
    assert notice.startswith(
        "Left out: rule point-to-stopping-from-signals, for there is no docker-stack-docs/"
    )


def test_commit_is_what_the_wheel_has(release: Release, checkout: Path, tmp_path: Path) -> None:
    """The sources are those of the patched wheel, but for its mark, and for empty lines, which are ruff's business."""
    request = make_pull_request(checkout, CHANGES, Wishes())
    wheel = build_wheel(release, fetch_wheel(release), CHANGES, tmp_path)
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    for file in (PurePosixPath(file) for file in request.files if file.startswith(SOURCES)):
        packed = (tmp_path / "wheel" / file.relative_to(SOURCES)).read_bytes().splitlines()
        unmarked = [line for line in packed if line and not line.startswith(MARK)]
        assert unmarked == [line for line in (checkout / file).read_bytes().splitlines() if line], file


def test_commit_before_builds_upstreams_wheel(release: Release, checkout: Path, tmp_path: Path) -> None:
    """What a checkout is compared with is the SDK as upstream released it."""
    make_pull_request(checkout, CHANGES, Wishes())
    with export_parent(checkout) as parent:
        built = build_sdk(parent, tmp_path / "dist")
    assert read_code(built) == read_code(fetch_wheel(release))


def read_code(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith("airflow/")}


def test_adds_no_type_error(checkout: Path) -> None:
    """Mypy, with upstream's settings, has nothing against the commit that it had not against the files before."""
    request = make_pull_request(checkout, CHANGES, Wishes(types=True))
    (left_out,) = [notice for notice in request.notices if "types" in notice] or [""]
    if "No Python" in left_out:
        pytest.skip(left_out)
    assert left_out == ""


def test_patch_gives_the_same_tree(pristine: Path, checkout: Path, tmp_path: Path) -> None:
    """`git am` on another copy makes of the patch what the command has committed, byte for byte."""
    patch = tmp_path / "teardown.patch"
    make_pull_request(checkout, CHANGES, Wishes(patch_file=patch))
    other = copy(pristine, tmp_path / "other")
    git(other, "am", "--quiet", str(patch))
    assert name_tree(other) == name_tree(checkout)
    assert git(other, "log", "-1", "--format=%an %ae %B") == git(checkout, "log", "-1", "--format=%an %ae %B")


def test_changes_may_be_sent_one_after_the_other(pristine: Path, checkout: Path, tmp_path: Path) -> None:
    """A commit for each change, on top of one another, ends where the one commit of all does."""
    make_pull_request(checkout, CHANGES, Wishes())
    stack = copy(pristine, tmp_path / "stack")
    for number, change in enumerate(CHANGES, 1):
        request = make_pull_request(stack, CHANGES, Wishes(only=(change.name,), number=number))
        assert request.changes == [change]
    assert name_tree(stack, "task-sdk") == name_tree(checkout, "task-sdk")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_each_change_applies_alone(checkout: Path, change: Change) -> None:
    """A change alone is taken from a pristine checkout, together with what it needs."""
    request = make_pull_request(checkout, CHANGES, Wishes(only=(change.name,)))
    assert request.changes[-1] == change
    assert request.message.startswith(f"{change.subject}\n\n")
