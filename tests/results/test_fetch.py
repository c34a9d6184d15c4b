"""Results of a job: where they lie, and copies of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from effir_ray.cli import app
from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.fetch import fetch_results
from effir_ray.results.schema import TrialRow
from tests.helpers.job_server import JobServer, job_server

JOB = "effir-ray-tiny-4f2c"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with job_server() as running:
        yield running


@pytest.fixture
def study(tmp_path: Path, server: JobServer) -> Path:
    """A study of one row, as a job of the server left it."""
    folder = tmp_path / "a study"
    row = {"study": "tiny", "trial_id": "a", "trial": "{}", "backbone": "random:llama", "dataset": "stdlib"}
    store.append(folder, [TrialRow(**row, schedule="full", split="dev", ndcg_at_10=0.5, parameters=10)])
    (folder / "study.json").write_text(json.dumps({"space": {"name": "tiny"}}))
    server.jobs[JOB] = f"python -m effir_ray search space.yaml --out '{folder}' --resume"
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_tables_are_copied_again_and_again_and_nothing_else_is(
    server: JobServer, study: Path, tmp_path: Path
) -> None:
    (study / "rows" / ".half-written.tmp").touch()
    (study / "stages").mkdir()
    for _ in range(2):
        fetched = fetch_results(JOB, tmp_path / "copy", address=server.address)
    assert (fetched.place, fetched.seen, fetched.status) == (str(study), True, "RUNNING")
    (file,) = fetched.files
    assert [path for path in (tmp_path / "copy").rglob("*") if path.is_file()] == [file]
    assert store.read(tmp_path / "copy").equals(store.read(study))


def test_scores_of_single_queries_are_tables_too(server: JobServer, study: Path, tmp_path: Path) -> None:
    (study / "query_scores").mkdir()
    (row,) = (study / "rows").glob("*.parquet")
    (study / "query_scores" / "a.parquet").write_bytes(row.read_bytes())
    fetched = fetch_results(JOB, tmp_path / "copy", address=server.address)
    assert {path.parent.name for path in fetched.files} == {"rows", "query_scores"}


def test_without_a_folder_the_place_is_said(server: JobServer, study: Path) -> None:
    said = run("results", JOB, "--address", server.address)
    assert f"{JOB} (RUNNING): {study}" in said.stdout
    assert f"effir-ray pareto {shlex.quote(str(study))}" in said.stdout


@pytest.mark.parametrize("change", ["gone", "another study", "no rows yet"])
def test_what_this_machine_does_not_see_is_said_and_not_copied(
    server: JobServer, study: Path, tmp_path: Path, change: str
) -> None:
    """A folder of that name may be here by chance: /tmp/demo is on every machine."""
    if change == "gone":
        study.rename(tmp_path / "elsewhere")
    elif change == "another study":
        (study / "study.json").write_text(json.dumps({"space": {"name": "other"}}))
    else:
        for file in (study / "rows").glob("*"):
            file.unlink()
    said = run("results", JOB, "--address", server.address)
    assert said.exit_code == 0
    assert f"{study}, which this machine does not see" in said.stdout
    refused = run("results", JOB, "--address", server.address, "--out", tmp_path / "copy")
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert str(study) in line
    assert not (tmp_path / "copy").exists()


def test_a_study_in_an_object_store_is_copied(server: JobServer, study: Path, tmp_path: Path) -> None:
    uri = f"file://{study}".replace(" ", "%20")
    server.jobs[JOB] = f"python -m effir_ray search space.yaml --out {uri}"
    assert len(fetch_results(JOB, tmp_path / "copy", address=server.address).files) == 1


def test_unknown_jobs_and_those_that_are_no_search_are_named(server: JobServer) -> None:
    server.jobs["sleeper"] = "sleep 60"
    with pytest.raises(InputError, match="no job 'nope'"):
        fetch_results("nope", address=server.address)
    with pytest.raises(InputError, match="sleeper is no search with --out: sleep 60"):
        fetch_results("sleeper", address=server.address)
