"""Making a model physically what a plan says: sublayers and neurons that are not kept cease to exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effir_ray.errors import InputError
from effir_ray.models.architecture import compress_model, is_compressed
from effir_ray.models.family import Family
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from effir_ray.models.retriever import Retriever


def apply_plan(retriever: Retriever, plan: Plan) -> Retriever:
    """Change ``retriever.model`` in place to ``plan`` and return the retriever; layer numbers stay those of
    the backbone.

    The retriever may be compressed already: ``plan`` then must keep no sublayer or neuron that is gone
    (InputError). Kept weights are untouched, narrowed ones are copies of the kept rows and columns; how long
    embeddings are is no matter of layers and stays.
    """
    model, family = retriever.model, retriever.family
    if len(plan.layers) != len(retriever.plan.layers):
        raise InputError(
            f"the plan has {len(plan.layers)} layers; the model has {len(retriever.plan.layers)}"
        )
    for index, (old, new) in enumerate(zip(retriever.plan.layers, plan.layers, strict=True)):
        if (new.attention and not old.attention) or (new.mlp and not old.mlp):
            raise InputError(
                f"the plan keeps a sublayer of layer {index} that the model has not got any more"
            )
    plan = plan.model_copy(update={"dimension": retriever.plan.dimension})
    if plan != retriever.plan:
        config: Any = model.config
        if not is_compressed(config):
            compress_model(model)
        for index, layer in enumerate(family.layers(model)):
            _cut_layer(layer, family, index, retriever.plan.layers[index], plan.layers[index])
        config.per_layer_config = plan.per_layer_config()
    retriever.plan = plan
    return retriever


def _cut_layer(layer: Any, family: Family, index: int, old: LayerPlan, new: LayerPlan) -> None:
    if old.attention and not new.attention:
        layer.skip("attention")
    if old.mlp and not new.mlp:
        layer.skip("mlp")
    elif new.mlp and new.neurons is None and old.neurons is not None:
        raise InputError(
            f"the plan keeps all neurons of layer {index}; the model has {len(old.neurons)} of them left"
        )
    elif new.mlp and new.neurons is not None and new.neurons != old.neurons:
        present = old.neurons if old.neurons is not None else tuple(range(family.width(layer)))
        position = {neuron: place for place, neuron in enumerate(present)}
        gone = [neuron for neuron in new.neurons if neuron not in position]
        if gone:
            raise InputError(f"the plan keeps neuron {gone[0]} of layer {index}, which the model has not got")
        narrow_mlp(layer, family, [position[neuron] for neuron in new.neurons])


def narrow_mlp(layer: nn.Module, family: Family, kept: list[int]) -> None:
    """Keep the intermediate neurons at places ``kept``: rows of gate and up, columns of down."""
    mlp = family.mlp(layer)
    assert mlp is not None
    down = family.down(mlp)
    places = torch.tensor(kept, dtype=torch.long, device=down.weight.device)
    rows = torch.cat([places, places + down.in_features]) if family.fused else places
    _select(family.up(mlp), rows, axis=0)
    gate = family.gate(mlp)
    if gate is not None and not family.fused:
        _select(gate, rows, axis=0)
    _select(down, places, axis=1)


def _select(linear: nn.Linear, places: torch.Tensor, *, axis: int) -> None:
    weight = linear.weight
    linear.weight = nn.Parameter(
        weight.detach().index_select(axis, places), requires_grad=weight.requires_grad
    )
    if axis == 0 and linear.bias is not None:
        bias = linear.bias
        linear.bias = nn.Parameter(bias.detach().index_select(0, places), requires_grad=bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
