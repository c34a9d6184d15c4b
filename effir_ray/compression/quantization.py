"""Quantisation on top of any retriever, compressed or not: the Linears inside the blocks.

``int8`` runs on CPUs: weights int8 an output channel, activations quantised a batch as they come (dynamic).
``nf4`` and ``llm-int8`` go through bitsandbytes: made for NVIDIA GPUs, also computed (slowly) on CPUs. NF4 is
what the paper puts on EffiR; ``llm-int8`` is LLM.int8() (Dettmers et al., 2022).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever

Quantization = Literal["int8", "nf4", "llm-int8"]


@dataclass(frozen=True, kw_only=True)
class StoredSize:
    """``disk_bytes``: one safetensors file with every tensor; ``memory_bytes``: the tensors themselves."""

    disk_bytes: int
    memory_bytes: int


def quantize(retriever: Retriever, method: Quantization) -> Retriever:
    """Replace the Linears inside the blocks, in place; embeddings and norms keep their precision.

    The result encodes but is not trained. Raises InputError when bitsandbytes is missing, or when ``int8`` is
    asked of a model that is not in float32 on the CPU (its kernels take nothing else).
    """
    if method == "int8":
        _dynamic_int8(retriever)
    else:
        _bitsandbytes(retriever, method)
    return retriever


def _dynamic_int8(retriever: Retriever) -> None:
    if retriever.model.device.type != "cpu" or retriever.model.dtype != torch.float32:
        found = f"{retriever.model.dtype} on {retriever.model.device}"
        raise InputError(f"int8 quantisation found a model in {found}; load it with dtype float32 on the CPU")
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, whose dynamic int8 is made for compiled and CUDA models; these
        # kernels (FBGEMM / oneDNN) are the fast ones in eager mode on CPUs.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        for layer in retriever.family.layers(retriever.model):
            quantize_dynamic(  # type: ignore[no-untyped-call]  # torch leaves it untyped
                layer, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True
            )


def _bitsandbytes(retriever: Retriever, method: Quantization) -> None:
    try:
        import bitsandbytes
    except ImportError:
        raise InputError(f"{method} quantisation needs bitsandbytes: pip install bitsandbytes") from None
    for name, linear in retriever.family.linears(retriever.model):
        new = _bitsandbytes_linear(bitsandbytes.nn, linear, method)
        retriever.model.set_submodule(name, new.to(linear.weight.device))


def _bitsandbytes_linear(library: Any, linear: nn.Linear, method: Quantization) -> nn.Module:
    """On the CPU and not quantised yet: bitsandbytes quantises weights when they move to their device."""
    shape, weight = (linear.in_features, linear.out_features), linear.weight.data.cpu()
    if method == "nf4":  # as in QLoRA: double quantisation; products in the model's own precision
        new = library.Linear4bit(*shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        new.weight = library.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        new = library.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        new.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    module: nn.Module = new
    return module


def measure_size(retriever: Retriever) -> StoredSize:
    """Size of the model as it is now, quantised or not; writes one temporary file of that size."""
    tensors = dict(_plain("", retriever.model.state_dict()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(tensors, file)
        disk = file.stat().st_size
    return StoredSize(disk_bytes=disk, memory_bytes=sum(tensor.nbytes for tensor in tensors.values()))


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state dict; a quantised one as its integers, scales and zero points."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _plain(f"{name}.{key}", entry)
    elif isinstance(value, tuple):
        for place, entry in enumerate(value):
            yield from _plain(f"{name}.{place}", entry)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{name}.integers", value.int_repr()
        yield f"{name}.scales", value.q_per_channel_scales().float()
        yield f"{name}.zero_points", value.q_per_channel_zero_points().to(torch.int32)
    elif isinstance(value, Tensor):
        yield name, value.detach().contiguous()
