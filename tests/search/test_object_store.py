"""Whole studies whose folder is a bucket: the same rows, from any machine, also where uploads fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray
import yaml

from effir_ray import storage
from effir_ray.cluster.connection import connect
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Schedule
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.models.loading import load_model
from effir_ray.results import store
from effir_ray.results.export import export
from effir_ray.results.query import query
from effir_ray.results.report import report
from effir_ray.results.selection import pareto
from effir_ray.search.study import clean, search
from tests.helpers.kernels import with_kernels
from tests.helpers.search_examples import small_space, write_corpus
from tests.helpers.two_nodes import several_nodes, unavailable

TRAINING = {
    "steps": 2,
    "batch_size": 8,
    "lora": None,
    "query_max_length": 16,
    "document_max_length": 32,
}
SPACE: dict[str, Any] = {
    "dev": {},
    "test": {},
    "recovery": TRAINING,
    "schedules": [{"drop_mlp": 1, "width_reduction": 0.5, "recover": True}],
    "objectives": ["ndcg_at_10", "parameters"],
    "threads": 1,
}

WHY_NOT = unavailable()
HEAD = "10.231.77.1"
_COLUMNS = "trial_id, split, status, ndcg_at_10, parameters, recovered"
_MAKE_BUCKET = """
import time
from pyarrow import fs
for attempt in range(60):
    try:
        system, bucket = fs.FileSystem.from_uri("s3://bucket?region=us-east-1&allow_bucket_creation=true")
        system.create_dir(bucket)
        break
    except OSError:
        time.sleep(0.5)
else:
    raise SystemExit("no store")
"""


def scores(place: Path | str) -> dict[tuple[str, str], tuple[Any, ...]]:
    """(trial, split) -> what does not depend on the machine's mood; every trial once."""
    rows = store.read(place).to_pylist()
    found = {
        (row["trial_id"], row["split"]): (row["status"], row["ndcg_at_10"], row["parameters"], row["model"])
        for row in rows
    }
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study in a folder of this machine."""
    folder = tmp_path_factory.mktemp("disk")
    search(small_space(**SPACE, dataset=str(write_corpus(folder / "words"))), folder / "study")
    return folder


@pytest.fixture
def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Called, it leaves the process without anything that it has kept of a study so far."""
    monkeypatch.setattr("effir_ray.results.tables._copies", {})

    def forget(name: str) -> None:
        monkeypatch.setenv("EFFIR_RAY_CACHE", str(with_kernels(tmp_path / name)))

    return forget


@pytest.mark.integration
def test_a_study_in_a_bucket(on_disk: Path, tmp_path: Path, object_store: str, another_machine: Any) -> None:
    place, here = object_store.format("runs/study"), on_disk / "study"
    another_machine("first")
    connect(num_cpus=2)
    space = small_space(**SPACE, dataset=str(on_disk / "words"))
    result = search(space, place)
    assert [row["reason"] for row in store.read(place).to_pylist() if row["reason"]] == []
    assert (result.trials, result.failed, result.out) == (2, 0, place)
    wanted = scores(here)
    assert scores(place) == wanted
    another_machine("second")
    front, same = (pareto(each, objectives=space.objectives) for each in (place, here))
    assert front["trial_id"].equals(same["trial_id"])
    assert report(place, tmp_path / "page.html").stat().st_size > 10**6
    curves = "SELECT step, loss FROM curves ORDER BY model, step"
    assert query(place, curves).equals(query(here, curves))
    trained = next(row for row in store.read(place).to_pylist() if row["recovered"])
    exported = export(place, tmp_path / "model", trial=trained["trial_id"])
    assert load_model(exported.model, dtype="float32").config.num_hidden_layers == 4
    again = search(space, place, resume=True)
    assert (again.trials, again.front) == (result.trials, result.front)
    assert scores(place) == wanted, "nothing was done again"
    freed = clean(place, keep="none")
    assert freed.freed_bytes > 0 and freed.kept_bytes == 0
    with pytest.raises(InputError, match="is not there"):
        export(place, tmp_path / "none", trial=trained["trial_id"])
    with pytest.raises(InputError, match="holds this study already; add --resume"):
        search(space, place)


@pytest.fixture
def unreliable_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As ``object_store``, but every seventh answer or so is that the server is busy."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from pyarrow import fs
    from werkzeug.serving import make_server

    whole, dice, failing = DomainDispatcherApplication(create_backend_app), Random(0), threading.Event()

    def busy(environment: Any, start: Any) -> Any:
        if failing.is_set() and dice.random() < 0.15:
            environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "text/plain")])
            return [b"busy"]
        return whole(environment, start)

    server = make_server("127.0.0.1", 0, busy, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    ray.shutdown()  # workers of one that runs already would not see them
    system, bucket = fs.FileSystem.from_uri("s3://bucket?region=us-east-1&allow_bucket_creation=true")
    system.create_dir(bucket)
    failing.set()
    yield "s3://bucket/{}?region=us-east-1"
    server.shutdown()
    thread.join()


@pytest.mark.integration
def test_a_study_whose_uploads_fail_at_random(
    on_disk: Path, unreliable_store: str, another_machine: Any
) -> None:
    another_machine("cache")
    connect(num_cpus=2)
    space = small_space(**SPACE, concurrency=2, dataset=str(on_disk / "words"))
    result = search(space, unreliable_store.format("study"))
    assert (result.trials, result.failed) == (2, 0)
    assert scores(unreliable_store.format("study")) == scores(on_disk / "study")


def test_data_sets_and_models_at_uris(tmp_path: Path, object_store: str, another_machine: Any) -> None:
    another_machine("cache")
    data, model = object_store.format("words"), object_store.format("model")
    storage.send(write_corpus(tmp_path / "words"), data)
    compress("random:bert", Schedule(drop_mlp=(0,)), tmp_path / "model")
    storage.send(tmp_path / "model", model)
    here = evaluate(str(tmp_path / "model"), str(tmp_path / "words"))
    there = evaluate(model, data)
    assert there.scores.per_query == here.scores.per_query
    assert load_dataset(data).fingerprint == load_dataset(tmp_path / "words").fingerprint
    with pytest.raises(InputError, match="no such folder, or nothing in it"):
        load_dataset(object_store.format("absent"))


@pytest.mark.integration
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_machines_that_share_nothing_but_a_bucket(on_disk: Path, tmp_path: Path) -> None:
    """Trials run on one node, what computes on a GPU (of Ray's) and the training on another; the head, on
    which the search was started, does no work."""
    space, store_of_nodes = tmp_path / "space.yaml", f"http://{HEAD}:5000"
    asked = small_space(**SPACE, dataset=str(on_disk / "words"))
    space.write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": store_of_nodes}
    place = "s3://bucket/study?region=us-east-1"
    with several_nodes(tmp_path, "--num-cpus=0", environment=keys) as cluster:
        head = cluster.head
        head.start(
            "python", "-c", f"from moto.server import main; main(['-H', '{HEAD}'])", log=tmp_path / "store"
        )
        made = head.run("python", "-c", _MAKE_BUCKET)
        assert made.returncode == 0, made.stderr
        cluster.add("driving", "--num-cpus=1", environment=keys)
        cluster.add("computing", "--num-cpus=1", "--num-gpus=1", environment=keys)
        command = ["effir-ray", "search", str(space), "--out", place, "--address", cluster.address]
        done = head.run(*command, seconds=800)
        assert done.returncode == 0, done.stderr
        rows = head.run("effir-ray", "query", place, f"SELECT {_COLUMNS} FROM trials", "--format", "json")
        assert rows.returncode == 0, rows.stderr
        found = json.loads(rows.stdout)
    wanted = query(on_disk / "study", f"SELECT {_COLUMNS} FROM trials").to_pylist()
    assert sorted(map(str, found)) == sorted(map(str, wanted))
