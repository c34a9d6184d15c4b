"""Commands as jobs of a Ray cluster, over its job server (the Ray Jobs API)."""

from __future__ import annotations

import asyncio
import logging
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effir_ray.errors import InputError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_AGENT_TIMEOUT = 120.0  # seconds
_STOP_TIMEOUT = 30.0  # seconds; Ray sends SIGTERM, then SIGKILL after 3 of them
_LEFT_OUT = ["**/__pycache__/**"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """``status``: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. ``seconds``: run so far."""

    id: str
    status: str
    started: datetime | None
    seconds: float | None
    command: str
    message: str = ""


def submit(
    arguments: Sequence[str], *, name: str, files: Mapping[str, str], address: str | None = None
) -> str:
    """Start ``effir-ray ARGUMENTS`` on the cluster; returns the job's id, which begins with ``name``.

    ``files`` (name -> text) lie in the job's folder; the code of this effir_ray travels with it, and the
    cluster's Python needs the packages effir-ray depends on. Raises InputError when no job server answers.
    """
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        return _submit(
            client,
            entrypoint=shlex.join(["python", "-m", "effir_ray", *arguments]),
            submission_id=f"{name}-{uuid.uuid4().hex[:6]}",
            runtime_env={
                "working_dir": folder,
                "py_modules": [str(Path(__file__).parents[1])],
                "excludes": _LEFT_OUT,
            },
        )


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """Submit, waiting for a head that has only just started: its agent comes up after its job server."""
    deadline = time.monotonic() + _AGENT_TIMEOUT
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                reason = next(iter(str(error).splitlines()), "no reason given")
                raise InputError(f"the Ray cluster does not take the job: {reason}") from None
            time.sleep(1)


def list_jobs(*, address: str | None = None) -> list[Job]:
    """The jobs that were submitted to the cluster, newest first."""
    details = [item for item in _client(address).list_jobs() if item.submission_id]
    return [_job(item) for item in sorted(details, key=lambda item: item.start_time or 0, reverse=True)]


def job_logs(job: str, *, address: str | None = None) -> str:
    """All that ``job`` has written so far."""
    logs: str = _known(_client(address), job).get_job_logs(job)
    return logs


def follow_job(job: str, *, write: Callable[[str], object], address: str | None = None) -> str:
    """Pass what ``job`` writes to ``write`` until it ends; returns its final status."""
    client = _known(_client(address), job)

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    asyncio.run(tail())
    return str(client.get_job_status(job).value)


def stop_job(job: str, *, address: str | None = None) -> str:
    """Stop ``job`` if it still runs; returns its status once it has ended."""
    client = _known(_client(address), job)
    client.stop_job(job)
    deadline = time.monotonic() + _STOP_TIMEOUT
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
    return str(status.value)


def _client(address: str | None) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it reports every upload and closed connection
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise InputError(
            f"the Ray cluster at '{address or 'this machine'}' asks for its token; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"no Ray job server answers at '{address or 'this machine'}' ({reason}); start a head with "
            "'ray start --head', or give --address http://HOST:8265"
        ) from None


def _known(client: JobSubmissionClient, job: str) -> JobSubmissionClient:
    """``client``, after checking that it knows ``job``."""
    try:
        client.get_job_status(job)
    except RuntimeError:
        raise InputError(f"no job '{job}' on this cluster; effir-ray jobs lists them") from None
    return client


def _job(details: Any) -> Job:
    """Ray's times are milliseconds since 1970, absent before the start."""
    start, end = details.start_time, details.end_time
    return Job(
        id=details.submission_id,
        status=str(details.status.value),
        started=datetime.fromtimestamp(start / 1000, UTC) if start else None,
        seconds=round((end or time.time() * 1000) / 1000 - start / 1000, 1) if start else None,
        command=details.entrypoint,
        message=details.message or "",
    )
