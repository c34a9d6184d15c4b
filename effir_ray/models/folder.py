"""What a model folder says besides its weights: pooling and prompts, and which neurons were kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from effir_ray.config import Config, parse
from effir_ray.errors import InputError
from effir_ray.models.architecture import overrides
from effir_ray.models.family import Family
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# effir-ray's own file in a checkpoint: {"format": 1, "backbone": ..., "spec": ..., "neurons": {"3": [0, 5]}},
# in an ordinary one of a compressed model also "place", see ``ordinary.place_in_backbone``.
OWN_FILE = "effir.json"


class RetrieverSpec(Config):
    """pooling "last" takes the last real token (with ``append_eos`` the EOS token, as in the paper, section
    4).

    Prompts are put before the text as they are. ``max_length`` counts every token, prompt and EOS included.
    """

    pooling: Literal["last", "mean", "cls"]
    normalize: bool = True
    append_eos: bool
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int = Field(default=512, ge=2)


def is_adapter(folder: Path) -> bool:
    """A LoRA adapter without the weights it belongs to."""
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


def base_of_adapter(folder: Path) -> str:
    """Name or path of the model that an adapter belongs to; a path may be relative to its folder."""
    name = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not name:
        raise InputError(f"{folder / 'adapter_config.json'}: base_model_name_or_path is missing")
    beside = folder / name
    return str(beside if beside.is_dir() else name)


def read_json(file: Path) -> Any:
    """None when the file does not exist; InputError when it is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None


def read_spec(folder: Path, family: Family) -> RetrieverSpec:
    """Our own file first, then sentence-transformers' files, then what suits the family."""
    own = read_json(folder / OWN_FILE)
    if own is not None:
        return parse(own.get("spec", {}), RetrieverSpec, source=str(folder / OWN_FILE))
    pooling_file = read_json(folder / "1_Pooling" / "config.json")
    if pooling_file is None:
        return RetrieverSpec(pooling=family.pooling, append_eos=family.causal)
    pooling = _pooling(pooling_file, folder)
    modules = read_json(folder / "modules.json") or []
    limits = read_json(folder / "sentence_bert_config.json") or {}
    prompts = (read_json(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    return RetrieverSpec(
        pooling=pooling,
        normalize=any("Normalize" in module["type"] for module in modules),
        append_eos=family.causal and pooling == "last",
        query_prompt=prompts.get("query") or "",
        document_prompt=prompts.get("document") or prompts.get("passage") or "",
        max_length=limits.get("max_seq_length") or 512,
    )


def _pooling(settings: dict[str, Any], folder: Path) -> Any:
    flags = {
        "cls": "pooling_mode_cls_token",
        "mean": "pooling_mode_mean_tokens",
        "last": "pooling_mode_lasttoken",
    }
    newer = {"cls": "cls", "mean": "mean", "lasttoken": "last"}.get(str(settings.get("pooling_mode")))
    chosen = [newer] if newer else [name for name, flag in flags.items() if settings.get(flag)]
    if len(chosen) != 1:
        raise InputError(
            f"{folder / '1_Pooling' / 'config.json'}: expected one of cls, mean and last-token pooling"
        )
    return chosen[0]


def read_place(folder: Path) -> dict[str, Any] | None:
    """Which of the backbone's blocks an ordinary checkpoint of ours holds; None for any other folder."""
    place: dict[str, Any] | None = (read_json(folder / OWN_FILE) or {}).get("place")
    return place


def present_plan(config: PreTrainedConfig) -> Plan:
    """What a configuration has left; it knows only how many neurons, so the first ones stand for them."""
    layers, per_layer = [], overrides(config)
    for index in range(config.num_hidden_layers):
        entry = per_layer.get(index, {})
        skip, width = entry.get("skip", ()), entry.get("intermediate_size")
        neurons = tuple(range(width)) if width is not None else None
        layers.append(LayerPlan(attention="attention" not in skip, mlp="mlp" not in skip, neurons=neurons))
    return Plan(layers=tuple(layers))


def read_plan(folder: Path, config: PreTrainedConfig) -> Plan:
    """The plan of a loaded model, with the neurons that our own file names."""
    neurons = (read_json(folder / OWN_FILE) or {}).get("neurons", {})
    layers = list(present_plan(config).layers)
    for index, layer in enumerate(layers):
        if layer.neurons is None or str(index) not in neurons:
            continue
        named, width = neurons[str(index)], len(layer.neurons)
        if len(named) != width:
            raise InputError(
                f"{folder / OWN_FILE}: layer {index} lists {len(named)} neurons, config.json says {width}"
            )
        layers[index] = layer.model_copy(update={"neurons": tuple(named)})
    return Plan(layers=tuple(layers))
