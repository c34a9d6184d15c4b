"""The teacher runs once; what is looked up is what it would say of the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from effir_ray import hardware
from effir_ray.backbones.retriever import load_retriever
from effir_ray.errors import InputError
from effir_ray.hardware import Hardware
from effir_ray.retrieval.encoder import Encoder
from effir_ray.stages import StageStore
from effir_ray.training import embedding_stage
from effir_ray.training.distillation import teacher_embeddings
from effir_ray.training.pairs import Pair

PAIRS = [
    Pair(str(i), f"query {i % 3}", (f"document {i}", "shared document"), (f"negative {i}",)) for i in range(6)
]


def test_embeddings_are_the_teachers_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_stage, "SHARD", 4)  # 13 documents: several shards
    teacher = teacher_embeddings("random:llama", PAIRS, stages=StageStore(tmp_path))
    encoder = Encoder(load_retriever("random:llama"))
    documents = ["negative 4", "shared document", "document 0"]
    np.testing.assert_allclose(
        teacher.documents.lookup(documents), encoder.encode(documents, "document"), atol=1e-5
    )
    np.testing.assert_allclose(
        teacher.queries.lookup(["query 2"]), encoder.encode(["query 2"], "query"), atol=1e-5
    )
    with pytest.raises(InputError, match="has not encoded this training text: 'unknown'"):
        teacher.documents.lookup(["unknown"])


def test_encoders_are_on_the_machines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Hardware(device="cpu", dtype="bfloat16", threads=1, name="test")
    monkeypatch.setattr(hardware, "detect", lambda: here)
    encoder = embedding_stage.load_encoder("random:llama")
    assert encoder.retriever.model.dtype == torch.bfloat16
    assert embedding_stage.encoder_dtype() == "bfloat16"


def test_the_teacher_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = StageStore(tmp_path)
    first = teacher_embeddings("random:llama", PAIRS, stages=stages)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded again")

    monkeypatch.setattr(embedding_stage, "load_encoder", refuse)
    again = teacher_embeddings("random:llama", PAIRS, stages=stages)
    texts = ["document 1", "negative 5"]
    np.testing.assert_array_equal(first.documents.lookup(texts), again.documents.lookup(texts))
    monkeypatch.setattr(embedding_stage, "encoder_dtype", lambda: "bfloat16")
    teacher_embeddings("random:llama", PAIRS, stages=stages, dtype="float32")  # as the driver computed them
    with pytest.raises(AssertionError, match="loaded again"):
        teacher_embeddings("random:llama", PAIRS, stages=stages)
    with pytest.raises(AssertionError, match="loaded again"):
        teacher_embeddings("random:llama", PAIRS, stages=stages, document_max_length=3)
