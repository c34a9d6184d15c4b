"""Every adapter points at what it says it points at."""

from itertools import pairwise

import pytest
import torch

from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models.architecture import compressed_classes
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import load_retriever

IDS = torch.tensor([[3, 50, 400, 7, 1], [9, 8, 7, 1, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_parts_of_a_layer(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    family = retriever.family
    for layer in family.layers(retriever.model):
        mlp = family.mlp(layer)
        assert mlp is not None
        assert family.width(layer) == family.down(mlp).in_features == 128
        assert family.up(mlp).out_features == (256 if family.fused else 128)
        assert (family.gate(mlp) is not None) == (family.gate_name is not None)
        named = {name for name, _ in layer.named_parameters()}
        covered = {name for name in named if name.startswith((*family.attention_parts, *family.mlp_parts))}
        assert covered == named  # nothing of a layer stays when both sublayers go
    linears = [name for name, _ in family.linears(retriever.model)]
    assert len(linears) == 4 * (
        len(family.attention_linears) + len({family.up_name, family.gate_name, family.down_name} - {None})
    )


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_modelling_code_and_family_agree(kind: str) -> None:
    family = families.get(load_retriever(f"random:{kind}").model.config.model_type)
    for model_type in family.model_types:
        layer = compressed_classes()[families.COMPRESSED_PREFIX + model_type].layer_class
        assert (layer.attention_parts, layer.mlp_parts) == (family.attention_parts, family.mlp_parts)


@pytest.mark.parametrize("cut", [False, True], ids=["full", "cut"])
@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_the_stream_is_handed_on(kind: str, cut: bool) -> None:
    """What a sublayer leaves is what the next one finds; the last block's output feeds the final norm."""
    retriever = load_retriever(f"random:{kind}")
    if cut:
        layers = (
            LayerPlan(mlp=False),
            LayerPlan(attention=False, mlp=False),
            LayerPlan(attention=False),
            LayerPlan(),
        )
        apply_plan(retriever, Plan(layers=layers))
    seen: list[tuple[int, str, torch.Tensor, torch.Tensor]] = []
    with retriever.family.watch(retriever.model, lambda *report: seen.append(report)), torch.inference_mode():
        output = retriever.model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    expected = [
        (index, kind)
        for index, layer in enumerate(retriever.plan.layers)
        for kind, there in (("attention", layer.attention), ("mlp", layer.mlp), ("block", True))
        if there
    ]
    assert [(index, kind) for index, kind, _, _ in seen] == expected
    blocks = [report for report in seen if report[1] == "block"]
    for (_, _, _, left), (_, _, found, _) in pairwise(blocks):
        assert torch.equal(left, found)
    for index, _, before, after in blocks:
        inside = [report for report in seen if report[0] == index and report[1] != "block"]
        ends = [before, *(report[3] for report in inside)]
        assert all(torch.equal(end, report[2]) for end, report in zip(ends, inside, strict=False))
        assert torch.equal(ends[-1], after)
        assert torch.equal(before, output.hidden_states[index])
    assert not any(module._forward_pre_hooks for module in retriever.model.modules())


def test_unknown_architecture() -> None:
    with pytest.raises(
        InputError, match=r"'t5' is not supported; supported: llama, .*modernbert.* To add one"
    ):
        families.get("t5")
