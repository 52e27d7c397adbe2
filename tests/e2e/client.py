"""The REST API of an Airflow on this machine, as a user sees it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Any

REQUEST_TIMEOUT = 90.0
"""Seconds; the first request to a part of the API has it imported, which takes long on a busy machine."""

PAGE_SIZE = 100
"""What the API gives at most."""


BUSY_TIMEOUT = 60.0
"""Seconds for which a change is tried again that the API could not write."""


class ApiError(Exception):
    """The API answered with an error; the message has the request, the status and the answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Speaks to the API at `url`, of which everybody is an administrator."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Airflow adds a user's token to a request that has no such header, also where a task's is wanted: the
        # execution API would log a traceback.
        self._authorization = "none"

    def log_in(self) -> None:
        """Get a token for the requests that follow."""
        self._authorization = f"Bearer {self.request('GET', '/auth/token')['access_token']}"

    def request(self, method: str, path: str, body: object = None) -> Any:
        """Send a request with a JSON body and return the JSON answer.

        Raises ApiError for an answer that is an error, OSError when there is no answer.
        """
        request = urllib.request.Request(f"{self.url}{path}", method=method)  # noqa: S310  # http on loopback
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", self._authorization)
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, data, timeout=REQUEST_TIMEOUT) as response:  # noqa: S310
                return json.load(response)
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise ApiError(f"{method} {path}: {error.code} {answer}", error.code) from None

    def trigger(self, dag: str, conf: dict[str, str]) -> str:
        """Start a run and return its id."""
        body = {"logical_date": None, "conf": conf}
        return str(self.request("POST", f"/api/v2/dags/{dag}/dagRuns", body)["dag_run_id"])

    def task_instances(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """Return the task instances of a run by task id; `state`, `pid` (the runner's) and `try_number` are there."""
        return {instance["task_id"]: instance for instance in self.list_task_instances(dag, run)}

    def list_task_instances(self, dag: str, run: str) -> list[dict[str, Any]]:
        """Return all task instances of a run, also where there are many of a task, told apart by `map_index`."""
        instances: list[dict[str, Any]] = []
        while True:
            page = f"limit={PAGE_SIZE}&offset={len(instances)}&order_by=map_index"
            found = self.request("GET", f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances?{page}")
            instances += found["task_instances"]
            if len(instances) >= found["total_entries"]:
                return instances

    def set_failed(self, dag: str, run: str, task: str, map_index: int | None = None) -> None:
        """Set a task instance to failed."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        if map_index is not None:
            path = f"{path}/{map_index}"
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                self.request("PATCH", path, {"new_state": "failed"})
            except ApiError as error:
                # SQLite was locked by another writer for the five seconds that sqlite3 waits; nothing was written.
                if error.status != HTTPStatus.INTERNAL_SERVER_ERROR or time.monotonic() > deadline:
                    raise
            else:
                return

    def clear(self, dag: str, run: str, tasks: list[str]) -> None:
        """Have task instances run again, whatever they are doing."""
        body = {"dry_run": False, "dag_run_id": run, "task_ids": tasks, "only_failed": False}
        self.request("POST", f"/api/v2/dags/{dag}/clearTaskInstances", body)
