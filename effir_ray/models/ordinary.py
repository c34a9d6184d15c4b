"""Compressed shapes that are an ordinary model of the same architecture: fewer blocks, one width.

Such a model is written as a plain checkpoint that needs no code of ours: blocks numbered anew, config.json
that of a smaller ``llama``, ``bert``, ... ``effir.json`` says which blocks of the backbone they are, so that
here the layers of a model keep the backbone's numbers, whichever way it was stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models.architecture import (
    PER_LAYER_LISTS,
    compress_config,
    compress_model,
    full_config,
    full_value,
    overrides,
    select_layers,
)
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What the smaller model's config.json cannot say of the backbone.
_BACKBONE_SETTINGS = ("num_hidden_layers", "intermediate_size", *PER_LAYER_LISTS)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is written. ``ordinary``: a checkpoint of the plain architecture that every tool loads;
    otherwise one with modelling code of its own (``trust_remote_code=True``). ``reason``: why, in a line."""

    ordinary: bool
    reason: str


def choose_layout(config: PreTrainedConfig, plan: Plan) -> Layout:
    """The layout of the backbone ``config`` (that of its compressed model will do) cut to ``plan``."""
    kept, halves = kept_blocks(plan), partial_blocks(plan)
    if not kept and not halves:
        return Layout(ordinary=False, reason="no block is left")
    if halves:
        layer = halves[0]
        here, gone = ("attention", "MLP") if plan.layers[layer].attention else ("MLP", "attention")
        others = f" (and {len(halves) - 1} more like it)" if len(halves) > 1 else ""
        return Layout(ordinary=False, reason=f"layer {layer} has {here} and no {gone}{others}")
    family = families.get(config.model_type)
    if family.first_block_differs and kept[0] != 0:
        reason = f"the first block is gone, which differs from the others of {family.name}"
        return Layout(ordinary=False, reason=reason)
    widths = sorted(set(_widths(config, plan)))
    if len(widths) > 1:
        reason = f"the MLPs differ in width ({widths[0]} to {widths[-1]} neurons)"
        return Layout(ordinary=False, reason=reason)
    depth = len(plan.layers)
    blocks = f"{len(kept)} of {depth} blocks are left whole" if len(kept) < depth else "every block is left"
    slim = widths[0] != full_value(config, "intermediate_size")
    return Layout(ordinary=True, reason=blocks + (f", every MLP with {widths[0]} neurons" if slim else ""))


def kept_blocks(plan: Plan) -> list[int]:
    """Layers that keep attention and MLP."""
    return [index for index, layer in enumerate(plan.layers) if layer.attention and layer.mlp]


def partial_blocks(plan: Plan) -> list[int]:
    """Layers that keep only one of attention and MLP."""
    return [index for index, layer in enumerate(plan.layers) if layer.attention != layer.mlp]


def _widths(config: PreTrainedConfig, plan: Plan) -> list[int]:
    full = full_value(config, "intermediate_size")
    layers = [layer for layer in plan.layers if layer.mlp]
    return [full if layer.neurons is None else len(layer.neurons) for layer in layers]


def ordinary_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The plain configuration of a ``plan`` whose layout is ordinary."""
    plain = select_layers(full_config(config), kept_blocks(plan))
    plain.intermediate_size = _widths(config, plan)[0]
    plain.architectures = None
    return plain


def place_in_backbone(config: PreTrainedConfig, plan: Plan) -> dict[str, Any]:
    """What ``effir.json`` keeps of an ordinary checkpoint: the kept layers and the backbone's own settings,
    {"layers": [0, 1, 5], "num_hidden_layers": 6, "intermediate_size": 1536}."""
    settings = {name: full_value(config, name) for name in _BACKBONE_SETTINGS}
    return {"layers": kept_blocks(plan), **{name: value for name, value in settings.items() if value}}


def restore_config(config: PreTrainedConfig, place: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    """Turn an ordinary checkpoint's configuration, in place, into the backbone's with blocks gone; the
    inverse of ``ordinary_config``. Raises InputError when ``place`` (from ``file``) is of another model."""
    layers, width = place["layers"], config.intermediate_size
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{file}: lists {len(layers)} layers, config.json says {config.num_hidden_layers}; "
            f"delete {file.name} when the model was changed by another program"
        )
    depth = place["num_hidden_layers"]
    neurons = None if width == place["intermediate_size"] else tuple(range(width))
    plan = Plan(
        layers=tuple(
            LayerPlan(attention=layer in layers, mlp=layer in layers, neurons=neurons)
            for layer in range(depth)
        )
    )
    _set_backbone(config, place, plan.per_layer_config())
    return config


def _set_backbone(
    config: PreTrainedConfig, settings: Mapping[str, Any], per_layer: Mapping[Any, dict[str, Any]]
) -> None:
    compress_config(config)
    for name in _BACKBONE_SETTINGS:
        if settings.get(name):
            setattr(config, name, settings[name])
    config.per_layer_config = per_layer


def restore_model(model: PreTrainedModel, config: PreTrainedConfig, layers: list[int]) -> None:
    """Turn the plain model of an ordinary checkpoint, in place, into that of ``config``: its blocks get the
    numbers ``layers``, blocks without anything in them stand between."""
    family, plain = families.get(config.model_type), full_config(config)
    compress_model(model)
    present = dict(zip(layers, family.layers(model), strict=True))
    block_class: Any = type(model).layer_class
    blocks = []
    for index in range(config.num_hidden_layers):
        if index not in present:
            with torch.device("meta"):
                empty = block_class(plain, index)
            empty.skip("attention")
            empty.skip("mlp")
            present[index] = empty.eval()
        blocks.append(present[index])
    model.set_submodule(family.blocks, nn.ModuleList(blocks))
    _set_backbone(
        model.config, {name: full_value(config, name) for name in _BACKBONE_SETTINGS}, overrides(config)
    )
