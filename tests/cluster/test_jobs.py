"""Searches as jobs of a real Ray head, which these tests start and end.

The commands run in processes of their own, as users run them: Ray reads its token once a process.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from effir_ray.cluster.jobs import list_jobs
from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.search.study import submit_search

_ATTEMPTS = 3


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _corpus(folder: Path) -> Path:
    """Eight documents, each found by one dev query and one test query."""
    words = ["red", "green", "blue", "dark", "pale", "warm", "cold", "grey"]
    (folder / "qrels").mkdir(parents=True)
    documents = [f'{{"_id": "d{i}", "title": "", "text": "a {word} car"}}' for i, word in enumerate(words)]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    queries = [
        f'{{"_id": "{split}{i}", "text": "find {word}"}}'
        for split in ("dev", "test")
        for i, word in enumerate(words)
    ]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    for split in ("dev", "test"):
        lines = [f"{split}{i}\td{i}\t1" for i in range(len(words))]
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


@pytest.fixture
def space(tmp_path: Path) -> Path:
    file = tmp_path / "space.yaml"
    file.write_text(
        f"name: tiny\nbackbone: random:llama\ndataset: {_corpus(tmp_path / 'corpus')}\n"
        "query_max_length: 16\ndocument_max_length: 32\nthreads: 1\n"
        "timing: {queries: 4, documents: 4, rounds: 1}\n"
    )
    return file


@dataclass(frozen=True)
class Head:
    """Job server of a Ray head on loopback, behind a token of its own."""

    address: str
    token: str

    def run(self, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "effir_ray", *arguments, "--address", self.address]
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or self.token}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = Path(tmp_path_factory.mktemp("r"))
    port, dashboard, token = _free_port(), _free_port(), secrets.token_hex(16)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment.pop("RAY_ADDRESS", None)
    # Jobs run the first `python` on the head's PATH: this one, with its packages.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", "--num-cpus=2", "--object-store-memory=268435456"]
    # Ports of its own: the defaults may belong to another cluster of this machine.
    command += [f"--ray-client-server-port={_free_port()}", f"--dashboard-agent-listen-port={_free_port()}"]
    command += [f"--temp-dir={folder}", "--disable-usage-stats"]
    process = _start(command, environment, folder / "head.log")
    try:
        yield Head(f"http://127.0.0.1:{dashboard}", token)
    finally:
        daemons = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # asked politely it would wait half a minute for its daemons
        for daemon in daemons:
            with suppress(psutil.NoSuchProcess):
                daemon.kill()
        process.wait()


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Ray gives its daemons 30 seconds and then gives up; a busy machine may need another try."""
    for _ in range(_ATTEMPTS):
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        while process.poll() is None:
            if "Ray runtime started" in log.read_text():
                return process
            time.sleep(0.5)
    raise AssertionError(f"the Ray head did not start:\n{log.read_text()}")


@pytest.mark.integration
def test_a_search_runs_as_a_job_and_leaves_its_rows(head: Head, space: Path, tmp_path: Path) -> None:
    submitted = head.run("submit", str(space), "--out", str(tmp_path / "out"), "--follow")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = submitted.stdout.splitlines()[0].removeprefix("Job: ")
    rows = store.read([tmp_path / "out"]).to_pylist()
    assert {row["schedule"] for row in rows if row["split"] == "dev"} == {"full"}
    (listed,) = [item for item in json.loads(head.run("jobs", "--json").stdout) if item["id"] == job]
    assert listed["status"] == "SUCCEEDED"
    assert "search space.yaml" in listed["command"]
    assert "effir-ray pareto" in head.run("logs", job).stdout


@pytest.mark.integration
def test_a_job_can_be_stopped(head: Head, space: Path, tmp_path: Path) -> None:
    job = json.loads(head.run("submit", str(space), "--out", str(tmp_path / "out"), "--json").stdout)["job"]
    stopped = head.run("stop", job, "--json")
    assert json.loads(stopped.stdout) == {"job": job, "status": "STOPPED"}, stopped.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    ("token", "said"), [(None, "no job 'nope'"), ("0" * 32, "asks for its token")], ids=["job", "token"]
)
def test_an_unknown_job_and_a_wrong_token_are_named(head: Head, token: str | None, said: str) -> None:
    refused = head.run("logs", "nope", token=token)
    assert refused.returncode == 2
    assert said in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


def test_nobody_listening_is_said_at_once() -> None:
    with pytest.raises(InputError, match="no Ray job server answers"):
        list_jobs(address=f"http://127.0.0.1:{_free_port()}")


def test_a_relative_folder_would_end_with_the_job(space: Path) -> None:
    with pytest.raises(InputError, match=r"--out runs/tiny: .* absolute path"):
        submit_search(space, "runs/tiny")
