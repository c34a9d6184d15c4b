"""Compressed models train, adapt and compile like any other model of transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from effir_ray.compression.surgery import apply_plan
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever

PLAN = Plan(
    layers=(
        LayerPlan(attention=False, mlp=False),
        LayerPlan(attention=False),
        LayerPlan(mlp=False),
        LayerPlan(neurons=tuple(range(64))),
    )
)
IDS = torch.tensor([[3, 50, 400, 7, 1], [9, 8, 7, 1, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


def pruned(kind: str) -> Retriever:
    return apply_plan(load_retriever(f"random:{kind}"), PLAN)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, attention_mask=MASK).last_hidden_state.pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model = pruned(kind).model.train()
    plain = gradients(model)
    assert plain.keys() == dict(model.named_parameters()).keys()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_lora_reaches_every_linear_that_is_left(kind: str) -> None:
    retriever = pruned(kind)
    before = retriever.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    names = [name for name, _ in retriever.family.linears(retriever.model)]
    tuned = get_peft_model(retriever.model, LoraConfig(r=2, target_modules=names))
    assert torch.equal(tuned(input_ids=IDS, attention_mask=MASK).last_hidden_state, before)
    found = gradients(tuned)
    assert len(found) == 2 * len(names)
    assert all("lora_" in name for name in found)


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_no_cache_is_kept(kind: str) -> None:
    output = pruned(kind).model(input_ids=IDS, attention_mask=MASK, use_cache=True)
    assert getattr(output, "past_key_values", None) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_packed_texts_do_not_see_each_other(kind: str) -> None:
    """Positions that start again separate the texts of one row."""
    model = pruned(kind).model
    lengths = (3, 5, 4)
    ids = torch.arange(3, 3 + sum(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    with torch.inference_mode():
        packed = model(input_ids=ids, position_ids=positions).last_hidden_state[0].split(lengths)
        for text, found in zip(ids[0].split(lengths), packed, strict=True):
            alone = model(input_ids=text.unsqueeze(0)).last_hidden_state[0]
            assert (found - alone).abs().max() < 1e-5


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_bad_inputs(kind: str) -> None:
    model = pruned(kind).model
    with pytest.raises(ValueError, match="exactly one of"):
        model(attention_mask=MASK)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert", "modernbert"])
def test_it_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    model = pruned(kind).model
    with torch.inference_mode():
        expected = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert (found - expected).abs().max() < 1e-5
