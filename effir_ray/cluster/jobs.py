"""Commands as jobs of a Ray cluster, over its job server (the Ray Jobs API)."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effir_ray.cluster.connection import check_reachable, token_refused
from effir_ray.errors import InputError, LostProcess
from effir_ray.storage import check_no_credentials

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_AGENT_TIMEOUT = 120.0  # seconds
_STOP_TIMEOUT = 30.0  # seconds; Ray sends SIGTERM, then SIGKILL after 3 of them
_LEFT_OUT = ["**/__pycache__/**"]
_PACKAGE = Path(__file__).parents[1]
_LARGEST = 3  # files that are named when too much would be sent

OLDEST_RAY = (2, 60)
"""Of clusters that jobs are sent to: what pyproject.toml asks for."""

_PORTS = {"http": 80, "https": 443}
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray prefers these to the address it is given."""


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
    cluster's Python needs the packages effir-ray depends on. Nothing of this machine's environment travels.
    Raises InputError when no job server answers or its Ray is too old, for credentials in what is sent, and
    for more than a job server takes.
    """
    # A job's command and files can be read by whoever sees the cluster's dashboard.
    for place, text in {"the command": shlex.join(arguments), **files}.items():
        check_no_credentials(text, place)
    client = _client(address)
    _check_version(client)
    check_upload_size(_PACKAGE)
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        return _submit(
            client,
            entrypoint=shlex.join(["python", "-m", "effir_ray", *arguments]),
            submission_id=f"{name}-{uuid.uuid4().hex[:6]}",
            runtime_env={
                "working_dir": folder,
                "py_modules": [str(_PACKAGE)],
                "excludes": _LEFT_OUT,
            },
        )


def check_upload_size(module: Path) -> None:
    """Raise InputError when the package that Ray makes of the folder ``module`` is more than a job server
    takes, naming the largest files.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import create_package

    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        create_package(str(module), package, include_gitignore=True, excludes=_LEFT_OUT)
        size = package.stat().st_size
        if size < DASHBOARD_CLIENT_MAX_SIZE:
            return
        with zipfile.ZipFile(package) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: -entry.file_size)[:_LARGEST]
    largest = ", ".join(f"{entry.filename} ({_mebibytes(entry.file_size)})" for entry in entries)
    raise InputError(
        f"{module}: {_mebibytes(size)} to send, and a Ray job server takes "
        f"{_mebibytes(DASHBOARD_CLIENT_MAX_SIZE)}; move the largest files elsewhere: {largest}"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _check_version(client: JobSubmissionClient) -> None:
    version = str(client._server_ray_version)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_RAY:
        raise InputError(
            f"the cluster runs Ray {version}; effir-ray needs {'.'.join(map(str, OLDEST_RAY))} or newer there"
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


def find_job(job: str, *, address: str | None = None) -> Job:
    """The job of that id; InputError when the cluster knows none."""
    return _job(_known(_client(address), job).get_job_info(job))


def list_jobs(*, address: str | None = None) -> list[Job]:
    """The jobs that were submitted to the cluster, newest first."""
    details = [item for item in _client(address).list_jobs() if item.submission_id]
    return [_job(item) for item in sorted(details, key=lambda item: item.start_time or 0, reverse=True)]


def job_logs(job: str, *, address: str | None = None) -> str:
    """All that ``job`` has written so far."""
    logs: str = _known(_client(address), job).get_job_logs(job)
    return logs


def follow_job(job: str, *, write: Callable[[str], object], address: str | None = None) -> str:
    """Pass what ``job`` writes to ``write`` until it ends; returns its final status.

    Raises LostProcess when the connection breaks, of which the job itself knows nothing.
    """
    import aiohttp

    client = _known(_client(address), job)

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    try:
        asyncio.run(tail())
    except (aiohttp.ClientError, RuntimeError) as error:  # a pipe of ``write`` may break as well: not this
        raise _connection_lost(job, error) from None
    try:
        return str(client.get_job_status(job).value)
    except (OSError, RuntimeError) as error:
        raise _connection_lost(job, error) from None


def _connection_lost(job: str, error: BaseException) -> LostProcess:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return LostProcess(
        f"the connection to the cluster broke ({reason}); job {job} may still run: effir-ray logs {job} "
        "--follow; when its head is gone, submit --resume goes on with the study"
    )


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
    place = address or "this machine"
    try:
        if address is not None:
            _check_address(address)
        with _preferred(address):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise token_refused(place, given="Authentication failed" in str(error)) from None
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"no Ray job server answers at '{place}' ({reason}); start a head with "
            "'ray start --head', or give --address http://HOST:8265"
        ) from None


def _check_address(address: str) -> None:
    """Ray takes HOST:PORT for an address of its own protocol, and waits minutes for an answer to that."""
    scheme, mark, rest = address.partition("://")
    if not mark and address != "auto":
        raise InputError(f"--address {address}: expected the job server's address, http://{address}")
    if scheme in _PORTS:
        host = rest.partition("/")[0]
        check_reachable(host if host.rpartition(":")[2].isdigit() else f"{host}:{_PORTS[scheme]}")


@contextmanager
def _preferred(address: str | None) -> Iterator[None]:
    """Within it an ``address`` that was given is not overridden by the environment."""
    aside = {name: os.environ.pop(name) for name in _ADDRESSES if address and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(aside)


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
