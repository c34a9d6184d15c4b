"""Compression in one call: what the dry run announces is what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from effir_ray.backbones.retriever import load_retriever
from effir_ray.compression.compress import compress
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import InputError


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Twelve documents, each with a train query."""
    folder = tmp_path / "corpus"
    (folder / "qrels").mkdir(parents=True)
    ids = range(12)
    documents = [json.dumps({"_id": f"d{i}", "title": "", "text": f"text number {i}"}) for i in ids]
    queries = [json.dumps({"_id": f"q{i}", "text": f"find {i}"}) for i in ids]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    qrels = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in ids)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(qrels) + "\n")
    return str(folder)


def test_a_dry_run_has_the_size_of_the_checkpoint_and_the_checkpoint_that_of_its_plan(
    dataset: str, tmp_path: Path
) -> None:
    schedule = Schedule(drop_mlp=1, drop_attention=(2,), width_reduction=0.25)
    announced = compress("random:llama", schedule, None, dataset=dataset)
    made = compress(
        "random:llama", schedule, tmp_path / "small", dataset=dataset, gate_steps=2, max_length=16
    )
    assert announced.checkpoint is None
    assert (announced.parameters, announced.schedule) == (made.parameters, "1MA[2]-w25")
    assert made.parameters < made.full_parameters
    loaded = load_retriever(str(tmp_path / "small"))
    assert loaded.plan == made.plan
    assert sum(p.numel() for p in loaded.model.parameters()) == made.parameters


def test_the_same_call_makes_the_same_plan(dataset: str) -> None:
    schedule = Schedule(drop_block=2, importance="pooled")
    first, second = (compress("random:llama", schedule, None, dataset=dataset, seed=3) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_too_much_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="drop_last_blocks is 5; the backbone has 4 blocks"):
        compress("random:llama", Schedule(drop_last_blocks=5), tmp_path / "x", dataset="absent")
    with pytest.raises(InputError, match="the backbone has 2 blocks"):
        compress("random:llama", Schedule(drop_last_blocks=3), tmp_path / "x", first_blocks=2)
    assert not (tmp_path / "x").exists()
