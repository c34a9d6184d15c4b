"""No training pair asks what a dev query asks, in whatever form the pairs come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from effir_ray.training import streaming
from effir_ray.training.batches import Batches
from effir_ray.training.config import DevConfig, TrainConfig
from effir_ray.training.held_out import count_left_out, dev_dataset, training_pairs
from effir_ray.training.streaming import PairStream


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """20 pairs in a file; a data set whose two dev queries are among them, one of them twice."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(3)])
    write(folder / "queries.jsonl", [{"_id": f"x{i}", "text": f"query {i}"} for i in (4, 7, 99)])
    for split, ids in (("dev", (4, 7)), ("test", (99,))):
        rows = "".join(f"x{i}\td0\t1\n" for i in ids)
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    numbers = [*range(19), 7]
    pairs = [{"query_id": f"q{i}", "query": f"query {n}", "positive": f"p{i}"} for i, n in enumerate(numbers)]
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "a.jsonl", pairs[:8])
    write(tmp_path / "pairs" / "b.jsonl", pairs[8:])
    write(tmp_path / "pairs.jsonl", pairs)
    return TrainConfig(
        dataset=str(tmp_path / "pairs.jsonl"), batch_size=2, dev=DevConfig(every=1, dataset=str(folder))
    )


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_of_a_file(config: TrainConfig) -> None:
    dev = dev_dataset(config)
    pairs, left_out = training_pairs(config.dataset, "train", dev)
    assert isinstance(pairs, list)
    assert left_out == 3
    assert {pair.query for pair in pairs} == {f"query {i}" for i in range(19)} - {"query 4", "query 7"}
    everything, none = training_pairs(config.dataset, "train", None)
    assert (len(everything), none) == (20, 0)
    assert count_left_out(config.dataset, dev) == 0


def test_a_stream_counts_what_it_leaves_out(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dev = config.dataset.removesuffix(".jsonl"), dev_dataset(config)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 200)
    stream, left_out = training_pairs(folder, "train", dev, left_out=3)
    assert isinstance(stream, PairStream)
    assert (len(stream), left_out, len(PairStream(folder))) == (17, 3, 20)
    assert {pair.query for pair in stream.sample}.isdisjoint({"query 4", "query 7"})
    counts = [streaming._count(vars(chunk), frozenset({"query 4", "query 7"})) for chunk in stream.chunks]
    assert sum(count for count in counts if isinstance(count, int)) == 3


@pytest.mark.integration
def test_a_stream_through_ray_gives_whole_batches(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, dev = config.dataset.removesuffix(".jsonl"), dev_dataset(config)
    count = count_left_out(folder, dev)
    assert count == 3
    stream, _ = training_pairs(folder, "train", dev, left_out=count)
    tokenize: Callable[..., list[list[int]]] = lambda texts, kind: [[1] for _ in texts]  # noqa: E731
    batches = list(Batches(stream, config.model_copy(update={"epochs": 2.0}), tokenize).run())
    assert len(batches) == 2 * (17 // 2)
    asked = {text for batch in batches for text in batch.texts[:2]}
    assert asked.isdisjoint({"query 4", "query 7"})
    assert all(batch.n_queries == 2 for batch in batches)
