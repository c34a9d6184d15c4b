"""The uncompressed model made to compute like a compressed one, by hooks that multiply with 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effir_ray.models.family import part
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import Retriever


def randomise_norms(model: nn.Module) -> None:
    """Fresh norms are all ones and zeros, which hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        assert parameter.isfinite().all(), name


@contextmanager
def masked_by_hooks(retriever: Retriever, plan: Plan) -> Iterator[None]:
    family, handles = retriever.family, []
    for layer, kept in zip(family.layers(retriever.model), plan.layers, strict=True):
        if not kept.attention:
            attention = part(layer, family.attention_parts[0])
            assert attention is not None
            hook = _keep_stream_of_attention if family.post_norm else _zero_attention
            handles.append(attention.register_forward_hook(hook, with_kwargs=True))
        if not kept.mlp:
            last = part(layer, family.mlp_parts[1] if family.post_norm else family.mlp_parts[0])
            assert last is not None
            handles.append(last.register_forward_hook(_keep_stream if family.post_norm else _zero))
        if kept.mlp and kept.neurons is not None:
            down = family.down(family.mlp(layer) or layer)
            mask = torch.zeros(down.in_features)
            mask[list(kept.neurons)] = 1.0
            handles.append(down.register_forward_pre_hook(_masker(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.0


def _zero_attention(
    module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    return output[0] * 0.0, output[1]


def _keep_stream(module: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
    return output * 0.0 + args[1]  # BertOutput(neurons, stream)


def _keep_stream_of_attention(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: Any, output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    return output[0] * 0.0 + args[0], output[1]


def _masker(mask: Tensor) -> Any:
    return lambda module, args: (args[0] * mask,)
