"""Shorter embeddings: what is kept of dot products, and the whole way to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.dimension import embedding_axes, shorten
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.data.datasets import load_dataset
from effir_ray.data.pairs import Pair
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from tests.helpers.search_examples import write_corpus


def error(vectors: np.ndarray, axes: np.ndarray) -> float:
    """Mean square of what dot products of all pairs change by, not normalised again."""
    projected = vectors @ axes.T
    return float(np.square(vectors @ vectors.T - projected @ projected.T).mean())


def test_no_other_axes_keep_dot_products_better() -> None:
    retriever = load_retriever("random:bert")
    words = [f"{a} {b} of the {c}" for a in "abcde" for b in ("data", "cell", "value") for c in "xyz"]
    examples = [Pair(str(n), text[:6], (text,)) for n, text in enumerate(words)]
    axes = embedding_axes(retriever, examples, max_length=16)
    np.testing.assert_allclose(axes @ axes.T, np.eye(64), atol=1e-5)
    encoder = Encoder(retriever)
    vectors = np.concatenate(
        [encoder.encode(words, "document"), encoder.encode([text[:6] for text in words], "query")]
    )
    sizes = np.square(vectors @ axes.T).sum(axis=0)
    assert (np.diff(sizes) < 1e-4).all(), "the largest first"
    random = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    for size in (4, 16):
        least = error(vectors, axes[:size])
        assert least < error(vectors, np.eye(64)[:size]) and least < error(vectors, random[:size])
        swapped = [*range(size - 1), size]
        assert least < error(vectors, axes[swapped])
    assert embedding_axes(retriever, examples, max_length=16).tobytes() == axes.tobytes()
    with pytest.raises(InputError, match="texts to be fitted on"):
        embedding_axes(retriever, [], max_length=16)


def test_compressing_shortens_embeddings_as_it_drops_sublayers(tmp_path: Path) -> None:
    schedule = Schedule(drop_block=(1,), vocabulary=300, dimension=16)
    assert schedule.name == "B[1]-v300-d16" and "dimension" not in Schedule(drop_mlp=1).model_dump()
    calibration = Calibration(dataset=str(write_corpus(tmp_path / "texts")), max_length=64)
    preview = compress("random:qwen3", schedule, None, calibration=calibration)
    made = compress("random:qwen3", schedule, tmp_path / "small", calibration=calibration)
    longer = Schedule(drop_block=(1,), vocabulary=300)
    whole = compress("random:qwen3", longer, tmp_path / "whole", calibration=calibration)
    assert made.plan is not None and made.plan.dimension == 16
    assert made.parameters == preview.parameters == whole.parameters + 16 * 64
    assert made.flops_per_document == whole.flops_per_document
    small, full = (load_retriever(tmp_path / name) for name in ("small", "whole"))
    assert made.parameters == sum(parameter.numel() for parameter in small.model.parameters())
    texts = ["here is the red car", "find blue sky"]
    # The axes are those of the model before it was cut.
    examples = draw_examples(calibration.dataset, 100, calibration.seed)
    axes = embedding_axes(load_retriever("random:qwen3"), examples, max_length=64)
    expected = Encoder(shorten(full, axes, 16)).encode(texts, "document")
    np.testing.assert_allclose(Encoder(small).encode(texts, "document"), expected, atol=1e-5)

    again = Schedule(dimension=8)
    shorter = compress(str(tmp_path / "small"), again, tmp_path / "again", calibration=calibration)
    assert shorter.parameters == made.parameters - 8 * 64 and shorter.plan and shorter.plan.dimension == 8
    kept = Schedule(drop_last_blocks=1)
    cut = compress(str(tmp_path / "small"), kept, tmp_path / "cut", calibration=calibration)
    assert cut.plan and cut.plan.dimension == 16
    found = load_retriever(tmp_path / "cut")
    assert cut.parameters == sum(parameter.numel() for parameter in found.model.parameters())


def test_a_dimension_that_is_no_shorter_is_refused(tmp_path: Path) -> None:
    for size in (64, 100):
        with pytest.raises(InputError, match=f"dimension is {size}; the backbone's embeddings have 64"):
            compress("random:llama", Schedule(dimension=size), tmp_path / "small")
    calibration = Calibration(dataset=str(write_corpus(tmp_path / "texts")), max_length=64)
    compress("random:llama", Schedule(dimension=16), tmp_path / "small", calibration=calibration)
    with pytest.raises(InputError, match="dimension is 32; the backbone's embeddings have 16"):
        compress(str(tmp_path / "small"), Schedule(dimension=32), None)


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_third_of_minilms_dimensions_says_nearly_what_all_of_them_do(tmp_path: Path) -> None:
    """Real weights and text: fitted on documents that are not those it is measured on."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    full, small = load_retriever("minilm-l6"), load_retriever("minilm-l6")
    examples = draw_examples("stdlib", 600, 0)
    axes = embedding_axes(full, examples, max_length=64)
    save_checkpoint(shorten(small, axes, 128), tmp_path / "small")
    corpus = load_dataset("stdlib").corpus
    fitted = {example.query_id for example in examples}
    others = [name for name in corpus.ids if name not in fitted][::20][:200]
    texts = corpus.texts(others)
    vectors, shorter = (
        Encoder(load_retriever(each)).encode(texts, "document", max_length=64)
        for each in ("minilm-l6", tmp_path / "small")
    )
    assert shorter.shape == (len(texts), 128)
    apart = np.abs(vectors @ vectors.T - shorter @ shorter.T)
    assert apart.mean() < 0.05

    outside = sentence_transformers.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    ours = Encoder(load_retriever(tmp_path / "small")).encode(texts[:40], "document")
    np.testing.assert_allclose(outside.encode_document(texts[:40]), ours, atol=1e-5)
    modules = json.loads((tmp_path / "small" / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules][2] == "Dense"

    sample = load_dataset("stdlib").sample("test", queries=60, documents=400)
    scores = [
        evaluate(each, sample, document_max_length=64).scores.mean["ndcg@10"]
        for each in ("minilm-l6", tmp_path / "small")
    ]
    assert scores[1] > 0.95 * scores[0], scores
