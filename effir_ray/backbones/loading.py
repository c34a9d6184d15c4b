"""Loading weights: strict about every tensor, safetensors only, with their tokenizer and pooling."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from effir_ray.backbones import architecture
from effir_ray.backbones import family as families
from effir_ray.backbones.folder import read_plan, read_spec
from effir_ray.backbones.registry import Source, cached_gguf_folder, resolve
from effir_ray.backbones.spec import RetrieverSpec
from effir_ray.backbones.tokenizers import load_tokenizer, with_eos
from effir_ray.compression.plan import Plan
from effir_ray.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    spec: RetrieverSpec
    plan: Plan


def load(name: str, *, dtype: torch.dtype, trust_remote_code: bool, first_blocks: int | None) -> Loaded:
    """See ``retriever.load_retriever``."""
    source = resolve(name)
    if source.kind == "random":
        return _load_random(source, dtype, first_blocks)
    folder = prepare(source)
    model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code, first_blocks=first_blocks)
    spec = read_spec(folder, families.get(model.config.model_type))
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    plan = read_plan(folder, model.config)
    return Loaded(model, with_eos(tokenizer) if spec.append_eos else tokenizer, spec, plan)


def _load_random(source: Source, dtype: torch.dtype, first_blocks: int | None) -> Loaded:
    from effir_ray.backbones.random_models import random_config, random_model, random_tokenizer

    config = random_config(source.model)
    if first_blocks is not None:
        config = architecture.cut_depth(config, first_blocks)
    family = families.get(config.model_type)
    tokenizer = random_tokenizer(family.causal)
    spec = RetrieverSpec(pooling=family.pooling, append_eos=family.causal)
    model = random_model(config, source.seed).to(dtype)
    plan = Plan.full(config.num_hidden_layers)
    return Loaded(model, with_eos(tokenizer) if spec.append_eos else tokenizer, spec, plan)


def prepare(source: Source) -> Path:
    """A Hugging Face folder for a source that is a folder or a GGUF file (dequantised once, then cached)."""
    assert source.path is not None
    return _dequantised(source.path) if source.kind == "gguf" else source.path


def read_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Raises InputError when there is no readable config.json or its architecture is not supported."""
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None
    model_type = str(settings.get("model_type"))
    families.get(model_type)
    own = architecture.compressed_classes()
    try:
        if model_type in own:
            return own[model_type].config_class.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"{file}: not a valid configuration: {' '.join(str(error).split())}") from None


def load_model(
    folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False, first_blocks: int | None = None
) -> PreTrainedModel:
    """The headless model of a folder. Raises InputError naming missing, unexpected and misshapen tensors."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    depth = config.num_hidden_layers
    if first_blocks is not None:
        config = architecture.cut_depth(config, first_blocks)
    try:
        with quiet_transformers():
            model, report = architecture.model_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **architecture.build_options(config),
            )
    except OSError as error:
        raise InputError(
            f"{folder}: cannot load weights (safetensors only): {' '.join(str(error).split())}"
        ) from None
    _check(folder, families.get(config.model_type), report, range(config.num_hidden_layers, depth))
    return model.eval()


def _check(folder: Path, family: families.Family, report: dict[str, Any], cut_layers: range) -> None:
    """``report`` is transformers' loading info; tensors of heads and of cut blocks may be left over."""
    expected = (*family.head_prefixes, *(f"{family.blocks}.{index}." for index in cut_layers))
    missing = sorted(report["missing_keys"])
    left_over = sorted(key for key in report["unexpected_keys"] if not _bare(key).startswith(expected))
    misshapen = [
        f"{key} ({tuple(found)}, expected {tuple(wanted)})"
        for key, found, wanted in report["mismatched_keys"]
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", left_over), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise InputError(f"{folder}: the tensors do not match config.json: {'; '.join(problems)}")


def _bare(key: str) -> str:
    """Tensor names of a checkpoint with a head carry the name of the model inside it."""
    return key.removeprefix("model.").removeprefix("bert.")


def _dequantised(path: Path) -> Path:
    target = cached_gguf_folder(path)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
            try:
                _convert_gguf(path, temporary)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert_gguf(path: Path, folder: Path) -> None:
    """Float32, so that nothing is lost on top of the file's own quantisation."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    try:
        # The converter's progress bar goes straight to stderr.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            model, report = AutoModel.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError:
        raise InputError(
            f"{path}: reading GGUF files needs the gguf package; run: pip install gguf"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a readable GGUF model: {' '.join(str(error).split())}") from None
    _check(path, families.get(model.config.model_type), report, range(0))
    # save_pretrained refuses a model that came from GGUF, although its weights are plain float32 by now.
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports: what they say is checked and raised here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
