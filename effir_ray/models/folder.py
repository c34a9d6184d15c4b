"""What a model folder says besides its weights: pooling, length of embeddings, prompts, and kept neurons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from effir_ray.config import Config, Prompts, parse
from effir_ray.errors import InputError
from effir_ray.models.architecture import overrides
from effir_ray.models.family import Family
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.settings import (
    AdapterSettings,
    DenseSettings,
    LengthSettings,
    OwnSettings,
    PoolingSettings,
    PromptSettings,
    dense_place,
    normalizes,
    read_settings,
)
from effir_ray.readers import quoted
from effir_ray.storage import is_uri

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# effir-ray's own file in a checkpoint: {"format": 1, "backbone": ..., "spec": ..., "neurons": {"3": [0, 5]}},
# in an ordinary one of a compressed model also "place", see ``ordinary.place_in_backbone``.
OWN_FILE = "effir.json"

REMOTE_CODE = "modeling_effir.py"
"""In a checkpoint that no class of transformers can read: the modelling code it brings."""

TextKind = Literal["query", "document"]


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
    max_length: int = Field(default=512, ge=2, le=2**31)

    def with_prompts(self, prompts: Prompts | None) -> RetrieverSpec:
        """With these in the place of its own; None leaves those."""
        if prompts is None:
            return self
        return self.model_copy(update={"query_prompt": prompts.query, "document_prompt": prompts.document})


def is_adapter(folder: Path) -> bool:
    """A LoRA adapter without the weights it belongs to."""
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


def read_adapter(folder: Path) -> AdapterSettings:
    """Raises InputError where there is none, or no LoRA adapter that can be merged."""
    file = folder / "adapter_config.json"
    settings = read_settings(file, AdapterSettings)
    if settings is None:
        raise InputError(f"{file}: no such file")
    return settings


def base_of_adapter(folder: Path) -> str:
    """Name or path of the model that an adapter belongs to; a path may be relative to its folder."""
    name = read_adapter(folder).base_model_name_or_path
    beside = folder / name
    if is_uri(name):  # whoever wrote the adapter does not choose what this machine fetches
        raise InputError(f"{folder / 'adapter_config.json'}: its base {quoted(name)} is a URI; give a folder")
    if beside.is_dir() and is_adapter(beside):
        raise InputError(
            f"{folder / 'adapter_config.json'}: its base {quoted(name)} is an adapter too; merge that first"
        )
    return str(beside if beside.is_dir() else name)


def read_own(folder: Path) -> OwnSettings | None:
    """effir.json; None for a model of others."""
    return read_settings(folder / OWN_FILE, OwnSettings)


def read_spec(folder: Path, family: Family) -> RetrieverSpec:
    """Our own file first, then sentence-transformers' files, then what suits the family."""
    own = read_own(folder)
    if own is not None:
        return parse(own.spec, RetrieverSpec, source=f"{folder / OWN_FILE}: spec")
    pooling_file = read_settings(folder / "1_Pooling" / "config.json", PoolingSettings)
    if pooling_file is None:
        return RetrieverSpec(pooling=family.pooling, append_eos=family.causal)
    pooling = _pooling(pooling_file, folder)
    limits = read_settings(folder / "sentence_bert_config.json", LengthSettings)
    described = read_settings(folder / "config_sentence_transformers.json", PromptSettings)
    prompts = (described and described.prompts) or {}
    return RetrieverSpec(
        pooling=pooling,
        normalize=normalizes(folder / "modules.json"),
        append_eos=family.causal and pooling == "last",
        query_prompt=prompts.get("query") or "",
        document_prompt=prompts.get("document") or prompts.get("passage") or "",
        max_length=(limits and limits.max_seq_length) or 512,
    )


def _pooling(settings: PoolingSettings, folder: Path) -> Any:
    flags = {
        "cls": settings.pooling_mode_cls_token,
        "mean": settings.pooling_mode_mean_tokens,
        "last": settings.pooling_mode_lasttoken,
    }
    newer = {"cls": "cls", "mean": "mean", "lasttoken": "last"}.get(str(settings.pooling_mode))
    chosen = [newer] if newer else [name for name, flag in flags.items() if flag]
    if len(chosen) != 1:
        raise InputError(
            f"{folder / '1_Pooling' / 'config.json'}: expected one of cls, mean and last-token pooling"
        )
    return chosen[0]


def read_dense(folder: Path) -> tuple[Path, DenseSettings] | None:
    """The folder and the settings of what makes embeddings shorter after pooling; None where nothing does."""
    name = dense_place(folder / "modules.json")
    if name is None:
        return None
    settings = read_settings(folder / name / "config.json", DenseSettings)
    if settings is None:
        raise InputError(f"{folder / name / 'config.json'}: no such file; modules.json has a Dense there")
    return folder / name, settings


def read_place(folder: Path) -> dict[str, Any] | None:
    """Which of the backbone's blocks an ordinary checkpoint of ours holds; None for any other folder."""
    own = read_own(folder)
    return None if own is None or own.place is None else own.place.model_dump(mode="json", exclude_unset=True)


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
    """The plan of a loaded model, with the neurons that our own file names and the length of embeddings."""
    own = read_own(folder)
    neurons = own.neurons if own is not None else {}
    layers = list(present_plan(config).layers)
    for index, layer in enumerate(layers):
        if layer.neurons is None or str(index) not in neurons:
            continue
        named, width = neurons[str(index)], len(layer.neurons)
        if len(named) != width:
            raise InputError(
                f"{folder / OWN_FILE}: layer {index} lists {len(named)} neurons, config.json says {width}"
            )
        layers[index] = layer.model_copy(update={"neurons": named})
    dense = read_dense(folder)
    return Plan(layers=tuple(layers), dimension=None if dense is None else dense[1].out_features)
