"""Reading weights: every tensor has its place, transformers' chatter is off, GGUF files become folders.

A GGUF file is dequantised once into an ordinary model folder in the cache, then loaded like any other.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from effir_ray.caches import cache_folder, file_hash
from effir_ray.errors import InputError
from effir_ray.leases import LEASES, aloud, lease
from effir_ray.models.family import Family, get
from effir_ray.models.settings import check_gguf_file


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers says nothing below the level of an error."""
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


def check_tensors(source: Path, report: Mapping[str, Any], family: Family, allowed: tuple[str, ...]) -> None:
    """``report`` is transformers' loading info. Tensors of heads and those whose names start with ``allowed``
    may be left over; a checkpoint with a head puts the name of the model inside it before theirs.

    Raises InputError naming missing, unexpected and misshapen tensors.
    """
    missing = sorted(report["missing_keys"])
    heads = (*family.head_prefixes, *allowed)
    left_over = sorted(
        key for key in report["unexpected_keys"] if not key.removeprefix(family.body_prefix).startswith(heads)
    )
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
        raise InputError(f"{source}: the tensors do not match config.json: {'; '.join(problems)}")


def dequantised(path: Path) -> Path:
    """The folder with the model of a GGUF file, converted at the first call and cached.

    Raises InputError when the file is not a GGUF model of a supported architecture.
    """
    check_gguf_file(path)
    target = cache_folder() / "gguf" / file_hash(path)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with lease(target.parent / LEASES, target.name, waiting=aloud(f"the conversion of {path}")) as mine:
        if not target.is_dir():
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
            try:
                _convert_gguf(path, temporary)
                mine.check()
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
    except Exception as error:  # the converter raises whatever a malformed file makes it raise
        raise InputError(f"{path}: not a readable GGUF model: {' '.join(str(error).split())}") from None
    check_tensors(path, report, get(model.config.model_type), ())
    # save_pretrained refuses a model that came from GGUF, although its weights are plain float32 by now.
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
