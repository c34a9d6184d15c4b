"""Searches as jobs: of a server that keeps what it is sent, and of a real Ray head that tests start and end.

Commands with a token run in processes of their own, as users run them: Ray reads its token once a process.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from effir_ray.cluster import jobs
from effir_ray.cluster.jobs import check_upload_size, follow_job, list_jobs
from effir_ray.errors import InputError, LostProcess
from effir_ray.results import store
from effir_ray.search.study import submit_search
from tests.helpers.job_server import JobServer, job_server

_ATTEMPTS = 3
_START_SECONDS = 90

SECRETS = {
    name: f"planted-{secrets.token_hex(8)}"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "GOOGLE_API_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
    )
}


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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with job_server() as running:
        yield running


def test_nothing_of_the_environment_travels_with_a_job(
    server: JobServer, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = SECRETS | {"RAY_AUTH_TOKEN": "planted-" + "0" * 32}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    job = submit_search(space, "/shared/tiny", address=server.address)
    sent = server.sent()
    assert b"effir_ray/cluster/jobs.py" in sent
    assert space.read_bytes() in sent
    assert [name for name, value in planted.items() if value.encode() in sent] == []
    assert "env_vars" not in server.submitted[0]["runtime_env"]
    (listed,) = list_jobs(address=server.address)
    assert listed.id == job
    assert listed.command == "python -m effir_ray search space.yaml --out /shared/tiny"


def test_credentials_in_a_uri_are_not_sent(server: JobServer, space: Path) -> None:
    sent = {
        r"^space.yaml holds credentials in a URI \(s3://": "a: s3://key:hid/den@bucket/x",
        r"^space.yaml holds credentials in a URI \(https://": "a: https://hidden@host/x",
        r"^space.yaml holds a token \(hf_\.\.\.\)": "a: 1\n# hf_hiddenhiddenhidden",
        r"^space.yaml holds a token \(AKIA\.\.\.\)": "name: AKIAhiddenhiddenhidd",
    }
    for said, text in sent.items():
        with pytest.raises(InputError, match=said) as refused:
            jobs.submit(["search"], name="x", files={"space.yaml": text}, address=server.address)
        assert "hid" not in str(refused.value)
    with pytest.raises(InputError, match=r"^the command holds credentials"):
        submit_search(space, "/shared/s3://key:secret@bucket", address=server.address)
    assert server.sent() == b""


def test_more_than_a_job_server_takes_is_not_sent_and_the_largest_files_are_named(tmp_path: Path) -> None:
    module = tmp_path / "module"
    (module / "__pycache__").mkdir(parents=True)
    for name, size in {"__pycache__/cached": 60, "weights.bin": 70, "vectors.bin": 40, "code.py": 0}.items():
        with (module / name).open("wb") as file:
            file.truncate(size * 2**20)
    with pytest.raises(InputError) as refused:
        check_upload_size(module)
    said = str(refused.value)
    assert "110.0 MiB to send, and a Ray job server takes 100.0 MiB" in said
    assert said.endswith("weights.bin (70.0 MiB), vectors.bin (40.0 MiB), code.py (0.0 MiB)")
    (module / "weights.bin").unlink()
    check_upload_size(module)


def test_the_code_that_travels_with_a_job_is_small() -> None:
    check_upload_size(jobs._PACKAGE)


def test_a_cluster_with_an_older_ray_is_told_before_anything_is_sent(server: JobServer, space: Path) -> None:
    server.ray_version = "2.40.0"
    with pytest.raises(InputError, match=r"runs Ray 2\.40\.0; effir-ray needs 2\.60 or newer"):
        submit_search(space, "/shared/tiny", address=server.address)
    assert server.sent() == b""
    assert list_jobs(address=server.address) == []


def test_the_oldest_ray_is_that_of_the_installation() -> None:
    needs = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"ray[data,default,train,tune]>={".".join(map(str, jobs.OLDEST_RAY))}"' in needs


def test_the_address_that_is_given_wins_over_the_environment(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.jobs["job-1"] = "python -m effir_ray search space.yaml --out /shared/tiny"
    assert [job.id for job in list_jobs(address=server.address)] == ["job-1"]
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_an_address_without_http_is_not_waited_for() -> None:
    with pytest.raises(
        InputError, match=r"--address 127\.0\.0\.1:8265: expected .* http://127\.0\.0\.1:8265"
    ):
        list_jobs(address="127.0.0.1:8265")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray about aiohttp
def test_following_says_when_the_connection_breaks(server: JobServer) -> None:
    server.jobs["job-1"] = "sleep 60"  # and no log of it: the server refuses to send one
    with pytest.raises(LostProcess, match=r"connection to the cluster broke .*job-1 may still run"):
        follow_job("job-1", write=print, address=server.address)


@pytest.mark.parametrize(("token", "said"), [(None, "none was given"), ("0" * 32, "another was given")])
def test_a_missing_and_a_wrong_token_are_one_line(server: JobServer, token: str | None, said: str) -> None:
    server.token = "1" * 32
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "effir_ray", "jobs", "--address", server.address]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert said in line
    assert "1" * 32 not in line


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
def head() -> Iterator[Head]:
    # Its daemons talk through sockets in its folder, whose paths may have 107 characters.
    folder, token = Path(tempfile.mkdtemp(prefix="r", dir="/tmp")), secrets.token_hex(16)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment |= SECRETS  # which a cluster's nodes have, for data and models
    # Jobs run the first `python` on the head's PATH: this one, with its packages.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        process, address = _start(folder, environment)
        try:
            yield Head(address, token)
        finally:
            _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    """A head, and the address of its job server once that answers.

    Ray gives its daemons 30 seconds and then gives up, and a port that was free may be taken meanwhile: a
    busy machine may need another try.
    """
    log = folder / "head.log"
    for _ in range(_ATTEMPTS):
        dashboard = _free_port()
        command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        # Ports of its own: the defaults may belong to another cluster of this machine.
        command += [f"--port={_free_port()}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
        command += [
            f"--ray-client-server-port={_free_port()}",
            f"--dashboard-agent-listen-port={_free_port()}",
        ]
        command += ["--num-cpus=2", "--object-store-memory=268435456"]
        command += [f"--temp-dir={folder}", "--disable-usage-stats"]
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), timeout=10):
                if "Ray runtime started" in log.read_text():
                    return process, f"http://127.0.0.1:{dashboard}"
            time.sleep(0.5)
        _end(process)
    raise AssertionError(f"the Ray head did not start:\n{log.read_text()}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """Asked politely it would wait half a minute for its daemons."""
    with suppress(psutil.NoSuchProcess):
        for process in (*psutil.Process(head.pid).children(recursive=True), head):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    head.wait()


@pytest.mark.integration
def test_a_search_runs_as_a_job_leaves_its_rows_and_no_secret(
    head: Head, space: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    submitted = head.run("submit", str(space), "--out", str(out), "--follow")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = submitted.stdout.splitlines()[0].removeprefix("Job: ")
    rows = store.read([out]).to_pylist()
    assert {row["schedule"] for row in rows if row["split"] == "dev"} == {"full"}
    (listed,) = [item for item in json.loads(head.run("jobs", "--json").stdout) if item["id"] == job]
    assert listed["status"] == "SUCCEEDED"
    assert "search space.yaml" in listed["command"]
    logs = head.run("logs", job).stdout
    assert "effir-ray pareto" in logs
    fetched = json.loads(head.run("results", job, "--out", str(tmp_path / "copy"), "--json").stdout)
    assert (fetched["status"], fetched["place"]) == ("SUCCEEDED", str(out))
    assert store.read([tmp_path / "copy"]).equals(store.read([out]))
    written = "".join(repr(row) for row in rows) + logs + json.dumps(listed)
    for file in (path for path in out.rglob("*") if path.is_file() and not path.is_symlink()):
        written += file.read_bytes().decode("latin-1")
    planted = SECRETS | {"RAY_AUTH_TOKEN": head.token}
    assert [name for name, value in planted.items() if value in written] == []


@pytest.mark.integration
def test_a_job_can_be_stopped_and_goes_on_with_resume(head: Head, space: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    job = json.loads(head.run("submit", str(space), "--out", out, "--json").stdout)["job"]
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "study.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    stopped = head.run("stop", job, "--json")
    assert json.loads(stopped.stdout) == {"job": job, "status": "STOPPED"}, stopped.stderr
    again = head.run("submit", str(space), "--out", out, "--resume", "--follow")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {row["split"] for row in store.read([tmp_path / "out"]).to_pylist()} == {"dev", "test"}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("token", "said"), [(None, "no job 'nope'"), ("0" * 32, "another was given")], ids=["job", "token"]
)
def test_an_unknown_job_and_a_wrong_token_are_named(head: Head, token: str | None, said: str) -> None:
    refused = head.run("logs", "nope", token=token)
    assert refused.returncode == 2
    assert said in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


def test_nobody_listening_is_said_at_once() -> None:
    with pytest.raises(InputError, match="no Ray job server answers"):
        list_jobs(address=f"http://127.0.0.1:{_free_port()}")


def test_studies_lie_where_the_environment_says(
    server: JobServer, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EFFIR_RAY_OUT", raising=False)
    with pytest.raises(InputError, match=r"submit needs --out FOLDER, .* or EFFIR_RAY_OUT"):
        submit_search(space, address=server.address)
    monkeypatch.setenv("EFFIR_RAY_OUT", "/shared/studies/")
    submit_search(space, address=server.address)
    (listed,) = list_jobs(address=server.address)
    assert listed.command.endswith("--out /shared/studies/tiny")
    monkeypatch.setenv("EFFIR_RAY_OUT", "studies")
    with pytest.raises(InputError, match=r"--out studies/tiny: .* absolute path"):
        submit_search(space, address=server.address)


def test_a_relative_folder_would_end_with_the_job(space: Path) -> None:
    with pytest.raises(InputError, match=r"--out runs/tiny: .* absolute path"):
        submit_search(space, "runs/tiny")
