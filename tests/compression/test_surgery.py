"""Surgery is exact: the physically pruned model computes what the masked full model computes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effir_ray.compression.planning import make_plan, narrow_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models import modeling_effir
from effir_ray.models.accounting import count_parameters
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever
from tests.helpers.masked_reference import masked_by_hooks, randomise_norms

LAYERS, WIDTH = 4, 128
_FULL: dict[str, Retriever] = {}


def full(kind: str) -> Retriever:
    """One shared full model a family; tests copy it before they cut."""
    if kind not in _FULL:
        _FULL[kind] = load_retriever(f"random:{kind}")
        randomise_norms(_FULL[kind].model)
    return _FULL[kind]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = st.lists(st.integers(0, LAYERS - 1), unique=True, max_size=LAYERS).map(tuple)
    last = draw(st.integers(0, 2))
    rest = range(LAYERS - last)
    blocks = tuple(layer for layer in draw(layers) if layer in rest)[:2]
    free = [layer for layer in rest if layer not in blocks]
    mlps = tuple(layer for layer in draw(layers) if layer in free)
    kept = [layer for layer in free if layer not in mlps]
    given = {layer: draw(st.sampled_from([8, 40, WIDTH])) for layer in kept}
    uneven = draw(st.booleans())
    schedule = Schedule(
        drop_last_blocks=last,
        drop_block=blocks,
        drop_attention=tuple(layer for layer in draw(layers) if layer in free),
        drop_mlp=mlps,
        width_reduction=0.0 if uneven else draw(st.sampled_from([0.0, 0.1, 0.3, 0.7])),
        layer_widths=tuple(given.get(layer, 0) for layer in range(LAYERS)) if uneven else (),
    )
    plan = make_plan(schedule, LAYERS, None)
    if not any(layer.mlp for layer in plan.layers):
        return plan
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    return narrow_plan(plan, schedule, {layer: random.random(WIDTH) for layer in range(LAYERS)})


def batch(size: int, side: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random texts of 1 to 24 tokens: ids and mask, both (size, longest)."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 25, size=size)
    ids = torch.full((size, int(lengths.max())), 2)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(ids.shape[1] - length, ids.shape[1])
        ids[row, place] = torch.from_numpy(random.integers(3, 512, size=length))
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("kind", RANDOM_MODELS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    plan=plans(),
    size=st.sampled_from([1, 2, 5]),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_pruned_equals_masked(kind: str, plan: Plan, size: int, side: str, seed: int) -> None:
    ids, mask = batch(size, side, seed)
    whole = full(kind)
    with masked_by_hooks(whole, plan), torch.inference_mode():
        expected = whole.model(input_ids=ids, attention_mask=mask).last_hidden_state
    pruned = apply_plan(copy.deepcopy(whole), plan)
    with torch.inference_mode():
        found = pruned.model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert (found - expected)[real].abs().max() < 1e-5
    assert (pruned.pool(found, mask) - whole.pool(expected, mask)).abs().max() < 1e-5
    parameters = sum(parameter.numel() for parameter in pruned.model.parameters())
    assert parameters == count_parameters(whole.model.config, plan)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3"])
def test_rotary_models_do_not_mind_the_padding_side(kind: str) -> None:
    plan = Plan(layers=(LayerPlan(attention=False), LayerPlan(mlp=False), LayerPlan(), LayerPlan()))
    pruned = apply_plan(copy.deepcopy(full(kind)), plan)
    embeddings = []
    for side in ("left", "right"):
        ids, mask = batch(5, side, seed=3)
        with torch.inference_mode():
            embeddings.append(pruned.pool(pruned.model(ids, attention_mask=mask).last_hidden_state, mask))
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_dropped_sublayers_leave_nothing_behind(kind: str) -> None:
    pruned = apply_plan(
        copy.deepcopy(full(kind)), Plan(layers=(LayerPlan(attention=False, mlp=False),) * LAYERS)
    )
    blocks = pruned.family.blocks
    assert not [name for name in pruned.model.state_dict() if name.startswith(blocks)]
    assert not pruned.family.linears(pruned.model)


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_no_mask_is_made_without_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = apply_plan(copy.deepcopy(full(kind)), Plan(layers=(LayerPlan(attention=False),) * LAYERS))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a mask was made")

    import transformers.models.bert.modeling_bert as bert

    for name in ("causal", "sliding_window_causal", "bidirectional", "bidirectional_sliding_window"):
        monkeypatch.setattr(modeling_effir, f"create_{name}_mask", refuse)
    monkeypatch.setattr(bert, "create_bidirectional_mask", refuse)
    ids, mask = batch(3, "right", seed=0)
    assert pruned.model(input_ids=ids, attention_mask=mask).last_hidden_state.isfinite().all()


def test_only_the_masks_in_use_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """random:gemma3 slides in layers 0 and 2 and attends fully in 1 and 3."""
    layers = tuple(LayerPlan(attention=index in (1, 3)) for index in range(LAYERS))
    pruned = apply_plan(copy.deepcopy(full("gemma3")), Plan(layers=layers))
    made: list[str] = []
    make = pruned.model.build_mask
    monkeypatch.setattr(
        pruned.model, "build_mask", lambda kind, **inputs: made.append(kind) or make(kind, **inputs)
    )
    pruned.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert made == ["full_attention"]


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_cutting_in_two_steps_is_cutting_once(kind: str) -> None:
    keep = tuple(range(0, WIDTH, 2))
    first = Plan(layers=(LayerPlan(neurons=keep), LayerPlan(mlp=False), LayerPlan(), LayerPlan()))
    second = Plan(
        layers=(
            LayerPlan(neurons=keep[:24]),
            LayerPlan(mlp=False),
            LayerPlan(attention=False),
            LayerPlan(neurons=keep),
        )
    )
    twice = apply_plan(apply_plan(copy.deepcopy(full(kind)), first), second).model.state_dict()
    once = apply_plan(copy.deepcopy(full(kind)), second).model.state_dict()
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[name], once[name]) for name in once)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (LayerPlan(mlp=False), LayerPlan(), "sublayer of layer 0"),
        (LayerPlan(neurons=(1, 2)), LayerPlan(neurons=(1, 3)), "neuron 3 of layer 0"),
        (LayerPlan(neurons=(1, 2)), LayerPlan(), "all neurons of layer 0"),
    ],
)
def test_what_is_gone_cannot_be_kept(before: LayerPlan, after: LayerPlan, message: str) -> None:
    rest = (LayerPlan(),) * (LAYERS - 1)
    pruned = apply_plan(copy.deepcopy(full("llama")), Plan(layers=(before, *rest)))
    with pytest.raises(InputError, match=message):
        apply_plan(pruned, Plan(layers=(after, *rest)))


def test_a_plan_of_another_depth_is_refused() -> None:
    with pytest.raises(InputError, match="3 layers; the model has 4"):
        apply_plan(copy.deepcopy(full("llama")), Plan.full(3))
