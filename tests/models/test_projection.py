"""Shorter embeddings: every way to compute them agrees, and so does what is read from disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel

from effir_ray.compression.dimension import shorten
from effir_ray.compression.surgery import apply_plan
from effir_ray.encoding.encoder import Encoder
from effir_ray.encoding.padded import PaddedForward
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_block_parameters, count_parameters, embedding_size
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_present
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.training.step.text_encoder import TextEncoder

TEXTS = ["the function of the cell", "data", "a list of values which may be used " * 4, "", "Ünïcödé"]
MIXED = Plan(layers=(LayerPlan(mlp=False), LayerPlan(), LayerPlan(attention=False), LayerPlan()))
DENSE = "2_Dense/config.json"


def axes(hidden: int = 64) -> np.ndarray:
    matrix = np.random.default_rng(0).normal(size=(hidden, hidden))
    return np.linalg.qr(matrix)[0].astype(np.float32)


def embed(retriever: Retriever) -> np.ndarray:
    return Encoder(retriever).encode(TEXTS, "document")


@pytest.mark.parametrize("kind", RANDOM_MODELS)
@pytest.mark.parametrize("mixed", [False, True])
def test_all_passes_project_what_was_pooled(kind: str, mixed: bool, tmp_path: Path) -> None:
    retriever = saved_and_loaded(load_retriever(f"random:{kind}"), tmp_path / "full")  # as real models come
    if mixed:
        retriever = apply_plan(retriever, MIXED)
    whole = embed(retriever)
    shorten(retriever, axes(), 16)
    expected = whole @ axes()[:16].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    encoder = Encoder(retriever)
    assert encoder.dimension == retriever.dimension == 16
    np.testing.assert_allclose(embed(retriever), expected, atol=1e-5)
    tokens = retriever.tokenize(TEXTS, "document")
    trained = TextEncoder(saved_and_loaded(retriever, tmp_path / "trained"))
    lengths = torch.tensor([len(ids) for ids in tokens])
    found = [
        PaddedForward(retriever)(tokens),
        trained(torch.tensor([token for ids in tokens for token in ids]), lengths),
    ]
    for each in found:
        np.testing.assert_allclose(each.detach().numpy(), expected, atol=1e-5)

    assert save_checkpoint(retriever, tmp_path / "short").ordinary != mixed
    again = load_retriever(tmp_path / "short")
    assert again.plan == retriever.plan and again.plan.dimension == 16
    np.testing.assert_allclose(embed(again), expected, atol=1e-5)
    config, held = again.model.config, sum(parameter.numel() for parameter in again.model.parameters())
    assert count_parameters(config, again.plan) == held and embedding_size(config, again.plan) == 16
    whole_plan = again.plan.model_copy(update={"dimension": None})
    assert count_parameters(config, whole_plan) == held - 16 * 64
    assert count_block_parameters(config, whole_plan) == count_block_parameters(config, again.plan)
    assert load_present(tmp_path / "short").dimension == 16


def saved_and_loaded(retriever: Retriever, folder: Path) -> Retriever:
    save_checkpoint(retriever, folder)
    return load_retriever(folder)


def test_hidden_states_of_others_are_what_they_were(tmp_path: Path) -> None:
    """AutoModel reads the folder as if there were no projection: it is no tensor of the model's own file."""
    retriever = load_retriever("random:bert")
    save_checkpoint(retriever, tmp_path / "full")
    save_checkpoint(shorten(retriever, axes(), 16), tmp_path / "short")
    names = []
    for folder in (tmp_path / "full", tmp_path / "short"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    model = AutoModel.from_pretrained(tmp_path / "short")
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).last_hidden_state.shape == (1, 3, 64)
    modules = json.loads((tmp_path / "short" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]


def test_what_is_projected_is_projected_further_by_one_matrix(tmp_path: Path) -> None:
    """And cut by layers meanwhile: surgery leaves the projection where it is."""
    retriever = shorten(load_retriever("random:llama"), axes(), 32)
    apply_plan(retriever, MIXED)
    assert retriever.plan.dimension == 32
    halfway = embed(retriever)
    shorten(retriever, axes(32), 8)
    expected = halfway @ axes(32)[:8].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    again = saved_and_loaded(retriever, tmp_path / "m")
    np.testing.assert_allclose(embed(again), expected, atol=1e-5)
    assert again.plan.dimension == 8 and again.model.projection.in_features == 64


def test_an_encoder_sees_that_the_projection_changed() -> None:
    retriever = shorten(load_retriever("random:bert"), axes(), 16)
    encoder = Encoder(retriever)
    before = encoder.encode(TEXTS, "document")
    with torch.no_grad():
        retriever.model.projection.weight.neg_()
    np.testing.assert_allclose(encoder.encode(TEXTS, "document"), -before, atol=1e-6)


def test_weights_in_half_precision_stay_so(tmp_path: Path) -> None:
    retriever = shorten(load_retriever("random:bert", dtype=torch.bfloat16), axes(), 16)
    again = saved_and_loaded(retriever, tmp_path / "m")
    assert again.model.projection.weight.dtype == torch.float32
    again = load_retriever(tmp_path / "m", dtype="auto")
    assert again.model.projection.weight.dtype == again.model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sentence-transformers would have saved of a model with a Dense."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    save_checkpoint(shorten(load_retriever("random:bert"), axes(), 16), folder)
    (folder / "effir.json").unlink()
    return folder


def test_a_dense_of_sentence_transformers_is_read(foreign: Path) -> None:
    found = load_retriever(foreign)
    assert found.dimension == 16 and found.spec.normalize
    expected = embed(shorten(load_retriever("random:bert"), axes(), 16))
    found.spec = load_retriever("random:bert").spec
    np.testing.assert_allclose(embed(found), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": True}, "2_Dense/config.json.*a Dense is read where it is a matrix alone: bias"),
        ({"activation_function": "torch.nn.modules.activation.Tanh"}, "activation_function torch.nn"),
        ({"use_residual": True}, "bias and use_residual false"),
        ({"module_input_name": "token_embeddings"}, "takes and gives sentence_embedding"),
        ({"in_features": 32}, "in_features is 32, the model's hidden states have 64"),
        ({"out_features": 8}, r"expected linear.weight alone, floats of shape \(8, 64\)"),
    ],
)
def test_a_dense_that_is_more_than_a_matrix_is_refused(
    changes: dict[str, Any], said: str, foreign: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(foreign, tmp_path / "model")
    file = folder / DENSE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InputError, match=said):
        load_retriever(folder)


def test_a_dense_without_its_files_or_in_another_place_is_refused(foreign: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(foreign, tmp_path / "model")
    weights = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": torch.zeros(16, 64, dtype=torch.int8)}, weights)
    with pytest.raises(InputError, match=r"linear\.weight alone, floats of shape"):
        load_retriever(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"2_Dense/model.safetensors: no such file"):
        load_retriever(folder)
    (folder / DENSE).unlink()
    with pytest.raises(InputError, match=r"2_Dense/config.json: no such file; modules.json has a Dense"):
        load_retriever(folder)
    modules = json.loads((folder / "modules.json").read_text())
    for changed, said in (
        ([*modules, modules[2]], "Normalize, ...'; a Dense is read between Pooling and Normalize"),
        ([modules[0], modules[1], modules[3], modules[2]], "between Pooling and Normalize"),
        ([*modules[:2], {**modules[2], "path": "../2_Dense"}], r"path '../2_Dense'; expected the name"),
    ):
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            load_retriever(folder)
