"""Tables beside the rows: what stays of every layer, importance, learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.query import query, schema
from effir_ray.results.schema import TrialRow

PLAN = {"1": {"skip": ["attention"], "intermediate_size": 4}, "2": {"skip": ["attention", "mlp"]}}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    base = {"study": "s", "trial": "{}", "backbone": "b", "dataset": "d", "schedule": "1B", "ndcg_at_10": 0.5}
    shape = {"blocks": 3, "mlp_width": 8, "plan": json.dumps(PLAN)}
    trained = {"model": "stages/recovered/abc/checkpoint", "recovered": True}
    store.append(
        tmp_path,
        [
            TrialRow(**base, **shape, **trained, trial_id="t", split="dev"),
            TrialRow(**base, **shape, **trained, trial_id="t", split="test"),
            TrialRow(**base, trial_id="old", split="dev"),
        ],
    )
    measured = tmp_path / "stages" / "importance" / "def"
    measured.mkdir(parents=True)
    scores = {"criterion": "pooled", "attention": [0.1, 0.2], "mlp": [0.3, 0.4], "block": [0.5, 0.6]}
    (measured / "importance.json").write_text(json.dumps(scores))
    (measured / "stage.json").write_text(json.dumps({"inputs": {"seed": 7}}))
    training = tmp_path / "stages" / "recovered" / "abc"
    training.mkdir(parents=True)
    done = {"step": 2, "loss": 1.0, "dev_ndcg_at_10": 0.4}
    steps = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 9.0}, done]
    (training / "history.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (training / "stage.json").write_text("{}")
    unfinished = tmp_path / "stages" / "recovered" / "ghi.tmp"
    unfinished.mkdir()
    (unfinished / "history.jsonl").write_text('{"step": 1, "lo')
    return tmp_path


def test_layers_are_one_line_a_block_of_every_trial(study: Path) -> None:
    found = query(study, "SELECT * FROM layers ORDER BY layer").to_pylist()
    assert [(row["attention"], row["mlp_neurons"]) for row in found] == [(True, 8), (False, 4), (False, 0)]
    assert {row["trial_id"] for row in found} == {"t"}


def test_importance_is_joined_by_unit_and_layer(study: Path) -> None:
    found = query(study, "SELECT unit, layer, score FROM importance WHERE criterion = 'pooled' AND seed = 7")
    assert len(found) == 6
    assert {"unit": "mlp", "layer": 1, "score": 0.4} in found.to_pylist()


def test_the_curve_of_a_row_s_model_has_every_step_once(study: Path) -> None:
    joined = "curves JOIN trials USING (model) WHERE split = 'dev' ORDER BY step"
    found = query(study, f"SELECT step, loss, dev_ndcg_at_10 FROM {joined}")
    assert found.to_pylist() == [
        {"step": 1, "loss": 2.0, "dev_ndcg_at_10": None},
        {"step": 2, "loss": 1.0, "dev_ndcg_at_10": 0.4},
    ]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("stages/importance/def/importance.json", "[1, 2]"),
        ("stages/importance/def/importance.json", '{"criterion": "pooled", "attention": 3}'),
        ("stages/importance/def/stage.json", "no json"),
        ("stages/recovered/abc/history.jsonl", '{"loss": 1.0}\n'),
        ("stages/recovered/abc/history.jsonl", "{\n"),
    ],
)
def test_a_damaged_stage_is_named_or_left_out(study: Path, file: str, content: str) -> None:
    (study / file).write_text(content)
    name = "importance" if "importance" in file else "curves"
    with pytest.raises(InputError, match=Path(file).name):
        query(study, f"SELECT * FROM {name}")
    heard: list[str] = []
    assert len(query(study, f"SELECT * FROM {name}", damaged=heard.append)) == 0
    assert len(heard) == 1
    assert len(query(study, "SELECT * FROM trials")) == 3  # read only where it is asked for


def test_values_of_another_type_are_one_line(study: Path) -> None:
    (study / "stages" / "recovered" / "abc" / "history.jsonl").write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(InputError, match="a stage has values of another type"):
        query(study, "SELECT * FROM curves")


def test_every_table_is_described() -> None:
    described = schema()
    assert set(described["table"].to_pylist()) == {
        "trials",
        "query_scores",
        "layers",
        "importance",
        "curves",
        "published",
    }
    assert all(described["description"].to_pylist())
