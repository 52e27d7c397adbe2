"""The Execution API for one task, below the SDK's own client; Python 3.9, and an environment with the SDK."""

from __future__ import annotations

import json
import select
import sys
import uuid
from datetime import datetime, timezone
from typing import Any

from airflow.sdk.api import client as api_client
from airflow.sdk.api.datamodels import _generated as models
from tests.harness.real.telling import tell

# httpx up to SDK 1.3, httpx2 from 1.4 on
http = sys.modules[api_client.Client.__mro__[1].__module__.partition(".")[0]]

URL = "http://127.0.0.1"
# From 1.4 on the supervisor tells the server so that it has ended the task as the server said.
ACKNOWLEDGED = "server_terminated"
LOOKS = 3
"""Questions for the state of a run after which a task waits for its end for certain."""


class Server:
    """The Execution API for one task; `order` is a descriptor that becomes readable with the order to end."""

    def __init__(self, case: dict[str, Any], order: int) -> None:
        self.case = case
        self.order = order
        self.ended_by: int | None = None
        self.looks = 0

    def answer(self, request: Any) -> Any:
        name = request.url.path.rstrip("/").rpartition("/")[2]
        handler = getattr(self, f"answer_{name.replace('-', '_')}", None)
        if request.url.path.startswith("/variables/"):
            return self.answer_variable(request, name)
        if request.url.path.startswith("/dag-runs/"):
            return self.answer_triggered(name)
        if request.url.path.startswith("/xcoms/"):
            return http.Response(200, json={"key": name, "value": name})
        if handler is None:
            tell("unknown_request", method=request.method, path=request.url.path)
            return http.Response(404, json={"detail": "Not Found"})
        return handler(request)

    def answer_run(self, _request: Any) -> Any:
        return http.Response(200, json=build_run_context(self.case).model_dump(mode="json"))

    def answer_heartbeat(self, _request: Any) -> Any:
        status = self.case["end"]
        if status.isdigit() and select.select([self.order], [], [], 0)[0]:
            if self.ended_by is None:
                tell("conflict", status=status)
            self.ended_by = int(status)
            detail = {"reason": "not_running", "current_state": "failed"}
            return http.Response(self.ended_by, json={"detail": detail})
        if self.case["notice"]:
            tell("beat")
        return http.Response(204)

    def answer_state(self, request: Any) -> Any:
        state = json.loads(request.content)["state"]
        accepted = self.ended_by is None or state == ACKNOWLEDGED
        tell("state", state=state, accepted=accepted)
        return (
            http.Response(204)
            if accepted
            else http.Response(409, json={"detail": {"reason": "invalid_state"}})
        )

    def answer_variable(self, request: Any, key: str) -> Any:
        if key == "away":
            raise http.ConnectError("the API server is restarting", request=request)
        return http.Response(200, json={"key": key, "value": f"value of {key}"})

    def answer_triggered(self, name: str) -> Any:
        """Answer for a Dag's run that the task has triggered, and that never ends; tell when the task waits for that."""
        if name != "state":
            return http.Response(204)
        self.looks += 1
        if self.looks == LOOKS:
            tell("ready")
        return http.Response(200, json={"state": "running"})

    def answer_rtif(self, _request: Any) -> Any:
        return http.Response(201, json={})

    def answer_start_date(self, _request: Any) -> Any:
        return http.Response(200, json=None)


def make_client(server: Server) -> Any:
    return api_client.Client(base_url=URL, token="", transport=http.MockTransport(server.answer))


def build(model: Any, **values: Any) -> Any:
    """Validate those values that this release's model knows."""
    return model.model_validate({name: value for name, value in values.items() if name in model.model_fields})


def build_run_context(case: dict[str, Any]) -> Any:
    now = datetime.now(tz=timezone.utc)
    times = dict.fromkeys(
        ("logical_date", "data_interval_start", "data_interval_end", "run_after", "start_date"), now
    )
    dag_run = build(
        models.DagRun,
        **times,
        dag_id=case["dag"],
        run_id="run",
        end_date=None,
        run_type="manual",
        state="running",
        consumed_asset_events=[],
        partition_key=None,
    )
    return build(
        models.TIRunContext, dag_run=dag_run, max_tries=int(case["retries"]), should_retry=case["retries"]
    )


def build_task_instance(case: dict[str, Any]) -> Any:
    return build(
        models.TaskInstance,
        id=uuid.uuid4(),
        task_id=case["task"],
        dag_id=case["dag"],
        run_id="run",
        try_number=1,
        dag_version_id=uuid.uuid4(),
        pool_slots=1,
        priority_weight=1,
        queue="default",
    )
