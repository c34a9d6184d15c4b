"""Shorter embeddings: a matrix between pooling and normalisation. On disk, sentence-transformers' ``Dense``.

It is a part of the model in memory, ``model.projection``, so that it is moved, trained, gathered and watched
like any other weight (LoRA leaves it as it is). A plain AutoModel gives hidden states and does not know it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effir_ray.errors import InputError
from effir_ray.models.folder import read_dense
from effir_ray.models.settings import IDENTITY
from effir_ray.models.weight_files import safetensors_header
from effir_ray.readers import quoted

NAME = "projection"

_WEIGHT = "linear.weight"
_TYPES = ("F32", "F16", "BF16")


class Projection(nn.Linear):
    """(n, hidden) -> (n, dimension), in the type of what it is given: packed passes pool in float32."""

    def __init__(self, weight: Tensor) -> None:
        """``weight``: (dimension, hidden)."""
        dimension, hidden = weight.shape
        super().__init__(hidden, dimension, bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, pooled: Tensor) -> Tensor:
        return nn.functional.linear(pooled, self.weight.to(pooled.dtype))


def projection_of(model: nn.Module) -> Projection | None:
    """None of a model whose embeddings are as wide as its hidden states."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Projection) else None


def attach(model: Any, weight: Tensor) -> None:
    """Let ``weight``, (dimension, hidden), stand after the pooling of ``model``, in its type and place."""
    model.add_module(NAME, Projection(weight.detach().to(model.device, model.dtype).contiguous()))
    model.projection.train(model.training)


def write_dense(projection: Projection, folder: Path) -> None:
    """sentence-transformers' Dense in the new ``folder``."""
    folder.mkdir()
    settings = {
        "in_features": projection.in_features,
        "out_features": projection.out_features,
        "bias": False,
        "activation_function": IDENTITY,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file({_WEIGHT: projection.weight.detach().cpu().contiguous()}, folder / "model.safetensors")


def read_projection(folder: Path, hidden: int) -> Tensor | None:
    """(dimension, hidden): the matrix of a model folder's Dense; None where it has none.

    Raises InputError for a Dense that is more than a matrix, or of another model.
    """
    dense = read_dense(folder)
    if dense is None:
        return None
    place, settings = dense
    if settings.in_features != hidden:
        raise InputError(
            f"{place / 'config.json'}: in_features is {settings.in_features}, the model's hidden states have "
            f"{hidden}"
        )
    file = place / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: no such file; the matrix of a Dense is read from there (safetensors only)")
    found, shape = safetensors_header(file), (settings.out_features, hidden)
    weight = found.get(_WEIGHT)
    if len(found) != 1 or weight is None or weight.shape != shape or weight.dtype not in _TYPES:
        there = ", ".join(f"{name} {tensor.dtype} {tensor.shape}" for name, tensor in found.items())
        raise InputError(f"{file}: found {quoted(there)}; expected {_WEIGHT} alone, floats of shape {shape}")
    read: Tensor = load_file(file)[_WEIGHT]
    return read
