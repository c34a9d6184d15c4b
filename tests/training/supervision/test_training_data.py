"""No training pair asks what a dev or test query asks, in whatever form the pairs come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effir_ray.data import pair_stream as streaming
from effir_ray.data.pair_stream import PairStream, Survey, take_survey
from effir_ray.training.config import DevConfig, TrainConfig
from effir_ray.training.step.batches import Batches
from effir_ray.training.supervision.training_data import held_out_by, survey_stream, training_pairs


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """20 pairs in a file that ask two dev queries (one of them twice) and a test query of a data set."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(3)])
    write(folder / "queries.jsonl", [{"_id": f"x{i}", "text": f"  Query {i}"} for i in (4, 7, 9, 99)])
    for split, ids in (("dev", (4, 7)), ("test", (9, 99))):
        rows = "".join(f"x{i}\td0\t1\n" for i in ids)
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    numbers = [*range(19), 7]
    pairs = [{"query_id": f"q{i}", "query": f"query {n}", "positive": f"p{i}"} for i, n in enumerate(numbers)]
    pairs[7] |= {"negatives": ["a", "b", "c"], "scores": [1, 2, 3, 4]}  # of a query that is left out
    pairs[13] |= {"negatives": ["a", "b"]}
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "a.jsonl", pairs[:8])
    write(tmp_path / "pairs" / "b.jsonl", pairs[8:])
    write(tmp_path / "pairs.jsonl", pairs)
    return TrainConfig(
        dataset=str(tmp_path / "pairs.jsonl"), batch_size=2, dev=DevConfig(every=1, dataset=str(folder))
    )


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


HELD_OUT = {"query 4", "query 7", "query 9"}


def test_pairs_of_a_file(config: TrainConfig) -> None:
    held_out = held_out_by(config)
    assert held_out == HELD_OUT | {"query 99"}
    pairs, left_out = training_pairs(config.dataset, "train", held_out)
    assert isinstance(pairs, list)
    assert left_out == 4
    assert {pair.query for pair in pairs} == {f"query {i}" for i in range(19)} - HELD_OUT
    everything, none = training_pairs(config.dataset, "train", frozenset())
    assert (len(everything), none) == (20, 0)
    assert survey_stream(config.dataset, held_out) is None


def test_a_data_set_named_as_held_out_is_one_and_only_train_is_trained_on(config: TrainConfig) -> None:
    assert config.dev is not None
    named = TrainConfig(dataset=config.dataset, held_out=config.dev.dataset)
    assert held_out_by(named) == held_out_by(config)
    assert held_out_by(TrainConfig(dataset=config.dataset)) == frozenset()
    with pytest.raises(ValueError, match="split is 'test': dev and test queries are held out"):
        TrainConfig(dataset="stdlib", held_out="stdlib", split="test")


def test_a_stream_knows_what_it_leaves_out(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, held_out = config.dataset.removesuffix(".jsonl"), held_out_by(config)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 200)
    survey = Survey(left_out=4, negatives=2)
    stream, left_out = training_pairs(folder, "train", held_out, survey=survey)
    assert isinstance(stream, PairStream)
    assert (len(stream), left_out, len(PairStream(folder))) == (16, 4, 20)
    assert {pair.query for pair in stream.read()}.isdisjoint(HELD_OUT)
    parts = [streaming._surveyed(vars(chunk), held_out) for chunk in stream.chunks]
    assert len(parts) > 4
    assert sum((part for part in parts if isinstance(part, Survey)), start=Survey()) == survey
    assert take_survey(PairStream(folder).read()) == Survey(negatives=3, scored=True)


@pytest.mark.integration
def test_a_stream_through_ray_gives_whole_batches(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, held_out = config.dataset.removesuffix(".jsonl"), held_out_by(config)
    survey = survey_stream(folder, held_out)
    assert survey == Survey(left_out=4, negatives=2)
    stream, _ = training_pairs(folder, "train", held_out, survey=survey)
    tokenize: Callable[..., list[list[int]]] = lambda texts, kind: [[1] for _ in texts]  # noqa: E731
    batches = list(Batches(stream, config.model_copy(update={"epochs": 2.0}), tokenize).run())
    assert len(batches) == 2 * (16 // 2)
    asked = {text for batch in batches for text in batch.texts[:2]}
    assert asked.isdisjoint(HELD_OUT)
    assert all(batch.document_ids.shape == (2, 3, 2) for batch in batches)
