"""The JSON files of a model folder, field by field: types and bounds, before anything is built from them.

config.json                                      transformers' architecture, see ``ModelSettings``
effir.json                                       effir-ray's own, see ``OwnSettings``
adapter_config.json                              PEFT's LoRA, see ``AdapterSettings``
modules.json, 1_Pooling/, sentence_bert_...      sentence-transformers' pooling, projection and prompts
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from effir_ray.config import Config, parse
from effir_ray.errors import InputError
from effir_ray.models.architecture import full_value, overrides
from effir_ray.models.weight_files import gguf_settings, model_tensors
from effir_ray.readers import quoted, read_json

MAX_LAYERS = 1024
MAX_WIDTH = 2**16
MAX_NEURONS = 2**20
MAX_VOCABULARY = 2**23

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "head_dim",
    "vocab_size",
    "num_hidden_layers",
)
_SLACK = 10**8  # parameters that a model may have beyond its files before it is not even built
_MAX_PATTERN = 200  # characters
# Repeated groups make a match's time exponential in the name's length, back-references and look-around help.
_UNSAFE_PATTERN = re.compile(r"\)\s*[*+?{]|\\[1-9]|\(\?(?!:)|(?:[*+?}].*){4}", re.DOTALL)

Layers = Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Field(strict=True, ge=1, le=MAX_WIDTH)]
Neurons = Annotated[int, Field(strict=True, ge=1, le=MAX_NEURONS)]
Index = Annotated[int, Field(strict=True, ge=0, lt=MAX_NEURONS)]
Heads = Annotated[int, Field(strict=True, ge=1, le=4096)]
Positions = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_WIDTH)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Base = Annotated[float, Field(strict=True, gt=0, le=1e12)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1e6)]
DTypeName = Annotated[str, Field(pattern=r"^(torch\.)?(float16|bfloat16|float32|float64)$")]


class _File(Config):
    """A file that other programs write too: keys that are not looked at are theirs."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


F = TypeVar("F", bound=_File)


def model_file(file: Path) -> dict[str, Any]:
    """config.json as transformers is to see it, checked; InputError where it is missing or does not fit."""
    found = _object(file)
    if found is None:
        raise InputError(f"{file}: no such file; expected a Hugging Face model folder")
    parse(found, ModelSettings, source=str(file))
    return {name: value for name, value in found.items() if name not in _OTHERS}


def read_settings(file: Path, kind: type[F]) -> F | None:
    """``file`` as a ``kind``; None where it does not exist, InputError where it does not fit."""
    found = _object(file)
    return None if found is None else parse(found, kind, source=str(file))


def _object(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file}: found {quoted(value)}; expected a JSON object")
    return value


class LayerSettings(_File):
    """One layer's entry of ``per_layer_config``."""

    skip: tuple[Literal["attention", "mlp"], ...] = ()
    intermediate_size: Neurons | None = None


class RopeSettings(_File):
    """``rope_parameters`` (``rope_scaling`` once): how positions turn queries and keys."""

    rope_type: str | None = Field(default=None, max_length=64)
    rope_theta: Base | None = None
    factor: Base | None = None
    attention_factor: Amount | None = None
    beta_fast: Amount | None = None
    beta_slow: Amount | None = None
    mscale: Amount | None = None
    mscale_all_dim: Amount | None = None
    low_freq_factor: Base | None = None
    high_freq_factor: Base | None = None
    partial_rotary_factor: Annotated[Share, Field(gt=0)] | None = None
    original_max_position_embeddings: Positions | None = None
    short_factor: tuple[Base, ...] | None = None
    long_factor: tuple[Base, ...] | None = None


def _by_kind(value: Any) -> Any:
    """Of models whose layers turn in several ways, one object a kind of layer."""
    if not isinstance(value, dict) or (value and all(isinstance(inner, dict) for inner in value.values())):
        return value
    return {"all": value}


Ropes = Annotated[dict[str, RopeSettings], BeforeValidator(_by_kind)]

_OTHERS = ("num_labels", "id2label", "label2id", "attn_implementation", "_attn_implementation")
"""Settings of config.json that are of no use to a headless model whose attention we choose."""


class ModelSettings(_File):
    """config.json: what decides how large a model is, and what a wrong value of breaks building it.

    A setting that is left out has transformers' default for the architecture.
    """

    model_type: str = Field(max_length=64)
    num_hidden_layers: Layers | None = None
    hidden_size: Width | None = None
    intermediate_size: Neurons | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(strict=True, ge=1, le=8192)] | None = None
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=MAX_VOCABULARY)] | None = None
    type_vocab_size: Annotated[int, Field(strict=True, ge=0, le=MAX_WIDTH)] | None = None
    max_position_embeddings: Positions | None = None
    pad_token_id: Annotated[int, Field(strict=True, ge=-1, le=MAX_VOCABULARY)] | None = None
    rms_norm_eps: Share | None = None
    layer_norm_eps: Share | None = None
    norm_eps: Share | None = None
    sliding_window: Positions | None = None
    local_attention: Positions | None = None
    max_window_layers: Count | None = None
    sliding_window_pattern: Count | None = None
    global_attn_every_n_layers: Count | None = None
    rope_theta: Base | None = None
    global_rope_theta: Base | None = None
    local_rope_theta: Base | None = None
    rope_local_base_freq: Base | None = None
    partial_rotary_factor: Annotated[Share, Field(gt=0)] | None = None
    rope_parameters: Ropes | None = None
    rope_scaling: Ropes | None = None
    query_pre_attn_scalar: Base | None = None
    attn_logit_softcapping: Base | None = None
    final_logit_softcapping: Base | None = None
    attention_dropout: Share | None = None
    attention_probs_dropout_prob: Share | None = None
    hidden_dropout_prob: Share | None = None
    embedding_dropout: Share | None = None
    mlp_dropout: Share | None = None
    classifier_dropout: Share | None = None
    initializer_range: Amount | None = None
    initializer_cutoff_factor: Amount | None = None
    chunk_size_feed_forward: Count | None = None
    pretraining_tp: Count | None = None
    num_labels: Count | None = None
    dtype: DTypeName | None = None
    torch_dtype: DTypeName | None = None
    quantization_config: None = None
    per_layer_config: dict[str, LayerSettings] | None = None

    @field_validator("quantization_config", mode="before")
    @classmethod
    def _is_not_quantised(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("quantised weights are not read; give the model that they were made from")

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSettings:
        width, heads, shared = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width and heads and self.head_dim is None and width % heads:
            raise ValueError(f"hidden_size {width} cannot be split into {heads} heads")
        if heads and shared and heads % shared:
            raise ValueError(f"{heads} attention heads cannot share {shared} key-value heads")
        if self.vocab_size and self.pad_token_id and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not in a vocabulary of {self.vocab_size}")
        for layer in self.per_layer_config or {}:
            depth = self.num_hidden_layers or MAX_LAYERS
            if not (layer.isascii() and layer.isdigit() and len(layer) < 6 and int(layer) < depth):
                raise ValueError(f"per_layer_config names layer {quoted(layer)} of {depth}")
        return self


class PlaceSettings(_File):
    """Which blocks of its backbone an ordinary checkpoint holds."""

    layers: tuple[Annotated[int, Field(strict=True, ge=0, lt=MAX_LAYERS)], ...]
    num_hidden_layers: Layers
    intermediate_size: Neurons
    layer_types: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _ascending(self) -> PlaceSettings:
        if not self.layers or any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError("layers must be at least one, in ascending order")
        if self.layers[-1] >= self.num_hidden_layers:
            raise ValueError(f"layer {self.layers[-1]} of {self.num_hidden_layers}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types of {self.num_hidden_layers} layers")
        return self


class OwnSettings(_File):
    """effir.json. ``format`` is raised when a reader of the present one would misread a file."""

    format: Literal[1]
    backbone: str | None = Field(default=None, max_length=4096)
    spec: dict[str, Any] = Field(default_factory=dict)
    neurons: dict[str, tuple[Index, ...]] = Field(default_factory=dict)
    place: PlaceSettings | None = None


class AdapterSettings(_File):
    """adapter_config.json of a LoRA adapter."""

    base_model_name_or_path: str = Field(min_length=1, max_length=4096)
    lora_alpha: float = Field(gt=0, le=10**6)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=10**6)]] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str | None = "none"

    @model_validator(mode="after")
    def _patterns_end(self) -> AdapterSettings:
        patterns = self.alpha_pattern or {}
        if len(patterns) > 1000:
            raise ValueError(f"alpha_pattern has {len(patterns)} entries; at most 1000 are tried")
        for pattern in patterns:
            check_pattern(pattern)
        return self


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a regular expression that is none, or whose matching may never end."""
    if len(pattern) > _MAX_PATTERN or _UNSAFE_PATTERN.search(pattern):
        raise ValueError(f"the pattern {quoted(pattern)} could be matched for ever; name modules")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise ValueError(f"the pattern {quoted(pattern)} is no regular expression") from None


class PoolingSettings(_File):
    """1_Pooling/config.json."""

    pooling_mode: str | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


IDENTITY = "torch.nn.modules.linear.Identity"


class DenseSettings(_File):
    """config.json of a sentence-transformers Dense, whose own defaults are a bias and Tanh."""

    in_features: Width
    out_features: Width
    bias: bool = Field(default=True, strict=True)
    activation_function: str = Field(default="torch.nn.modules.activation.Tanh", max_length=256)
    use_residual: bool = Field(default=False, strict=True)
    module_input_name: str = Field(default="sentence_embedding", max_length=256)
    module_output_name: str | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _is_a_matrix(self) -> DenseSettings:
        plain = self.activation_function in (IDENTITY, "torch.nn.Identity")
        if self.bias or self.use_residual or not plain:
            raise ValueError(
                "a Dense is read where it is a matrix alone: bias and use_residual false, "
                f"activation_function {IDENTITY}"
            )
        if {self.module_input_name, self.module_output_name} - {"sentence_embedding", None}:
            raise ValueError("a Dense is read where it takes and gives sentence_embedding")
        return self


class LengthSettings(_File):
    """sentence_bert_config.json."""

    max_seq_length: Annotated[int, Field(strict=True, ge=2, le=2**31)] | None = None


class PromptSettings(_File):
    """config_sentence_transformers.json."""

    prompts: dict[str, str | None] | None = None


def normalizes(file: Path) -> bool:
    """Whether modules.json, sentence-transformers' list of steps, ends with embeddings of length 1."""
    return any("Normalize" in kind for kind, _ in _steps(file))


def dense_place(file: Path) -> str | None:
    """The folder of the Dense in modules.json, beside it; None without one.

    Raises InputError unless it is one and stands between pooling and normalisation.
    """
    steps = _steps(file)
    kinds = [kind.rpartition(".")[2] for kind, _ in steps]
    if "Dense" not in kinds:
        return None
    if kinds[:3] != ["Transformer", "Pooling", "Dense"] or kinds[3:] not in ([], ["Normalize"]):
        raise InputError(
            f"{file}: its steps are {quoted(', '.join(kinds))}; a Dense is read between Pooling and Normalize"
        )
    place = steps[2][1]
    if not isinstance(place, str) or Path(place).name != place or place == "..":
        raise InputError(f"{file}: its Dense has path {quoted(place)}; expected the name of a folder")
    return place


def _steps(file: Path) -> list[tuple[str, Any]]:
    """(type, path) of every module; none where there is no file."""
    modules = read_json(file) if file.exists() else []
    listed = modules if isinstance(modules, list) else [None]
    kinds = [module.get("type") if isinstance(module, dict) else None for module in listed]
    if any(type(kind) is not str for kind in kinds):
        raise InputError(f"{file}: expected a list of modules, each with its type")
    return [(str(kind), module.get("path")) for kind, module in zip(kinds, listed, strict=True)]


def check_model_files(folder: Path, config: Any) -> None:
    """Raise InputError where weight files are damaged, or ``config`` asks for far more than they hold.

    Missing tensors would first be given memory and random values. Called before anything is built.
    """
    stored = sum(math.prod(tensor.shape) for tensor in model_tensors(folder).values())
    if (needed := _at_least(config)) > stored + _SLACK:
        raise InputError(
            f"{folder}: config.json describes {needed:.3g} parameters or more, the files hold {stored:.3g}; "
            "they are of different models"
        )


def _at_least(config: Any) -> int:
    """Parameters of the token embeddings, and of two matrices a sublayer that is there."""
    sizes = {name: int(full_value(config, name) or 0) for name in _SIZES}
    width, neurons, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    attention = heads * sizes["head_dim"] or width
    total, gone = sizes["vocab_size"] * width, overrides(config)
    for layer in range(sizes["num_hidden_layers"]):
        entry = gone.get(layer, {})
        skip = entry.get("skip", ())
        total += 0 if "attention" in skip else 2 * width * attention
        total += 0 if "mlp" in skip else 2 * width * (entry.get("intermediate_size") or neurons)
    return total


_GGUF_NEEDED = ("block_count", "embedding_length", "feed_forward_length")
_GGUF_BOUNDS = {
    "block_count": MAX_LAYERS,
    "embedding_length": MAX_WIDTH,
    "feed_forward_length": MAX_NEURONS,
    "vocab_size": MAX_VOCABULARY,
    "attention.head_count": 4096,
    "attention.head_count_kv": 4096,
}


def check_gguf_file(file: Path) -> None:
    """Raise InputError for a GGUF file whose header is damaged or describes no model that could be held.

    The converter takes a large model's sizes for what a file leaves out, and fills missing tensors.
    """
    found, elements = gguf_settings(file)
    settings = {name.partition(".")[2]: value for name, value in found.items()}
    for name, bound in _GGUF_BOUNDS.items():
        if name in settings and not 1 <= settings[name] <= bound:
            raise InputError(f"{file}: {name} is {settings[name]}; expected 1 to {bound}")
    missing = [name for name in _GGUF_NEEDED if name not in settings]
    if missing:
        raise InputError(f"{file}: lacks {', '.join(missing)}; expected a GGUF file of a language model")
    blocks, width, neurons = (settings[name] for name in _GGUF_NEEDED)
    if blocks * width * (width + 2 * neurons) > elements + _SLACK:  # queries, and an MLP without gate
        raise InputError(
            f"{file}: describes {blocks} blocks of width {width}, its tensors have {elements:.3g} elements"
        )
