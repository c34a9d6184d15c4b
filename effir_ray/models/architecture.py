"""From a configuration to a headless model class, for plain and for compressed backbones."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from effir_ray.models.family import COMPRESSED_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@lru_cache(maxsize=1)
def compressed_classes() -> dict[str, type[PreTrainedModel]]:
    """Model type ("effir_llama") -> model class; registers them with transformers' Auto classes."""
    from transformers import AutoConfig, AutoModel

    from effir_ray.models.modeling_effir import MODEL_CLASSES

    models: Any = MODEL_CLASSES
    classes: dict[str, Any] = {model.config_class.model_type: model for model in models}
    for model_type, model in classes.items():
        AutoConfig.register(model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)
    return classes


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The headless model class of a configuration."""
    from transformers import MODEL_MAPPING

    classes = compressed_classes()
    if config.model_type in classes:
        return classes[config.model_type]
    found: Any = MODEL_MAPPING[type(config)]
    return found  # type: ignore[no-any-return]  # transformers is untyped


def build_options(config: PreTrainedConfig) -> dict[str, Any]:
    """BERT's pooler serves next-sentence prediction; a retriever pools by itself."""
    return {"add_pooling_layer": False} if config.model_type == "bert" else {}


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with fresh random weights."""
    return model_class(config)(config, **build_options(config))


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Shapes only, no memory: for counting."""
    import torch

    with torch.device("meta"):
        return build_model(copy.deepcopy(config))


def full_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the uncompressed backbone that ``config`` belongs to (a copy)."""
    from transformers import AutoConfig

    if not config.model_type.startswith(COMPRESSED_PREFIX):
        return copy.deepcopy(config)
    values = copy.deepcopy(config)
    values.per_layer_config = None
    settings = values.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config"):
        settings.pop(key, None)
    return AutoConfig.for_model(config.model_type.removeprefix(COMPRESSED_PREFIX), **settings)


def overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """``per_layer_config`` as a plain mapping: layer -> {"skip": [...], "intermediate_size": n}."""
    if not config.is_heterogeneous:
        return {}
    found: dict[int, dict[str, Any]] = config._heterogeneity_spec.per_layer_overrides
    return copy.deepcopy(found)


def cut_depth(config: PreTrainedConfig, first_blocks: int) -> PreTrainedConfig:
    """A copy that has only the first blocks. Raises InputError unless 1 <= first_blocks <= depth."""
    from effir_ray.errors import InputError

    depth = config.num_hidden_layers
    if not 1 <= first_blocks <= depth:
        raise InputError(
            f"first_blocks is {first_blocks}; the backbone has {depth} blocks, give 1 to {depth}"
        )
    shorter = copy.deepcopy(config)
    per_layer = {index: entry for index, entry in overrides(config).items() if index < first_blocks}
    shorter.per_layer_config = None
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = list(shorter.layer_types)[:first_blocks]
    shorter.num_hidden_layers = first_blocks
    shorter.per_layer_config = per_layer or None
    return shorter
