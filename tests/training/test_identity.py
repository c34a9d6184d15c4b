"""Which trainings are the same one: by content, whatever paths are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.identity import training_identity


@pytest.fixture
def inputs(tmp_path: Path, write_folder: Callable[..., Path]) -> dict[str, Any]:
    """Settings that read two data sets, a file of pairs and two models."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "q", "positive": "p"}\n')
    for name in ("teacher", "miner"):
        save_checkpoint(load_retriever("random:llama"), tmp_path / name)
    return {
        "dataset": str(pairs),
        "held_out": str(write_folder(tmp_path / "held_out")),
        "dev": {"every": 1, "dataset": str(write_folder(tmp_path / "dev"))},
        "negatives": str(tmp_path / "miner"),
        "distillation": {"teacher": str(tmp_path / "teacher"), "embedding": 1.0},
    }


def identity(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return training_identity(TrainConfig.model_validate({**settings, **changes}))


@pytest.mark.parametrize("name", ["teacher", "miner"])
def test_another_model_at_the_same_path_is_another_training(
    name: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    before = identity(inputs)
    save_checkpoint(load_retriever("random:llama:1"), tmp_path / name)
    assert identity(inputs) != before
    save_checkpoint(load_retriever("random:llama"), tmp_path / name)
    assert identity(inputs) == before


def test_each_of_several_that_are_held_out_counts_by_its_content(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "a", "positive": "b"}\n')
    first, second = (str(write_folder(tmp_path / name)) for name in ("first", "second"))
    config = TrainConfig(dataset=str(pairs), held_out=(first, second))
    before = training_identity(config)
    assert before["settings"]["held_out"] == ["by content", "by content"]
    assert before["contents"].keys() == {"dataset", "held_out.0", "held_out.1"}
    with (Path(second) / "queries.jsonl").open("a") as queries:
        queries.write('{"_id": "q99", "text": "another question"}\n')
    after = training_identity(config)
    assert [role for role in after["contents"] if after["contents"][role] != before["contents"][role]] == [
        "held_out.1"
    ]


@pytest.mark.parametrize("file", ["pairs.jsonl", "held_out/queries.jsonl", "dev/corpus.jsonl"])
def test_other_data_at_the_same_path_is_another_training(
    file: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    before = identity(inputs)
    content = (tmp_path / file).read_text()
    added = {"query": "q2", "positive": "p2", "_id": "new", "text": "one more"}
    (tmp_path / file).write_text(content + json.dumps(added) + "\n")
    assert identity(inputs) != before


def test_the_same_content_elsewhere_is_the_same_training(inputs: dict[str, Any], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "held_out", moved / "held_out")
    shutil.copytree(tmp_path / "miner", moved / "miner")
    shutil.copy(inputs["dataset"], moved / "pairs.jsonl")
    changes = {
        "dataset": str(moved / "pairs.jsonl"),
        "held_out": str(moved / "held_out"),
        "negatives": str(moved / "miner"),
    }
    assert identity(inputs, **changes) == identity(inputs)
    assert json.loads(json.dumps(identity(inputs))) == identity(inputs)


def test_the_dev_set_is_the_trained_one_where_none_is_named(
    write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = str(write_folder(tmp_path / "data"))
    own, named = ({"every": 1}, {"every": 1, "dataset": data})
    assert identity({"dataset": data, "dev": own}) == identity({"dataset": data, "dev": named})
    assert identity({"dataset": data, "dev": own}) != identity({"dataset": data})


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"storage_path": "s3://bucket/runs", "max_failures": 9}, True),
        ({"checkpoint_every": 3, "keep_checkpoints": 2}, True),
        ({"learning_rate": 1e-3}, False),
        ({"workers": 2}, False),  # sums in another order
        ({"cpus_per_worker": 2}, False),
    ],
)
def test_only_what_reaches_the_weights_counts(
    changes: dict[str, Any], same: bool, inputs: dict[str, Any]
) -> None:
    assert (identity(inputs, **changes) == identity(inputs)) is same


def test_a_studys_own_teacher_is_its_stage_to_tell() -> None:
    distillation = {"teacher": "base", "embedding": 1}
    config = TrainConfig.model_validate({"dataset": "msmarco", "distillation": distillation})
    found = training_identity(config, data=str, model=str)
    assert found["contents"] == {"dataset": "msmarco"}
    assert found["settings"]["distillation"]["teacher"] == "base"


def test_names_stand_for_contents_where_nothing_may_be_read() -> None:
    config = TrainConfig.model_validate(
        {"dataset": "msmarco", "distillation": {"teacher": "absent", "similarity": 1}}
    )
    found = training_identity(config, data=str, model=str)
    assert found["contents"] == {"dataset": "msmarco", "distillation.teacher": "absent"}
