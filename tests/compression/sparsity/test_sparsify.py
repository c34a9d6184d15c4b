"""Whole retrievers made sparse or quantised."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from effir_ray.compression.calibration import pair_batch, pair_loss
from effir_ray.compression.quantization import measure_size, quantize
from effir_ray.compression.sparsity.methods import (
    Hessian,
    InputNorms,
    SemiStructured,
    Unstructured,
    sparsegpt,
    wanda,
)
from effir_ray.compression.sparsity.sparsify import mask_gradients, sparsify, zero_fraction
from effir_ray.compression.surgery import apply_plan
from effir_ray.encoding.padded import embed
from effir_ray.errors import InputError
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever, load_retriever
from tests.helpers.compression_examples import PAIRS, TEXTS, vectors

KINDS = ["llama", "gemma3", "bert", "modernbert"]
TWO_FOUR = SemiStructured(n=2, m=4)


def weights(retriever: Retriever) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone() for name, module in retriever.family.linears(retriever.model)
    }


def is_two_four(retriever: Retriever) -> bool:
    return all(((weight.reshape(-1, 4) == 0).sum(1) == 2).all() for weight in weights(retriever).values())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_gets_the_pattern(kind: str, method: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    before = vectors(retriever, TEXTS)
    assert sparsify(retriever, method, TWO_FOUR, TEXTS) == pytest.approx(0.5)
    assert is_two_four(retriever)
    assert not torch.allclose(vectors(retriever, TEXTS), before, atol=1e-3)
    assert all("forward" not in module.__dict__ for module in retriever.model.modules())
    unstructured = load_retriever(f"random:{kind}")
    assert sparsify(unstructured, method, Unstructured(sparsity=0.25), TEXTS) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_block_is_calibrated_on_the_pruned_blocks_before_it(kind: str, method: str) -> None:
    """The last block's weights follow from inputs of the model whose earlier blocks are pruned already."""
    retriever, reference = load_retriever(f"random:{kind}"), load_retriever(f"random:{kind}")
    sparsify(retriever, method, TWO_FOUR, TEXTS, token_budget=60)
    done = weights(retriever)
    last = f"{retriever.family.blocks}.3."
    statistics = {}
    for name, module in reference.family.linears(reference.model):
        if not name.startswith(last):
            module.weight.data.copy_(done[name])
            continue
        kind_of = InputNorms if method == "wanda" else Hessian
        statistics[name] = (module, kind_of(module.in_features, module.weight.device))
        module.register_forward_pre_hook(
            lambda m, args, name=name: statistics[name][1].add(args[0].reshape(-1, m.in_features))
        )
    vectors(reference, TEXTS)
    for name, (module, statistic) in statistics.items():
        expected = (
            wanda(module.weight, statistic.norms(), TWO_FOUR)
            if isinstance(statistic, InputNorms)
            else sparsegpt(module.weight, statistic.matrix(), TWO_FOUR)
        )
        # Batches are cut differently here: sums differ in the last bits, and near-ties may go the other way.
        agree = ((expected == 0) == (done[name] == 0)).float().mean()
        assert agree > 0.99
        assert (expected - done[name]).abs().mean() < 1e-3


def test_prune_then_finetune_keeps_the_zeros() -> None:
    retriever = load_retriever("random:llama")
    sparsify(retriever, "wanda", TWO_FOUR, TEXTS)
    batch = pair_batch(retriever, PAIRS)
    optimizer = torch.optim.AdamW(retriever.model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    hooks = mask_gradients(retriever)
    for _ in range(8):
        loss = pair_loss(embed(retriever, batch.queries), embed(retriever, batch.documents), batch.allowed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for hook in hooks:
        hook.remove()
    assert losses[-1] < 0.5 * losses[0]
    assert is_two_four(retriever)
    optimizer.zero_grad()
    pair_loss(embed(retriever, batch.queries), embed(retriever, batch.documents), batch.allowed).backward()
    optimizer.step()
    assert zero_fraction(retriever) < 0.5  # outside, they move again


def test_sparsity_needs_texts() -> None:
    with pytest.raises(InputError, match="needs calibration texts"):
        sparsify(load_retriever("random:bert"), "wanda", TWO_FOUR)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_stays_close_and_is_a_quarter_of_the_blocks(kind: str, tmp_path: Path) -> None:
    retriever = load_retriever(f"random:{kind}")
    layers = (
        LayerPlan(),
        LayerPlan(mlp=False),
        LayerPlan(attention=False),
        LayerPlan(neurons=tuple(range(64))),
    )
    apply_plan(retriever, Plan(layers=layers))
    before, full = vectors(retriever, TEXTS), measure_size(retriever)
    save_checkpoint(retriever, tmp_path / "model")
    saved = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert full.disk_bytes == pytest.approx(saved, rel=0.02)
    assert full.memory_bytes == sum(parameter.nbytes for parameter in retriever.model.parameters()) + sum(
        buffer.nbytes
        for name, buffer in retriever.model.named_buffers()
        if name in retriever.model.state_dict()
    )
    in_blocks = sum(weight.nbytes for weight in weights(retriever).values())
    rows = sum(len(weight) for weight in weights(retriever).values())
    quantize(retriever, "int8")
    small = measure_size(retriever)
    saving = in_blocks * 3 // 4 - rows * 8  # a scale and a zero point a row
    assert full.memory_bytes - small.memory_bytes == pytest.approx(saving, rel=2e-3)
    assert small.disk_bytes < full.disk_bytes
    cosine = torch.cosine_similarity(vectors(retriever, TEXTS), before)
    assert cosine.min() > 0.98
    assert not np.allclose(vectors(retriever, TEXTS), before, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "bits", "closeness"), [("nf4", 4, 0.85), ("llm-int8", 8, 0.99)])
def test_bitsandbytes_stays_close_and_small(kind: str, method: str, bits: int, closeness: float) -> None:
    pytest.importorskip("bitsandbytes")
    retriever = load_retriever(f"random:{kind}")
    before, full = vectors(retriever, TEXTS), measure_size(retriever).memory_bytes
    weights_before = weights(retriever)
    in_blocks = sum(weight.nbytes for weight in weights_before.values())
    small = measure_size(quantize(retriever, method)).memory_bytes  # type: ignore[arg-type]  # parametrised literal
    tables = 1500 * len(weights_before)  # code books and names: a fixed cost a matrix
    assert full - in_blocks < small < full - in_blocks + in_blocks * bits / 32 * 1.1 + tables
    assert torch.cosine_similarity(vectors(retriever, TEXTS), before).min() > closeness


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        quantize(load_retriever("random:llama"), "nf4")


def test_int8_takes_float32_only() -> None:
    with pytest.raises(InputError, match="float32 on the CPU"):
        quantize(load_retriever("random:llama", dtype="bfloat16"), "int8")
