from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.training.config import LoraConfig
from effir_ray.training.step.lora import LoraLinear, add_lora, plain_weights


def embed(retriever: Retriever) -> torch.Tensor:
    ids = torch.tensor(retriever.tokenize(["some words to embed"], "document"))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return retriever.pool(retriever.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "bert", "modernbert"])
def test_adapters_start_as_nothing_and_merge_into_plain_weights(family: str) -> None:
    retriever = load_retriever(f"random:{family}")
    names = set(dict(retriever.model.named_parameters()))
    before = embed(retriever)
    add_lora(retriever, LoraConfig(r=2, alpha=8))
    assert torch.allclose(embed(retriever), before, atol=1e-6)
    adapters = [module for module in retriever.model.modules() if isinstance(module, LoraLinear)]
    assert {name for name, value in retriever.model.named_parameters() if value.requires_grad} == {
        name for name, _ in retriever.model.named_parameters() if ".lora_" in name
    }
    for adapter in adapters:
        torch.nn.init.normal_(adapter.lora_b, std=0.02)
    trained = embed(retriever)
    assert not torch.allclose(trained, before, atol=1e-3)
    assert plain_weights(retriever.model, lambda parameters: nullcontext(), keep=False) == {}
    weights = plain_weights(retriever.model, lambda parameters: nullcontext())
    assert set(weights) == names
    plain = load_retriever(f"random:{family}")
    plain.model.load_state_dict(weights, strict=False)
    assert torch.allclose(embed(plain), trained, atol=1e-5)


def test_all_seven_projections_of_a_block_are_adapted() -> None:
    retriever = load_retriever("random:llama")
    add_lora(retriever, LoraConfig(r=2))
    adapted = {
        name.split(".")[-1] for name, m in retriever.model.named_modules() if isinstance(m, LoraLinear)
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
