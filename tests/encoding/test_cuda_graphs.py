"""What a recorded pass relies on, tested on any device; recording itself needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effir_ray.encoding import packed
from effir_ray.encoding.cpu_kernels import Build
from effir_ray.encoding.cuda_graphs import LENGTH_CLASSES, FilledText, SingleTextGraphs, length_class
from effir_ray.encoding.encoder import Encoder
from effir_ray.encoding.packed import packed_forward
from effir_ray.encoding.varlen_attention import Packing, mean_pool
from effir_ray.models.retriever import load_retriever

QUERIES = ["why", "what is a dense retriever", "what is a dense retriever " * 9]


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_a_filled_text_has_the_embedding_of_the_text_alone(
    family: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "build", lambda: Build(None, "the pass of GPUs"))
    retriever = load_retriever(f"random:{family}")
    retriever.spec = retriever.spec.model_copy(update={"pooling": pooling})
    forward = packed_forward(retriever, "float32")
    assert forward is not None
    filled = FilledText(256, torch.device("cpu"))
    for text in retriever.tokenize(QUERIES, "query"):
        filled.write(text)
        ids, packing = filled.read()
        assert packing.bounds.tolist() == [0, len(text), 256]
        lengths = (len(text), 256 - len(text))  # a GPU takes them from memory
        packing = Packing(lengths, packing.lengths_n, packing.bounds, packing.positions_t)
        with torch.inference_mode():
            torch.testing.assert_close(forward._embed(ids, packing)[:1], forward([text]), atol=1e-5, rtol=0)


def test_a_class_leaves_room_for_the_filling() -> None:
    assert [length_class(length) for length in (1, 15, 16, 255, 256)] == [16, 16, 32, 256, None]
    assert list(LENGTH_CLASSES) == sorted(LENGTH_CLASSES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="recording works there")
def test_without_recordings_the_pass_itself_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SingleTextGraphs, "_usable", True)
    monkeypatch.setattr(packed, "build", lambda: Build(None, "the pass of GPUs"))
    forward = packed_forward(load_retriever("random:bert"), "float32")
    assert forward is not None
    graphs = SingleTextGraphs(torch.device("cpu"))
    with torch.inference_mode():
        expected = forward([[3, 5, 7]])
        with pytest.warns(RuntimeWarning, match="no CUDA graphs for single texts"):
            torch.testing.assert_close(graphs([3, 5, 7], forward._embed), expected)
        torch.testing.assert_close(graphs([3, 5, 7], forward._embed), expected)  # and not tried again


def test_a_mean_in_half_precision_does_not_stand_still() -> None:
    packing = Packing.of([512, 3], torch.device("cpu"))
    hidden = torch.ones(515, 4, dtype=torch.bfloat16)
    assert (mean_pool(hidden, packing) == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_replayed_queries_are_near_the_ordinary_pass(
    family: str, pooling: str, recwarn: pytest.WarningsRecorder
) -> None:
    retriever = load_retriever(f"random:{family}", dtype="bfloat16", device="cuda")
    retriever.spec = retriever.spec.model_copy(update={"pooling": pooling})
    encoder = Encoder(retriever)
    together = encoder.encode(QUERIES, "query")
    for _ in range(2):  # recorded, then replayed
        alone = np.concatenate([encoder.encode([query], "query") for query in QUERIES])
        assert (alone * together).sum(axis=1).min() > 0.999
    assert not [warning for warning in recwarn if "CUDA graphs" in str(warning.message)]
    assert encoder._forward._alone._recorded  # type: ignore[union-attr]
