"""LLM-Drop's (CASE-Lab) marks in config.json: ``drop_attn_list`` and ``drop_mlp_list``.

They hold layer indices, or one true/false a layer. The weights may still hold the dropped sublayers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from effir_ray.errors import InputError
from effir_ray.models.architecture import compressed_classes
from effir_ray.models.family import COMPRESSED_PREFIX
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


DROP_LISTS = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}


def has_drop_lists(config: PreTrainedConfig) -> bool:
    """Whether the configuration came with LLM-Drop's lists."""
    return any(getattr(config, name, None) for name in DROP_LISTS.values())


def read_drop_lists(config: PreTrainedConfig, file: Path) -> PreTrainedConfig:
    """``config`` as a compressed one when it has drop lists, else as it is. ``file`` opens error messages."""
    if not has_drop_lists(config):
        return config
    depth = config.num_hidden_layers
    dropped = {
        kind: _indices(getattr(config, name, None), depth, f"{file}: {name}")
        for kind, name in DROP_LISTS.items()
    }
    plan = Plan(
        layers=tuple(
            LayerPlan(attention=index not in dropped["attention"], mlp=index not in dropped["mlp"])
            for index in range(depth)
        )
    )
    config.__class__ = compressed_classes()[COMPRESSED_PREFIX + config.model_type].config_class
    config.per_layer_config = plan.per_layer_config()
    return config


def _indices(values: Any, depth: int, where: str) -> set[int]:
    values = values or []
    if len(values) == depth and all(isinstance(value, bool) for value in values):
        return {index for index, dropped in enumerate(values) if dropped}
    if any(
        isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < depth for value in values
    ):
        raise InputError(
            f"{where} is {values}; expected layer indices below {depth} or {depth} times true or false"
        )
    return set(values)
