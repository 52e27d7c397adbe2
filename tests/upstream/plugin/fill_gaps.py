"""What apache-airflow-devel-common 0.1.1 lacks for the tests of the releases that came after it.

A pytest plugin: load it with -p after tests_common.pytest_plugin, whose fixtures of the same names it replaces. It serves
tests/task_sdk/execution_time and tests/task_sdk/coordinators/test_subprocess.py; what it lacks for other tests fails on
the stock wheel and on the patched one alike.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import types
import uuid
from datetime import datetime, timezone
from unittest import mock

import pytest
import structlog
from tests_common.test_utils import config, mock_plugins, version_compat

from airflow.sdk.api.datamodels import _generated as models
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.definitions.dag import DAG
from airflow.sdk.execution_time import comms, task_runner
from airflow.sdk.execution_time.secrets_masker import SecretsMasker

MOMENT = datetime(2024, 12, 1, 1, tzinfo=timezone.utc)
# What a task instance has unless a test says otherwise, for the fields of whatever models the release has.
DEFAULTS = {
    "run_id": "test_run",
    "run_type": "manual",
    "state": "running",
    "try_number": 1,
    "map_index": -1,
    "dag_version_id": uuid.UUID(int=1),
    "consumed_asset_events": [],
    "dag_rel_path": "",
    "bundle_info": comms.BundleInfo(name="anything", version="any"),
    "sentry_integration": "",
    "logical_date": MOMENT,
    "start_date": MOMENT,
    "run_after": MOMENT,
    "data_interval_start": MOMENT,
    "data_interval_end": MOMENT,
}
# Of Airflow 3, whose versions tests compare with: more than there are.
KNOWN_MINORS = 10
# They keep what a test has set in the configuration.
CACHING_MODULES = (
    "airflow.dag_processing.bundles.manager",
    "airflow.sdk.execution_time.coordinator",
    "airflow.sdk.importers.base",
)


class EventCapture(pytest.LogCaptureFixture):
    """pytest's caplog, with structlog's events; `in` looks for one that has at least the items given."""

    def __call__(self, _logger, method_name, event):
        """Be the processor that takes every event."""
        level = logging.getLevelName(method_name.upper())
        record = logging.LogRecord(event.get("logger"), level, "", 0, event.get("event"), None, None)
        record.entry = {**event, "log_level": method_name}
        self.handler.emit(record)
        raise structlog.DropEvent

    @property
    def entries(self):
        return [getattr(record, "entry", None) or describe_record(record) for record in self.records]

    def __contains__(self, wanted):
        items = wanted.items() if isinstance(wanted, dict) else [("event", wanted)]
        return any(all(matches(entry.get(key), value) for key, value in items) for entry in self.entries)

    def __iter__(self):
        return iter(self.entries)

    def __getitem__(self, index):
        return self.entries[index]


def describe_record(record):
    """Return a record of the standard library as an event."""
    return {"event": record.getMessage(), "log_level": record.levelname.lower(), "logger": record.name}


def matches(value, wanted):
    """Compare a value with one, or with a regular expression."""
    return bool(wanted.match(str(value))) if hasattr(wanted, "match") else value == wanted


@pytest.fixture
def caplog(request):
    capture = EventCapture(request.node, _ispytest=True)
    processors = structlog.get_config()["processors"]
    before = processors.copy()
    # In place, for loggers that exist already hold this very list.
    processors[:] = [structlog.processors.MaybeTimeStamper(fmt="iso"), capture]
    yield capture
    processors[:] = before
    capture._finalize()


@pytest.fixture
def cap_structlog(caplog):
    return caplog


@pytest.fixture(autouse=True)
def _clear_caches():
    clear_caches(*CACHING_MODULES)
    yield
    clear_caches(*CACHING_MODULES)


def clear_caches(*modules):
    """Clear the cached functions of modules, as far as they are imported."""
    for module in filter(None, map(sys.modules.get, modules)):
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


@pytest.fixture(autouse=True)
def _disable_redact(request, mocker):
    """Mask nothing, whatever arguments later releases pass to redact()."""
    redacting = request.node.get_closest_marker("enable_redact") is not None
    mocker.patch("airflow.settings.MASK_SECRETS_IN_LOGS", redacting)
    if not redacting:
        mocker.patch.object(SecretsMasker, "redact", lambda _self, item, *_args, **_kwargs: item)


@pytest.fixture
def mock_supervisor_comms(mocker):
    """Stand in for the supervisor, with signatures: a message passed by name equals one passed by position."""
    supervisor = mocker.create_autospec(task_runner.CommsDecoder, instance=True)
    return mocker.patch.object(task_runner, "SUPERVISOR_COMMS", supervisor, create=True)


@pytest.fixture
def listener_manager():
    """Register listeners, for the time of a test, with the manager that the SDK has since 1.2."""
    manager = importlib.import_module("airflow.sdk.listener").get_listener_manager()
    yield manager.add_listener
    manager.clear()


@pytest.fixture
def create_runtime_ti(mocked_parse):
    """Create a task instance that can run; the keywords are fields of any of the models that describe it."""

    def create(task, dag_id="test_dag", ti_id=None, max_tries=None, **given):
        dag = task.get_dag() or DAG(dag_id, schedule=None, start_date=MOMENT)
        task.dag = dag
        fields = {
            "id": ti_id or uuid.uuid4(),
            "task_id": task.task_id,
            "dag_id": dag.dag_id,
            "max_tries": task.retries if max_tries is None else max_tries,
            "should_retry": given.get("try_number", 1) <= task.retries,
            **DEFAULTS,
            **given,
        }
        fields["dag_run"] = build_model(models.DagRun, fields)
        fields["ti_context"] = build_model(models.TIRunContext, fields)
        fields["ti"] = build_model(models.TaskInstance, fields)
        return mocked_parse(build_model(comms.StartupDetails, fields), dag.dag_id, task)

    return create


def build_model(model, fields):
    """Create a model from those of its fields that are given; None stands for others that it requires."""
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    return model(
        **{name: fields.get(name) for name in model.model_fields if name in required | fields.keys()}
    )


@contextlib.contextmanager
def set_options(overrides):
    """Set options for a while, in the core's configuration and in that which the SDK has of its own since 1.2."""
    with set_core_options(overrides), set_sdk_options(overrides):
        yield


@contextlib.contextmanager
def set_sdk_options(overrides):
    if not importlib.util.find_spec("airflow.sdk.configuration"):
        yield
        return
    conf = importlib.import_module("airflow.sdk.configuration").conf
    before = {option: conf.get(*option, fallback=None) for option in overrides}
    write_options(conf, overrides)
    try:
        yield
    finally:
        write_options(conf, before)


def write_options(conf, options):
    for (section, name), value in options.items():
        if value is None:
            conf.remove_option(section, name)
            continue
        if not conf.has_section(section):
            conf.add_section(section)
        conf.set(section, name, value)


@contextlib.contextmanager
def use_plugins(plugins=()):
    """Let the SDK, which looks for plugins itself since 1.2, find these."""
    module = importlib.import_module("airflow.sdk.plugins_manager")
    with mock.patch.object(module, "_get_plugins", return_value=(list(plugins), {})):
        clear_caches(module.__name__)
        yield
    clear_caches(module.__name__)


class SerializeValueOnlyXCom(BaseXCom):
    """An XCom backend as they were before 1.4: it has no store_value."""

    @staticmethod
    def serialize_value(value, **_kwargs):
        return value


def fill_modules():
    """Give the tests the names that they import from tests_common."""
    config.conf_vars = set_options
    if importlib.util.find_spec("airflow.sdk.plugins_manager"):
        mock_plugins.mock_plugin_manager = use_plugins
    backends = types.ModuleType("tests_common.test_utils.xcom_backends")
    backends.SerializeValueOnlyXCom = SerializeValueOnlyXCom
    sys.modules[backends.__name__] = backends
    version = version_compat.get_base_airflow_version_tuple()
    for minor in range(1, KNOWN_MINORS):
        setattr(version_compat, f"AIRFLOW_V_3_{minor}_PLUS", version >= (3, minor, 0))


set_core_options = config.conf_vars
fill_modules()
# Before 1.1, masking a secret takes a logging configuration, which Airflow as a library does not make.
logging.getLogger("airflow.task").addFilter(SecretsMasker())
