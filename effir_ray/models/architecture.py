"""From a configuration to a headless model class, for plain and for compressed backbones.

The only place where a backbone's configuration or model becomes a compressed one, or the other way round.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models.family import COMPRESSED_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# LLM-Drop's marks in config.json, see ``foreign``: sublayer -> name of the list of layers without it.
DROP_LISTS = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}
# Settings that are one value a layer.
PER_LAYER_LISTS = ("layer_types",)


@lru_cache(maxsize=1)
def compressed_classes() -> dict[str, type[PreTrainedModel]]:
    """Model type ("effir_llama") -> model class; registers them with transformers' Auto classes."""
    from transformers import AutoConfig, AutoModel

    from effir_ray.models.modeling_effir import MODEL_CLASSES  # all of transformers' modelling code: seconds

    models: Any = MODEL_CLASSES
    classes: dict[str, Any] = {model.config_class.model_type: model for model in models}
    for model_type, model in classes.items():
        AutoConfig.register(model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)
    return classes


def is_compressed(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a compressed model, which has its own class and model type."""
    return str(config.model_type).startswith(COMPRESSED_PREFIX)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The headless model class of a configuration."""
    from transformers import MODEL_MAPPING

    if is_compressed(config):
        return compressed_classes()[config.model_type]
    found: Any = MODEL_MAPPING[type(config)]
    return found  # type: ignore[no-any-return]  # transformers is untyped


def build_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What the family's model class is built with beside its configuration."""
    return dict(families.get(config.model_type).build_options)


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with fresh random weights."""
    return model_class(config)(config, **build_options(config))


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Shapes only, no memory: for counting."""
    with torch.device("meta"):
        return build_model(copy.deepcopy(config))


def compress_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Turn a backbone's configuration, in place, into that of its compressed model, with nothing gone yet.

    Returns ``config``; a compressed one stays as it is.
    """
    if is_compressed(config):
        return config
    model: Any = compressed_classes()[COMPRESSED_PREFIX + config.model_type]
    config.__class__ = model.config_class
    # Read from a file, a configuration holds the model type it was read with, which hides the class's own.
    config.__dict__.pop("model_type", None)
    config.architectures = [model.__name__]
    return config


def compress_model(model: PreTrainedModel) -> None:
    """Turn a plain backbone, in place, into its compressed class with every sublayer still there."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    new: Any = compressed_classes()[compress_config(model.config).model_type]
    model.__class__ = new
    # PreTrainedModel.__init__ does this; without it there is no output_hidden_states.
    _CAN_RECORD_REGISTRY[model] = new._can_record_outputs
    for layer in families.get(model.config.model_type).layers(model):
        layer.__class__ = new.layer_class


def full_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the uncompressed backbone that ``config`` belongs to (a copy)."""
    from transformers import AutoConfig

    values = copy.deepcopy(config)
    if not is_compressed(config):
        return values
    values.per_layer_config = None
    settings = values.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", *DROP_LISTS.values()):
        settings.pop(key, None)
    return AutoConfig.for_model(config.model_type.removeprefix(COMPRESSED_PREFIX), **settings)


def full_value(config: PreTrainedConfig, name: str) -> Any:
    """A setting of the uncompressed backbone, also where layers differ in it; None when there is none."""
    return config._getattr_without_heterogeneous_validation(name, None)


def overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """``per_layer_config`` as a plain mapping: layer -> {"skip": [...], "intermediate_size": n}."""
    if not config.is_heterogeneous:
        return {}
    found: dict[int, dict[str, Any]] = config._heterogeneity_spec.per_layer_overrides
    return copy.deepcopy(found)


def select_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy that has only ``layers`` (in order), numbered anew; what is set layer by layer follows them."""
    fewer = copy.deepcopy(config)
    per_layer = overrides(config)
    fewer.per_layer_config = None
    for name in PER_LAYER_LISTS:
        values = getattr(fewer, name, None)
        if values:
            setattr(fewer, name, [values[layer] for layer in layers])
    fewer.num_hidden_layers = len(layers)
    moved = {place: per_layer[layer] for place, layer in enumerate(layers) if layer in per_layer}
    fewer.per_layer_config = moved or None
    return fewer


def cut_depth(config: PreTrainedConfig, first_blocks: int) -> PreTrainedConfig:
    """A copy that has only the first blocks. Raises InputError unless 1 <= first_blocks <= depth."""
    depth = config.num_hidden_layers
    if not 1 <= first_blocks <= depth:
        raise InputError(
            f"first_blocks is {first_blocks}; the backbone has {depth} blocks, give 1 to {depth}"
        )
    return select_layers(config, range(first_blocks))
