"""A full model that computes as if sublayers were dropped, and forwards that start in the middle.

Nothing is changed but the ``forward`` of a few modules, and only inside a ``with`` block; surgery.py is
what drops sublayers for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effir_ray.compression.schedule import Unit
from effir_ray.models.family import Family, part
from effir_ray.models.retriever import Retriever

Sublayer = tuple[Unit, int]  # what, and of which layer


def sublayers(retriever: Retriever, unit: Unit) -> list[int]:
    """Layers that (still) have the unit; a block counts while it has one of its sublayers."""
    family, layers = retriever.family, retriever.family.layers(retriever.model)
    has_attention = [family.attention(layer) is not None for layer in layers]
    has_mlp = [family.mlp(layer) is not None for layer in layers]
    present = {
        "attention": has_attention,
        "mlp": has_mlp,
        "block": [a or m for a, m in zip(has_attention, has_mlp, strict=True)],
    }
    return [index for index, there in enumerate(present[unit]) if there]


@contextmanager
def masked(retriever: Retriever, dropped: Iterable[Sublayer]) -> Iterator[None]:
    """Inside, every dropped sublayer is the identity on the residual stream and costs next to nothing."""
    layers = retriever.family.layers(retriever.model)
    with ExitStack() as stack:
        for unit, index in dropped:
            for module, forward in _identity(retriever.family, layers[index], unit):
                stack.enter_context(_replaced(module, forward))
        yield


@contextmanager
def resumed(retriever: Retriever, start: int, hidden: Tensor) -> Iterator[None]:
    """Inside, a forward begins at block ``start``, which gets ``hidden`` (batch, tokens, hidden)."""
    layers = retriever.family.layers(retriever.model)
    with ExitStack() as stack:
        for layer in layers[:start]:
            stack.enter_context(_replaced(layer, lambda *args, **kwargs: hidden))
        yield


def _identity(family: Family, layer: nn.Module, unit: Unit) -> list[tuple[nn.Module, Callable[..., Any]]]:
    if unit == "block":
        return [(layer, _first)]
    names = family.attention_parts if unit == "attention" else family.mlp_parts
    module = part(layer, names[0])
    if module is None:  # already dropped
        return []
    if not family.post_norm:  # F(x) = 0; a norm after the sublayer keeps zeros zero
        return [(module, _zeros_and_weights if unit == "attention" else _zeros)]
    if unit == "attention":  # the last module gives the whole new stream: return the old one
        return [(module, lambda *args, **kwargs: (_first(*args, **kwargs), None))]
    last = part(layer, names[1])
    return [(module, _first)] + ([] if last is None else [(last, lambda neurons, stream: stream)])


def _first(*args: Any, **kwargs: Any) -> Tensor:
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(_first(*args, **kwargs))


def _zeros_and_weights(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _zeros(*args, **kwargs), None


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module(...)`` calls ``forward`` instead of its own; hooks on it stay."""
    before = module.__dict__.get("forward")  # an enclosing replacement, if any
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
