"""Teacher scores: a tiny random cross-encoder gives what a plain forward gives, once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from effir_ray.data.pairs import load_pairs
from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.stages import StageStore
from effir_ray.training.supervision.annotate import annotate


def cross_encoder(folder: Path, labels: int) -> Path:
    """A BERT sequence classifier with random weights and the tokenizer of the random BERT backbone."""
    from transformers import BertConfig, BertForSequenceClassification

    backbone = load_retriever("random:bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(backbone.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=labels,
        pad_token_id=backbone.tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    records: list[dict[str, Any]] = [
        {
            "query": f"who built bridge {i}",
            "positive": f"bridge {i} was built by a mason " * (1 + i % 3),
            "negatives": [f"a road to town {n}" for n in range(i % 3 + 1)],
        }
        for i in range(7)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("labels", [1, 2])
def test_scores_are_those_of_a_plain_forward(labels: int, pairs_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = cross_encoder(tmp_path / "reranker", labels)
    out = annotate(pairs_file, by=str(folder), stages=StageStore(tmp_path / "stages"), token_budget=64)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for pair in load_pairs(out):
        expected = []
        for text in pair.positives + pair.negatives:
            with torch.inference_mode():
                logits = model(**tokenizer(pair.query, text, return_tensors="pt")).logits[0]
            expected.append(float(logits[0] if labels == 1 else logits[1] - logits[0]))
        assert pair.teacher_scores == pytest.approx(expected, abs=1e-5)
    scores = [score for pair in load_pairs(out) for score in pair.teacher_scores or ()]
    assert max(scores) - min(scores) > 1e-3  # the model tells texts apart


def test_a_second_run_does_nothing_and_another_model_does(pairs_file: Path, tmp_path: Path) -> None:
    stages = StageStore(tmp_path / "stages")
    one, two = (str(cross_encoder(tmp_path / f"reranker{n}", n)) for n in (1, 2))
    first = annotate(pairs_file, by=one, stages=stages)
    builds = (stages.root / "runs.log").read_text()
    assert annotate(pairs_file, by=one, stages=stages) == first
    assert (stages.root / "runs.log").read_text() == builds
    assert annotate(pairs_file, by=two, stages=stages) != first


def test_parquet_pairs_are_scored_as_their_lines_are(pairs_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in pairs_file.open()]), other)
    by, stages = str(cross_encoder(tmp_path / "reranker", 1)), StageStore(tmp_path / "stages")
    expected, found = (load_pairs(annotate(file, by=by, stages=stages)) for file in (pairs_file, other))
    assert found == expected


def test_what_cannot_be_scored_is_named(pairs_file: Path, tmp_path: Path) -> None:
    stages = StageStore(tmp_path / "stages")
    with pytest.raises(InputError, match="3 labels"):
        annotate(pairs_file, by=str(cross_encoder(tmp_path / "three", 3)), stages=stages)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"query": "q", "positive": "p"}\n')
    with pytest.raises(InputError, match="effir-ray mine"):
        annotate(plain, by="unused", stages=stages)


def test_a_model_without_a_classifier_is_refused(pairs_file: Path, tmp_path: Path) -> None:
    backbone = load_retriever("random:bert")
    backbone.model.save_pretrained(tmp_path / "headless")
    backbone.tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match=r"no weights for .*classifier"):
        annotate(pairs_file, by=str(tmp_path / "headless"), stages=StageStore(tmp_path / "stages"))


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_that_lies_beside_a_model_is_not_run(part: str, pairs_file: Path, tmp_path: Path) -> None:
    folder, ran = cross_encoder(tmp_path / "reranker", 1), tmp_path / "ran"
    (folder / "planted.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Planted:\n    pass\n")
    file = folder / ("config.json" if part == "config" else "tokenizer_config.json")
    kinds = ("AutoConfig", "AutoModelForSequenceClassification") if part == "config" else ("AutoTokenizer",)
    code = {kind: ["planted.Planted"] * 2 if part == "tokenizer" else "planted.Planted" for kind in kinds}
    other = {"model_type": "planted"} if part == "config" else {"tokenizer_class": "Planted"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code, **other}))
    with contextlib.suppress(InputError):  # a configuration without its code is none; a tokenizer may be
        annotate(pairs_file, by=str(folder), stages=StageStore(tmp_path / "stages"))
    assert not ran.exists()
