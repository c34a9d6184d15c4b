"""Checkpoints of others: LLM-Drop's lists of dropped layers, and the released EffiR adapters.

LLM-Drop (CASE-Lab) marks dropped sublayers in config.json as ``drop_attn_list`` and ``drop_mlp_list``: layer
indices, or one true/false a layer. The weights may still hold the dropped sublayers.

An EffiR release is a LoRA adapter (``adapter_config.json``, ``adapter_model.safetensors``) on a Mistral
marked in that way, with ``embedding/input_emb.pth``: the input embedding that replaces the base's after
merging.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effir_ray.errors import InputError
from effir_ray.models.architecture import DROP_LISTS, compress_config
from effir_ray.models.folder import RetrieverSpec
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.settings import AdapterSettings
from effir_ray.models.weight_files import safetensors_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The prompt and length of the authors' evaluation script.
EFFIR_SPEC = RetrieverSpec(
    pooling="last",
    append_eos=True,
    query_prompt="<instruct>Given a query, retrieve relevant passages that answer the query.\n<query>",
    max_length=512,
)
_LORA_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)


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
    compress_config(config).per_layer_config = plan.per_layer_config()
    return config


def _indices(values: Any, depth: int, where: str) -> set[int]:
    values = values or []
    if isinstance(values, list) and len(values) == depth and all(isinstance(value, bool) for value in values):
        return {index for index, dropped in enumerate(values) if dropped}
    if not isinstance(values, list) or any(
        isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < depth for value in values
    ):
        raise InputError(
            f"{where} is {str(values)[:60]}; expected layer indices below {depth} or {depth} times true or "
            "false"
        )
    return set(values)


@torch.no_grad()
def merge_lora(
    model: PreTrainedModel, folder: Path, settings: AdapterSettings, renamed: Mapping[str, str]
) -> None:
    """W += scale * B A for every adapted Linear (arXiv 2106.09685, section 4.1), in float32.

    ``renamed``: how names of Linears begin in the adapter -> in ``model``, where they differ.
    """
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: no such file; a LoRA adapter keeps its weights there")
    if settings.use_dora or settings.fan_in_fan_out or settings.bias not in ("none", None):
        raise InputError(
            f"{folder / 'adapter_config.json'}: only plain LoRA is supported (no DoRA, no biases)"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    safetensors_header(file)
    for name, tensor in load_file(file).items():
        found = _LORA_NAME.fullmatch(name)
        if found is None:
            raise InputError(f"{file}: unexpected tensor {name}; expected LoRA pairs (lora_A, lora_B) only")
        pairs.setdefault(found["module"], {})[found["side"]] = tensor
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{file}: {name} has only one of lora_A and lora_B")
        linear = _linear(model, _renamed(name, renamed), file)
        shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
        out, into = linear.weight.shape
        rank = shapes[0][0] if shapes[0] else 0
        if not rank or shapes != ((rank, into), (out, rank)):
            raise InputError(
                f"{file}: {name} has pairs of shape {shapes[0]} and {shapes[1]}, the base model's matrix is "
                f"{(out, into)}"
            )
        alpha = _alpha(name, settings)
        scale = alpha / (rank**0.5 if settings.use_rslora else rank)
        change = scale * pair["B"].float() @ pair["A"].float()
        linear.weight += change.to(linear.weight)


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for start, new in renamed.items():
        if name.startswith(start):
            return new + name.removeprefix(start)
    return name


def _alpha(name: str, settings: AdapterSettings) -> float:
    """The first pattern that matches the end of the module's name, whole parts of it, counts (as in PEFT).

    PEFT's name of it begins with ``model.`` where the adapter is that of a whole language model.
    """
    for pattern, alpha in (settings.alpha_pattern or {}).items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", whole) for whole in (name, f"model.{name}")):
            return alpha
    return settings.lora_alpha


def _linear(model: nn.Module, name: str, file: Path) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise InputError(f"{file}: it adapts {name}, which the base model has not got; check its drop lists")
    return module


def replace_embedding(model: Any, file: Path) -> None:
    """The file is a pickled nn.Embedding: torch's restricted unpickler reads it, nothing in it may run."""
    try:
        with torch.serialization.safe_globals([nn.Embedding]):
            value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a malformed file makes it raise
        raise InputError(f"{file}: not a plain embedding: {' '.join(str(error).split())[:200]}") from None
    if isinstance(value, Mapping):
        value = value.get("weight")
    weight = value.weight if isinstance(value, nn.Embedding) else value
    hidden = model.config.hidden_size
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != hidden:
        raise InputError(f"{file}: expected an embedding matrix of width {hidden}")
    old = model.get_input_embeddings()
    # A vocabulary that was extended for training has more rows than the base's.
    model.resize_token_embeddings(weight.shape[0], mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(weight.to(old.weight.dtype))
