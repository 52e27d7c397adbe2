"""The REST API of an Airflow on this machine, as a user sees it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

REQUEST_TIMEOUT = 30.0
"""Seconds; the first request to a part of the API has it imported."""
SET_FAILED_ATTEMPTS = 3
DATABASE_ERROR = "Database error"


class ApiError(Exception):
    """The API answered with an error; the message has the request, the status and the answer."""


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
            raise ApiError(f"{method} {path}: {error.code} {answer}") from None

    def trigger(self, dag: str, conf: dict[str, str]) -> str:
        """Start a run and return its id."""
        body = {"logical_date": None, "conf": conf}
        return str(self.request("POST", f"/api/v2/dags/{dag}/dagRuns", body)["dag_run_id"])

    def task_instances(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """Return the task instances of a run by task id; `state`, `pid` (the runner's) and `try_number` are there."""
        found = self.request("GET", f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances")
        return {instance["task_id"]: instance for instance in found["task_instances"]}

    def set_failed(self, dag: str, run: str, task: str) -> None:
        """Set a task instance to failed."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        for attempt in range(SET_FAILED_ATTEMPTS):
            try:
                self.request("PATCH", path, {"new_state": "failed"})
            except ApiError as error:
                # SQLite has one writer; a request that cannot write for 5 s fails, and a user would try again.
                if DATABASE_ERROR not in str(error) or attempt == SET_FAILED_ATTEMPTS - 1:
                    raise
            else:
                return

    def clear(self, dag: str, run: str, tasks: list[str]) -> None:
        """Have task instances run again, whatever they are doing."""
        body = {"dry_run": False, "dag_run_id": run, "task_ids": tasks, "only_failed": False}
        self.request("POST", f"/api/v2/dags/{dag}/clearTaskInstances", body)
