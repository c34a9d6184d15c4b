"""A model out of a study: the files are the study's, the card says what the rows say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Schedule
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.results import store
from effir_ray.results.export import export
from effir_ray.results.schema import TrialRow

MODEL = "stages/pruned/0123/checkpoint"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The full model and one without an MLP, whose checkpoint is there."""
    folder = tmp_path / "study"
    (folder / MODEL).parent.mkdir(parents=True)
    compress("random:llama", Schedule(drop_mlp=(2,)), folder / MODEL)
    base = {
        "study": "s",
        "trial": json.dumps({"schedule": {"drop_mlp": 1}}),
        "backbone": "random:llama",
        "dataset": "/data/scifact",
        "n_queries": 300,
        "bm25_ndcg_at_10": 0.6617,
        "hardware": "2 x CPU",
    }
    small = {"trial_id": "aa11", "schedule": "1M", "plan": '{"2": {"skip": ["mlp"]}}', "model": MODEL}
    rows = [
        TrialRow(**base, trial_id="ab22", schedule="full", split="dev", ndcg_at_10=0.6451, parameters=100),
        TrialRow(
            **base,
            **small,
            split="dev",
            ndcg_at_10=0.6234,
            ndcg_at_10_low=0.58,
            ndcg_at_10_high=0.66,
            parameters=80,
            parameter_ratio=0.8,
            document_speedup=1.25,
        ),
        TrialRow(**base, **small, split="test", ndcg_at_10=0.6111, parameters=80),
        TrialRow(**base, trial_id="ff33", schedule="2M", split="dev", status="failed", reason="NaN"),
    ]
    store.append(folder, rows)
    return folder


def test_the_model_is_the_study_s_and_its_card_says_what_the_rows_say(study: Path, tmp_path: Path) -> None:
    done = export(study, tmp_path / "out", trial="aa")
    assert (done.trial_id, done.schedule, done.remote_code) == ("aa11", "1M", True)
    texts = ["red car", "a much longer text about trees"]
    encoded = [
        Encoder(load_retriever(str(place))).encode(texts, "document") for place in (done.model, study / MODEL)
    ]
    np.testing.assert_array_equal(*encoded)

    card = ModelCard.load(done.model / "README.md")
    assert [
        (result.dataset_name, result.dataset_split, result.metric_value) for result in card.data.eval_results
    ] == [("scifact", "dev", 0.6234), ("scifact", "test", 0.6111)]
    lines = card.text.splitlines()
    assert "| 2 | kept | dropped |" in lines
    assert "| scifact | dev | 300 | 0.6234 (0.580-0.660) |" in card.text.replace("|  |", "|")
    for said in ("80.0% of the full model", "1.25 times as fast", "trust_remote_code=True", '"drop_mlp": 1'):
        assert said in card.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "study"]


def test_an_ordinary_checkpoint_asks_for_no_code_of_ours(study: Path, tmp_path: Path) -> None:
    shutil.rmtree(study / MODEL)
    compress("random:llama", Schedule(drop_last_blocks=1), study / MODEL)
    done = export(study, tmp_path / "out", pick="parameters<=90")
    assert not done.remote_code and "trust_remote_code" not in (done.model / "README.md").read_text()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "needs one of --trial ID and --pick"),
        ({"trial": "aa", "pick": "knee"}, "needs one of --trial ID and --pick"),
        ({"trial": "zz"}, "no trial 'zz'"),
        ({"trial": "a"}, "fits 2 trials"),
        ({"trial": "ff"}, "failed: there is no model"),
        ({"trial": "ab"}, r"the model of trial ab22 is not there .* effir-ray repeat"),
        ({"pick": "parameters<=1"}, "no row of the front has"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    chosen: dict[str, str], message: str, study: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export(study, tmp_path / "out", **chosen)
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_nothing_is_written_over(study: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="there is something already"):
        export(study, tmp_path / "out", trial="aa")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
