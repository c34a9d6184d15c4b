"""Parameters, FLOPs and bytes of a compressed backbone, from its configuration alone (no weights are made).

Conventions: the language-modelling head is left out, embeddings are counted (as the paper does). One
multiply-add is two FLOPs; only matrix products count. Attention scores are counted for every pair of tokens
that a layer's window lets meet, causal or not, as in PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from torch.nn import Linear

from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models.architecture import build_on_meta, full_config
from effir_ray.models.family import part
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}
_INT8 = "int8"  # what blocks multiply by; the rest stays float32


@dataclass(frozen=True, kw_only=True)
class LayerAnatomy:
    """What one uncompressed layer is made of. ``*_weights``: entries of matrices, two FLOPs a token each."""

    attention_parameters: int
    attention_weights: int
    # Channels of all heads together: each query-key pair costs 2 FLOPs a channel for the score, 2 for the
    # mixture.
    attention_channels: int
    # Tokens that a token can attend to; None is all of them.
    window: int | None
    mlp_fixed_parameters: int
    parameters_a_neuron: int
    weights_a_neuron: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """``rest``: parameters outside the blocks (embeddings and final norm), of which every one of the
    ``vocabulary`` tokens has ``parameters_a_token``."""

    rest: int
    vocabulary: int
    parameters_a_token: int
    layers: tuple[LayerAnatomy, ...]


def count_parameters(config: PreTrainedConfig, plan: Plan) -> int:
    """Parameters of the backbone ``config`` cut to ``plan``, embeddings in, LM head out. In is also the
    projection to shorter embeddings; ``flops`` leaves it out: it is one product a text, not a token."""
    anatomy = anatomy_of(config)
    gone = 0 if plan.vocabulary is None else anatomy.vocabulary - plan.vocabulary
    projection = (plan.dimension or 0) * config.hidden_size
    outside = anatomy.rest - gone * anatomy.parameters_a_token + projection
    return int(outside) + count_block_parameters(config, plan)


def embedding_size(config: PreTrainedConfig, plan: Plan) -> int:
    """Length of an embedding."""
    return plan.dimension or int(config.hidden_size)


def index_bytes(config: PreTrainedConfig, plan: Plan) -> int:
    """Bytes of the embeddings of a million documents, which are float32."""
    return 10**6 * BYTES_PER_PARAMETER["float32"] * embedding_size(config, plan)


def count_block_parameters(config: PreTrainedConfig, plan: Plan) -> int:
    """Those of the blocks alone: what dropping and slimming can take away."""
    anatomy = anatomy_of(config)
    check_plan(anatomy, plan)
    return sum(layer_parameters(*layer) for layer in zip(anatomy.layers, plan.layers, strict=True))


def layer_parameters(parts: LayerAnatomy, kept: LayerPlan) -> int:
    """Those of one block."""
    total = 0
    if kept.attention:
        total += parts.attention_parameters
    if kept.mlp:
        total += parts.mlp_fixed_parameters + parts.parameters_a_neuron * width(parts, kept)
    return total


def flops(config: PreTrainedConfig, plan: Plan, tokens: int) -> int:
    """FLOPs of one forward pass over one text of ``tokens`` tokens."""
    anatomy = anatomy_of(config)
    check_plan(anatomy, plan)
    return sum(layer_flops(*layer, tokens) for layer in zip(anatomy.layers, plan.layers, strict=True))


def layer_flops(parts: LayerAnatomy, kept: LayerPlan, tokens: int) -> int:
    """Those of one block."""
    total = 0
    if kept.attention:
        seen = tokens if parts.window is None else min(tokens, parts.window)
        total += 2 * tokens * parts.attention_weights + 4 * tokens * seen * parts.attention_channels
    if kept.mlp:
        total += 2 * tokens * parts.weights_a_neuron * width(parts, kept)
    return total


def alike(config: PreTrainedConfig, tokens: int) -> bool:
    """Whether all layers of the backbone cost the same, for texts of ``tokens`` tokens: then sizes and FLOPs
    depend on how many layers go, not on which."""
    layers = anatomy_of(config).layers
    windows = [tokens if parts.window is None else min(tokens, parts.window) for parts in layers]
    return len({replace(parts, window=seen) for parts, seen in zip(layers, windows, strict=True)}) == 1


def model_bytes(config: PreTrainedConfig, plan: Plan, dtype: str = "float32") -> int:
    """Bytes of the weights, on disk and in memory; in int8, which is no type on disk, those of the matrices
    of blocks are bytes and the others float32. Raises InputError for an unknown ``dtype``."""
    if dtype == _INT8:
        whole = BYTES_PER_PARAMETER["float32"]
        return whole * count_parameters(config, plan) - (whole - 1) * _block_weights(config, plan)
    if dtype not in BYTES_PER_PARAMETER:
        known = ", ".join((*BYTES_PER_PARAMETER, _INT8))
        raise InputError(f"dtype '{dtype}' is unknown; expected one of {known}")
    return count_parameters(config, plan) * BYTES_PER_PARAMETER[dtype]


def _block_weights(config: PreTrainedConfig, plan: Plan) -> int:
    """Entries of the matrices of the blocks that are left."""
    layers = zip(anatomy_of(config).layers, plan.layers, strict=True)
    return sum(
        parts.attention_weights * kept.attention + parts.weights_a_neuron * width(parts, kept) * kept.mlp
        for parts, kept in layers
    )


def width(parts: LayerAnatomy, kept: LayerPlan) -> int:
    """Neurons that a kept MLP has."""
    return parts.width if kept.neurons is None else len(kept.neurons)


def anatomy_of(config: PreTrainedConfig) -> Anatomy:
    """Measured on a weightless copy of the uncompressed backbone; remembered for each configuration."""
    return _anatomy(json.dumps(full_config(config).to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _anatomy(settings: str) -> Anatomy:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**json.loads(settings))
    family = families.get(config.model_type)
    model = build_on_meta(config)
    layers = tuple(
        _layer_anatomy(layer, family, config, index) for index, layer in enumerate(family.layers(model))
    )
    in_blocks = sum(parameter.numel() for parameter in family.layers(model).parameters())
    vocabulary, parameters_a_token = model.get_input_embeddings().weight.shape
    return Anatomy(
        rest=sum(parameter.numel() for parameter in model.parameters()) - in_blocks,
        vocabulary=vocabulary,
        parameters_a_token=parameters_a_token,
        layers=layers,
    )


def _layer_anatomy(
    layer: nn.Module, family: families.Family, config: PreTrainedConfig, index: int
) -> LayerAnatomy:
    def modules(names: tuple[str, ...]) -> list[nn.Module]:
        return [module for name in names if (module := part(layer, name)) is not None]

    attention, mlp = modules(family.attention_parts), modules(family.mlp_parts)
    attention_total = sum(p.numel() for module in attention for p in module.parameters())
    attention_weights = sum(
        inner.weight.numel()
        for module in attention
        for inner in module.modules()
        if isinstance(inner, Linear)
    )
    mlp_total = sum(p.numel() for module in mlp for p in module.parameters())
    mlp_weights = sum(
        inner.weight.numel() for module in mlp for inner in module.modules() if isinstance(inner, Linear)
    )
    own_mlp = family.mlp(layer)
    assert own_mlp is not None  # nothing of an uncompressed layer is gone
    down, up, gate = family.down(own_mlp), family.up(own_mlp), family.gate(own_mlp)
    neurons = down.in_features
    by_neuron = [up] if gate is None or gate is up else [up, gate]
    bias_entries = sum(linear.bias.numel() for linear in by_neuron if linear.bias is not None)
    output = part(layer, family.attention_linears[-1])
    return LayerAnatomy(
        attention_parameters=attention_total,
        attention_weights=attention_weights,
        attention_channels=output.in_features if isinstance(output, Linear) else 0,
        window=family.window(config, index),
        mlp_fixed_parameters=mlp_total - mlp_weights - bias_entries,
        parameters_a_neuron=(mlp_weights + bias_entries) // neurons,
        weights_a_neuron=mlp_weights // neurons,
        width=neurons,
    )


def check_plan(anatomy: Anatomy, plan: Plan) -> None:
    """Raise InputError unless the plan is for as many layers."""
    if len(plan.layers) != len(anatomy.layers):
        raise InputError(f"the plan has {len(plan.layers)} layers; the backbone has {len(anatomy.layers)}")
