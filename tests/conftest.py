"""Which tests run without --everything, and which of them run side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdist.scheduler import LoadScopeScheduling

from tests.harness.namespaces import find_refusal

if TYPE_CHECKING:
    import pytest

EVERYTHING = "everything"

# They have patched supervisors start, the first of which ends whatever a test beside it has orphaned.
ONE_AFTER_THE_OTHER = {
    "tests/bench/test_bench.py",
    "tests/e2e/test_e2e.py",
    "tests/sdk/test_another_user.py",
    "tests/sdk/test_leftovers.py",
    "tests/sdk/test_orphans.py",
    "tests/sdk/test_told_to_stop.py",
    "tests/test_issue_65505.py",
}
# What they start is in PID namespaces, where there may be any; otherwise they belong to those above.
IN_NAMESPACES = {
    "tests/random_trees/test_random_trees.py",
    "tests/sdk/test_pull_requests.py",
    "tests/sdk/test_releases_in_use.py",
    "tests/upstream/test_upstream.py",
}
# They have a fixture that nobody else in their modules wants, and that takes minutes.
ON_THEIR_OWN = {
    "test_our_tests_pass_on_patched",
    "test_passes_all_tests",
    "test_scenarios_fail_on_stock",
    "test_upstreams_tests_keep_passing",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        f"--{EVERYTHING}",
        action="store_true",
        help="also run the tests that take minutes, and those of every other release and interpreter",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say that tests are left out: pytest-xdist doesn't count them."""
    if wants_everything(config):
        return None
    return f"Tests marked `{EVERYTHING}` are left out: nox -s tests -- --{EVERYTHING} runs them, too."


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not wants_everything(config):
        left_out = {item for item in items if item.get_closest_marker(EVERYTHING)}
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def wants_everything(config: pytest.Config) -> bool:
    """Whoever names a test wants it, however long it takes."""
    return bool(config.getoption(EVERYTHING)) or any("::" in argument for argument in config.args)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    # Groups by xdist_group are ignored from pytest 9.2 on: https://github.com/pytest-dev/pytest-xdist/issues/1386
    return Scheduling(config, log)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # untyped
    """Give each worker a module at a time, so that fixtures are made once, but for those named above."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._one_after_the_other = ONE_AFTER_THE_OTHER | (IN_NAMESPACES if find_refusal() else set())

    def _split_scope(self, nodeid: str) -> str:
        module, _, test = nodeid.partition("::")
        if module in self._one_after_the_other:
            return "one after the other"
        name = test.partition("[")[0]
        return f"{module}::{name}" if name in ON_THEIR_OWN else module
