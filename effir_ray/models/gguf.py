"""GGUF files as ordinary model folders: dequantised once, then loaded like any other."""

from __future__ import annotations

import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from filelock import FileLock

from effir_ray.caches import cache_folder, file_hash
from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models.quiet import quiet_transformers
from effir_ray.models.strictness import check_tensors


def dequantised(path: Path) -> Path:
    """The folder with the model of a GGUF file, converted at the first call and cached.

    Raises InputError when the file is not a GGUF model of a supported architecture.
    """
    target = cache_folder() / "gguf" / file_hash(path)
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
    check_tensors(path, report, families.get(model.config.model_type).head_prefixes)
    # save_pretrained refuses a model that came from GGUF, although its weights are plain float32 by now.
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
