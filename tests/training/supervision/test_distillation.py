"""The teacher runs once; what is looked up is what it would say of the text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from effir_ray import hardware
from effir_ray.data.pair_stream import PairStream, Survey
from effir_ray.data.pairs import Pair
from effir_ray.encoding import encoder
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.hardware import Hardware
from effir_ray.models.retriever import load_retriever
from effir_ray.stages import StageStore
from effir_ray.training.supervision import resumable
from effir_ray.training.supervision.distillation import teacher_embeddings

PAIRS = [
    Pair(str(i), f"query {i % 3}", (f"document {i}", "shared document"), (f"negative {i}",)) for i in range(6)
]


def test_embeddings_are_the_teachers_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "SHARD", 4)  # 13 documents: several shards
    teacher = teacher_embeddings("random:llama", PAIRS, stages=StageStore(tmp_path))
    student = Encoder(load_retriever("random:llama"))
    documents = ["negative 4", "shared document", "document 0"]
    np.testing.assert_allclose(
        teacher.documents.lookup(documents), student.encode(documents, "document"), atol=1e-5
    )
    np.testing.assert_allclose(
        teacher.queries.lookup(["query 2"]), student.encode(["query 2"], "query"), atol=1e-5
    )
    with pytest.raises(InputError, match="has not encoded this training text: 'unknown'"):
        teacher.documents.lookup(["unknown"])


@pytest.fixture
def stream(tmp_path: Path) -> PairStream:
    """``PAIRS`` and one of a held-out question, in two files."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, pairs in (("a", PAIRS[:2]), ("b", [Pair("x", "held out", ("document x",)), *PAIRS[2:]])):
        rows = ({"query": p.query, "positives": p.positives, "negatives": p.negatives} for p in pairs)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairStream(str(folder), held_out=frozenset({"held out"}), survey=Survey(left_out=1, negatives=1))


def test_a_stream_says_what_its_pairs_say(
    stream: PairStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "SHARD", 4)
    of_list = teacher_embeddings("random:llama", PAIRS, stages=StageStore(tmp_path / "list"))
    of_stream = teacher_embeddings("random:llama", stream, stages=StageStore(tmp_path / "stream"))
    texts = [text for pair in reversed(PAIRS) for text in pair.negatives + pair.positives]
    np.testing.assert_array_equal(of_stream.documents.lookup(texts), of_list.documents.lookup(texts))
    queries = [pair.query for pair in PAIRS]
    np.testing.assert_array_equal(of_stream.queries.lookup(queries), of_list.queries.lookup(queries))
    for table, text in ((of_stream.queries, "held out"), (of_stream.documents, "document x")):
        with pytest.raises(InputError, match=f"not encoded this training text: '{text}'"):
            table.lookup([text])


def test_a_killed_teacher_goes_on_where_it_was_and_a_finished_one_reads_nothing(
    stream: PairStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "SHARD", 4)
    stages, encode, seen = StageStore(tmp_path / "stages"), Encoder.encode, []

    def killed_at_the_second(self: Encoder, texts: list[str], *args: object, **kwargs: object) -> object:
        seen.append(texts)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        teacher_embeddings("random:llama", stream, stages=stages)
    again = teacher_embeddings("random:llama", stream, stages=stages)
    assert seen == [
        ["query 0", "query 1", "query 2"],
        ["document 0", "shared document", "negative 0", "document 1"],
        ["negative 1", "document 2", "negative 2", "document 3"],
        ["negative 1", "document 2", "negative 2", "document 3"],
        ["negative 3", "document 4", "negative 4", "document 5"],
        ["negative 5"],
    ]

    def refuse(*args: object) -> None:
        raise AssertionError("the stream was read again")

    monkeypatch.setattr(PairStream, "read", refuse)
    mapped = teacher_embeddings("random:llama", stream, stages=stages)
    texts = ["negative 5", "shared document"]
    np.testing.assert_array_equal(mapped.documents.lookup(texts), again.documents.lookup(texts))
    with pytest.raises(AssertionError, match="read again"):
        teacher_embeddings("random:llama", PairStream(stream.source), stages=stages)


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory map keeps its file open: 1,024 shards of 4,096 texts were as far as it went."""
    monkeypatch.setattr(resumable, "SHARD", 1)
    pairs = [replace(PAIRS[0], positives=(f"text {number}",)) for number in range(40)]
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    teacher = teacher_embeddings("random:llama", pairs, stages=StageStore(tmp_path))
    texts = [pair.positives[0] for pair in reversed(pairs)]
    found = teacher.documents.lookup(texts)
    assert len(list(Path("/proc/self/fd").iterdir())) < in_use + 30
    expected = Encoder(load_retriever("random:llama")).encode(texts, "document")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_stream_that_shrinks_while_it_is_read_is_said(
    stream: PairStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, load = StageStore(tmp_path / "stages"), resumable.load_encoder

    def shrunk(teacher: str) -> Encoder:
        monkeypatch.setattr(PairStream, "read", lambda self: iter(PAIRS[:1]))
        return load(teacher)

    monkeypatch.setattr(resumable, "load_encoder", shrunk)
    with pytest.raises(InputError, match="changed while the teacher read them"):
        teacher_embeddings("random:llama", stream, stages=stages)


def test_encoders_are_on_the_machines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Hardware(device="cpu", dtype="bfloat16", precision="bfloat16", threads=1, name="test")
    for module in (hardware, encoder, resumable):
        monkeypatch.setattr(module, "detect", lambda: here, raising=False)
    loaded = resumable.load_encoder("random:llama")
    assert loaded.retriever.model.dtype == torch.bfloat16
    assert resumable.encoder_dtype() == "bfloat16"


def test_the_teacher_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = StageStore(tmp_path)
    first = teacher_embeddings("random:llama", PAIRS, stages=stages)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded again")

    monkeypatch.setattr(resumable, "load_encoder", refuse)
    again = teacher_embeddings("random:llama", PAIRS, stages=stages)
    texts = ["document 1", "negative 5"]
    np.testing.assert_array_equal(first.documents.lookup(texts), again.documents.lookup(texts))
    monkeypatch.setattr(resumable, "encoder_dtype", lambda: "bfloat16")
    teacher_embeddings("random:llama", PAIRS, stages=stages, dtype="float32")  # as the driver computed them
    with pytest.raises(AssertionError, match="loaded again"):
        teacher_embeddings("random:llama", PAIRS, stages=stages)
    with pytest.raises(AssertionError, match="loaded again"):
        teacher_embeddings("random:llama", PAIRS, stages=stages, document_max_length=3)
