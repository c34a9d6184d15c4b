"""Streams of training pairs: every pair once, in an order of (seed, epoch) alone, from any kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effir_ray.data import pair_stream as streaming
from effir_ray.data.pair_stream import PairStream, Survey, is_stream, source_fingerprint
from effir_ray.data.pairs import load_pairs
from effir_ray.errors import InputError
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import Batches
from effir_ray.training.supervision.training_data import training_pairs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 pairs in two JSONL files and a Parquet file of two row groups; JSONL in chunks of about 5 lines."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 300)
    monkeypatch.setattr(streaming, "WINDOW", 8)
    records = [
        {"query_id": f"q{i}", "query": f"query {i} é", "positive": f"p{i}", "negatives": [f"n{i}"]}
        for i in range(60)
    ]
    place = tmp_path / "pairs"
    place.mkdir()
    for name, part in (("a.jsonl", records[:21]), ("b.jsonl", records[21:40])):
        (place / name).write_text("\n".join(json.dumps(record) for record in part) + "\n\n")
    pq.write_table(pa.Table.from_pylist(records[40:]), place / "c.parquet", row_group_size=10)
    return place


def test_chunks_hold_every_line_once(folder: Path) -> None:
    stream = PairStream(str(folder))
    assert [pair.query_id for pair in stream.read()] == [f"q{i}" for i in range(60)]
    assert len(stream) == 60
    assert len(stream.chunks) > 8


@pytest.mark.integration
def test_negatives_and_scores_of_any_file_count(tmp_path: Path) -> None:
    """The first file has neither; both come after more rows than anyone would look at."""
    rows = [{"query": f"plain {i}", "positive": f"p{i}"} for i in range(150)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mined = {"positive": "p", "negatives": ["n1", "n2", "n3"]}
    rows = [{"query": f"mined {i}"} | mined for i in range(20)] + [
        {"query": "scored", "scores": [4, 3, 2, 1]} | mined
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = PairStream(str(tmp_path))
    assert stream.survey == Survey(negatives=3, scored=True)
    config = TrainConfig(dataset=str(tmp_path), batch_size=8)
    batches = Batches(stream, config, lambda texts, kind: [[1] for _ in texts])
    assert (batches.negatives, batches.has_teacher_scores, batches.note) == (3, True, "")


@pytest.mark.integration
def test_rows_of_one_query_are_no_negatives_of_each_other_in_a_batch(tmp_path: Path) -> None:
    rows = [{"query": "Same  question" if i % 2 else "same question", "positive": f"p{i}"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(dataset=str(tmp_path), batch_size=4)
    (batch,) = Batches(PairStream(str(tmp_path)), config, lambda texts, kind: [[1] for _ in texts]).run()
    known = set(batch.document_ids.flatten().tolist())
    assert len(known) == 8  # of four documents, by id and by text
    assert [set(ids.tolist()) for ids in batch.positive_ids] == [known] * 4


@pytest.mark.integration
def test_an_epoch_is_a_reproducible_permutation(folder: Path) -> None:
    stream = PairStream(str(folder))
    order = [pair.query_id for pair in stream.epoch(seed=3, epoch=0)]
    assert sorted(order) == sorted(f"q{i}" for i in range(60))
    assert order == [pair.query_id for pair in PairStream(str(folder)).epoch(seed=3, epoch=0)]
    assert order[13:] == [pair.query_id for pair in stream.epoch(seed=3, epoch=0, skip=13)]
    assert order != [pair.query_id for pair in stream.epoch(seed=3, epoch=1)]


@pytest.mark.integration
def test_a_bad_row_is_named_through_ray(folder: Path) -> None:
    file = folder / "b.jsonl"
    lines = file.read_text().splitlines()
    lines[11] = '{"query": "without a positive"}'
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"b\.jsonl:12: expected at least one document"):
        list(PairStream(str(folder)).epoch(seed=0, epoch=0))


def test_what_is_streamed_and_what_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_stream(str(folder))
    assert is_stream("s3://bucket/pairs.jsonl")
    assert is_stream(str(folder / "c.parquet"))
    assert not is_stream("stdlib")
    file = str(folder / "a.jsonl")
    pairs, _ = training_pairs(file, "train", frozenset())
    assert pairs == load_pairs(file)
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    stream, _ = training_pairs(file, "train", frozenset(), survey=Survey())
    assert isinstance(stream, PairStream)
    assert load_pairs(file) == pairs  # whoever needs them all in memory
    assert [pair.query_id for pair in load_pairs(folder)] == [f"q{i}" for i in range(60)]


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \.jsonl or \.parquet files"):
        PairStream(str(tmp_path))
    with pytest.raises(InputError, match="found split 'dev'"):
        training_pairs(str(tmp_path / "x.parquet"), "dev", frozenset())


@pytest.mark.integration
def test_batches_of_a_stream_resume_and_split_over_ranks(folder: Path) -> None:
    config = TrainConfig(dataset=str(folder), batch_size=8, epochs=2, hard_negatives=7)

    def batches(start: int = 0, **ranks: int) -> list[list[str]]:
        stream = PairStream(str(folder))
        found = Batches(stream, config, lambda texts, kind: [[1] for _ in texts], **ranks)
        return [batch.texts for batch in found.run(start)]

    whole = batches()
    assert len(whole) == 2 * (60 // 8)
    assert len({text for texts in whole[:7] for text in texts}) == 3 * 56  # query, positive and negative
    assert batches(9) == whole[9:]
    assert batches(13, rank=1, world=2)[0][:4] == whole[13][1:8:2]


def test_a_fingerprint_follows_the_data(folder: Path) -> None:
    file = folder / "a.jsonl"
    for source in (str(folder), str(file)):
        before = source_fingerprint(source)
        assert source_fingerprint(source) == before
        file.write_text(file.read_text() + '{"query": "one more", "positive": "p"}\n')
        assert source_fingerprint(source) != before
    with pytest.raises(InputError, match="no such file"):
        source_fingerprint("absent.jsonl")
