"""A job server that keeps what it is sent and runs nothing: the protocol of Ray's, on loopback.

For what a real one would not show (every byte on the wire, another version of Ray) or would take half
a minute to start for. ``tests/cluster/test_jobs.py`` has a real one too.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray


@dataclass(kw_only=True)
class JobServer:
    """``jobs``: id -> command; ``packages``: what was uploaded; ``submitted``: bodies of new jobs."""

    address: str = ""
    ray_version: str = ray.__version__
    token: str | None = None
    jobs: dict[str, str] = field(default_factory=dict)
    packages: list[bytes] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)

    def sent(self) -> bytes:
        """All that was received, packages unpacked, without headers."""
        parts = [json.dumps(body).encode() for body in self.submitted]
        for package in self.packages:
            with zipfile.ZipFile(io.BytesIO(package)) as archive:
                parts += [name.encode() + archive.read(name) for name in archive.namelist()]
        return b"\n".join(parts)


@contextmanager
def job_server() -> Iterator[JobServer]:
    state = JobServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, value: Any) -> None:
            body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def refused(self) -> bool:
            given = self.headers.get("Authorization")
            if state.token is None or given == f"Bearer {state.token}":
                return False
            if given is None:
                self.answer(401, "Unauthorized: Missing authentication token")
            else:
                self.answer(403, "Forbidden: Invalid authentication token")
            return True

        def do_GET(self) -> None:
            if self.refused():
                return
            name = self.path.rstrip("/").rpartition("/")[2]
            if self.path == "/api/version":
                self.answer(200, {"version": "4", "ray_version": state.ray_version, "ray_commit": ""})
            elif self.path == "/api/jobs/":
                self.answer(200, [self.details(job) for job in state.jobs])
            elif self.path.startswith("/api/jobs/") and name in state.jobs:
                self.answer(200, self.details(name))
            else:
                self.answer(404, "not found")

        def details(self, job: str) -> dict[str, Any]:
            return {
                "type": "SUBMISSION",
                "submission_id": job,
                "status": "RUNNING",
                "entrypoint": state.jobs[job],
                "start_time": 1_700_000_000_000,
            }

        def do_PUT(self) -> None:
            state.packages.append(self.body())
            self.answer(200, {})

        def do_POST(self) -> None:
            job = json.loads(self.body())
            state.submitted.append(job)
            state.jobs[job["submission_id"]] = job["entrypoint"]
            self.answer(200, {"job_id": job["submission_id"], "submission_id": job["submission_id"]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
