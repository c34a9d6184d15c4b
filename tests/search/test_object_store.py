"""Whole studies whose folder is a bucket: the same rows, from any machine, also where uploads fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effir_ray.cluster.connection import connect
from effir_ray.errors import InputError
from effir_ray.models.loading import load_model
from effir_ray.results import store
from effir_ray.results.export import export
from effir_ray.results.query import query
from effir_ray.results.report import report
from effir_ray.results.selection import pareto
from effir_ray.search.study import clean, search
from tests.helpers.search_examples import small_space

TRAINING = {
    "steps": 2,
    "batch_size": 8,
    "lora": None,
    "query_max_length": 16,
    "document_max_length": 32,
}
SPACE: dict[str, Any] = {
    "recovery": TRAINING,
    "schedules": [{"drop_mlp": 1, "width_reduction": 0.5, "recover": True}, {"drop_attention": 1}],
    "objectives": ["ndcg_at_10", "parameters"],
    "threads": 1,
}


def scores(place: Path | str) -> dict[tuple[str, str], tuple[Any, ...]]:
    """(trial, split) -> what does not depend on the machine's mood; every trial once."""
    rows = store.read(place).to_pylist()
    found = {
        (row["trial_id"], row["split"]): (row["status"], row["ndcg_at_10"], row["parameters"], row["model"])
        for row in rows
    }
    assert len(found) == len(rows)
    return found


@pytest.fixture
def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Called, it leaves the process without anything that it has kept of a study so far."""
    monkeypatch.setattr("effir_ray.results.tables._copies", {})

    def forget(name: str) -> None:
        monkeypatch.setenv("EFFIR_RAY_CACHE", str(tmp_path / name))

    return forget


@pytest.mark.integration
def test_a_study_in_a_bucket(tmp_path: Path, object_store: str, another_machine: Any) -> None:
    place = object_store.format("runs/study")
    another_machine("first")
    connect(num_cpus=2)
    space = small_space(**SPACE)
    here = search(space, tmp_path / "study")
    result = search(space, place)
    assert (result.trials, result.failed, result.out) == (3, 0, place)
    assert result.front == here.front
    wanted = scores(tmp_path / "study")
    assert scores(place) == wanted
    another_machine("second")
    assert pareto(place)["trial_id"].to_pylist() == pareto(tmp_path / "study")["trial_id"].to_pylist()
    assert report(place, tmp_path / "page.html").stat().st_size > 10**6
    curves = "SELECT step, loss FROM curves ORDER BY model, step"
    assert query(place, curves).equals(query(tmp_path / "study", curves))
    trained = next(row for row in store.read(place).to_pylist() if row["recovered"])
    exported = export(place, tmp_path / "model", trial=trained["trial_id"])
    assert load_model(exported.model, dtype="float32").config.num_hidden_layers == 4
    again = search(space, place, resume=True)
    assert (again.trials, again.front) == (result.trials, result.front)
    assert scores(place) == wanted, "nothing was done again"
    more = search(space.model_copy(update={"parameters": {}, "keep": "all"}), place, resume=True)
    assert more.front == result.front
    freed = clean(place, keep="none")
    assert freed.freed_bytes > 0 and freed.kept_bytes == 0
    with pytest.raises(InputError, match="is not there"):
        export(place, tmp_path / "none", trial=trained["trial_id"])
    with pytest.raises(InputError, match="holds this study already; add --resume"):
        search(space, place)
