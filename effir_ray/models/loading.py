"""Loading weights: strict about every tensor, safetensors only, with their tokenizer and pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from effir_ray.errors import InputError
from effir_ray.models import architecture
from effir_ray.models import family as families
from effir_ray.models.folder import (
    OWN_FILE,
    RetrieverSpec,
    base_of_adapter,
    is_adapter,
    present_plan,
    read_adapter,
    read_dense,
    read_place,
    read_plan,
    read_spec,
)
from effir_ray.models.foreign import (
    EFFIR_SPEC,
    has_drop_lists,
    merge_lora,
    read_drop_lists,
    replace_embedding,
)
from effir_ray.models.known_configs import KNOWN_CONFIGS
from effir_ray.models.names import Source, resolve
from effir_ray.models.ordinary import kept_blocks, ordinary_config, restore_config, restore_model
from effir_ray.models.plan import Plan
from effir_ray.models.projection import attach, read_projection
from effir_ray.models.random_models import random_config, random_model, random_tokenizer
from effir_ray.models.settings import check_model_files, model_file
from effir_ray.models.tokenizers import load_tokenizer, with_eos
from effir_ray.models.weights import check_tensors, dequantised, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DType = torch.dtype | str  # "auto": as stored


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    spec: RetrieverSpec
    plan: Plan


def load(name: str, *, dtype: DType, trust_remote_code: bool, first_blocks: int | None) -> Loaded:
    """See ``retriever.load_retriever``."""
    source = resolve(name)
    if source.kind == "random":
        return _load_random(source, dtype, first_blocks)
    folder = prepare(source)
    if is_adapter(folder):
        return _load_adapter(folder, dtype, trust_remote_code, first_blocks)
    model = load_model(folder, dtype=dtype, first_blocks=first_blocks)
    projection = read_projection(folder, model.config.hidden_size)
    if projection is not None:
        attach(model, projection)
    spec = read_spec(folder, families.get(model.config.model_type))
    return Loaded(
        model=model,
        tokenizer=load_tokenizer(folder, append_eos=spec.append_eos, trust_remote_code=trust_remote_code),
        spec=spec,
        plan=read_plan(folder, model.config),
    )


def _load_random(source: Source, dtype: DType, first_blocks: int | None) -> Loaded:
    config = random_config(source.model)
    if first_blocks is not None:
        config = architecture.cut_depth(config, first_blocks)
    family = families.get(config.model_type)
    tokenizer = random_tokenizer(family.causal)
    spec = RetrieverSpec(pooling=family.pooling, append_eos=family.causal)
    model = random_model(config, source.seed)
    if not isinstance(dtype, str):
        model = model.to(dtype)
    plan = Plan.full(config.num_hidden_layers)
    return Loaded(model, with_eos(tokenizer) if spec.append_eos else tokenizer, spec, plan)


def prepare(source: Source) -> Path:
    """A Hugging Face folder for a source that is a folder or a GGUF file."""
    assert source.path is not None
    return dequantised(source.path) if source.kind == "gguf" else source.path


def read_config(folder: Path) -> PreTrainedConfig:
    """A compressed configuration where the folder's config.json says that sublayers or neurons are gone.

    Remote code is never run: supported architectures are transformers' own. Raises InputError when there is
    no readable config.json or its architecture is not supported.
    """
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    found = model_file(file)
    model_type = found["model_type"]
    families.get(model_type)
    own = architecture.compressed_classes()
    try:
        if model_type in own:
            return own[model_type].config_class.from_dict(found)
        config = CONFIG_MAPPING[model_type].from_dict(found, name_or_path=str(folder))
    except Exception as error:  # transformers validates with many exception types
        raise InputError(f"{file}: not a valid configuration: {' '.join(str(error).split())}") from None
    place = read_place(folder)
    return (
        read_drop_lists(config, file) if place is None else restore_config(config, place, folder / OWN_FILE)
    )


def load_model(folder: Path, *, dtype: DType, first_blocks: int | None = None) -> PreTrainedModel:
    """The headless model of a folder. Raises InputError naming missing, unexpected and misshapen tensors."""
    whole = read_config(folder)
    config = whole if first_blocks is None else architecture.cut_depth(whole, first_blocks)
    stored, layers = config, None
    if read_place(folder) is not None:
        present = present_plan(config)
        stored, layers = ordinary_config(config, present), kept_blocks(present)
    check_model_files(folder, stored)
    try:
        with quiet_transformers():
            model, report = architecture.model_class(stored).from_pretrained(
                folder,
                config=stored,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **architecture.build_options(stored),
            )
    except (
        *(OSError, ValueError, LookupError, RuntimeError, SafetensorError),
        *(TypeError, AttributeError),  # a setting that we do not know, of the wrong type
    ) as error:  # LookupError: an activation function that there is none of
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{folder}: cannot load weights (safetensors only): {reason}") from None
    family = families.get(config.model_type)
    check_tensors(folder, report, family, _left_over(family, whole, config, stored))
    if layers is not None:
        restore_model(model, config, layers)
    return model.eval()


def _left_over(
    family: families.Family, whole: PreTrainedConfig, config: PreTrainedConfig, stored: PreTrainedConfig
) -> tuple[str, ...]:
    """Prefixes of tensors that a checkpoint may hold without a place for them: blocks of the ``whole`` model
    after those of ``config``, which the file calls ``stored``, and, where only lists of dropped layers were
    added to a full checkpoint (LLM-Drop), the dropped sublayers.
    """
    cut = [f"{family.blocks}.{index}." for index in range(stored.num_hidden_layers, whole.num_hidden_layers)]
    if has_drop_lists(whole):
        for index, entry in architecture.overrides(whole).items():
            for kind in entry.get("skip", ()):
                parts = family.attention_parts if kind == "attention" else family.mlp_parts
                cut += [f"{family.blocks}.{index}.{name}." for name in parts]
    return tuple(cut)


def load_text_side(name_or_path: str | Path) -> tuple[PreTrainedTokenizerFast, RetrieverSpec]:
    """Tokenizer, pooling and prompts of a model, without its weights where they are files apart."""
    source = resolve(str(name_or_path))
    if source.kind == "random" or is_adapter(folder := prepare(source)):
        loaded = load(str(name_or_path), dtype="auto", trust_remote_code=False, first_blocks=None)
        return loaded.tokenizer, loaded.spec
    spec = read_spec(folder, families.get(read_config(folder).model_type))
    return load_tokenizer(folder, append_eos=spec.append_eos, trust_remote_code=False), spec


def load_config(name_or_path: str | Path, *, first_blocks: int | None = None) -> PreTrainedConfig:
    """Configuration without weights; without network for packaged, random, local and shipped names.

    For a compressed checkpoint it is that of the compressed model, ``per_layer_config`` included.
    """
    config = _config(str(name_or_path))
    return config if first_blocks is None else architecture.cut_depth(config, first_blocks)


def load_present(name_or_path: str | Path, *, first_blocks: int | None = None) -> Plan:
    """What a model has left, of its layers and of its embeddings, without weights; see ``load_config``."""
    name = str(name_or_path)
    plan = present_plan(load_config(name, first_blocks=first_blocks))
    source = None if name in KNOWN_CONFIGS else resolve(name)
    if source is None or source.path is None or (dense := read_dense(prepare(source))) is None:
        return plan
    return plan.model_copy(update={"dimension": dense[1].out_features})


def _config(name: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    if name in KNOWN_CONFIGS:
        return AutoConfig.for_model(**KNOWN_CONFIGS[name])
    source = resolve(name)
    if source.kind == "random":
        return random_config(source.model)
    return read_config(prepare(source))


def _load_adapter(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool, first_blocks: int | None
) -> Loaded:
    """A LoRA adapter merged into its base model. Raises InputError when they do not fit each other."""
    settings = read_adapter(folder)
    base = base_of_adapter(folder)
    loaded = load(
        base,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        first_blocks=first_blocks,
    )
    merge_lora(loaded.model, folder, settings, _numbering(base, loaded.model.config))
    embedding = folder / "embedding" / "input_emb.pth"
    if not embedding.is_file():
        return loaded
    replace_embedding(loaded.model, embedding)
    tokenizer = loaded.tokenizer
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder, append_eos=True, trust_remote_code=trust_remote_code)
    return replace(loaded, tokenizer=tokenizer, spec=EFFIR_SPEC)


def _numbering(base: str, config: PreTrainedConfig) -> dict[str, str]:
    """How an adapter's names of blocks begin -> how ours do: on an ordinary checkpoint it counts anew."""
    source = resolve(base)
    place = None if source.path is None or source.kind != "folder" else read_place(source.path)
    blocks = families.get(config.model_type).blocks
    layers = [] if place is None else place["layers"]
    return {f"{blocks}.{number}.": f"{blocks}.{layer}." for number, layer in enumerate(layers)}
