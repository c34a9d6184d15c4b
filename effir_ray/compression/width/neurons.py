"""Reading, gating and reordering the intermediate neurons of MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever


def mlps(retriever: Retriever) -> dict[int, nn.Module]:
    """The MLPs that are (still) there, by layer."""
    family = retriever.family
    found = ((index, family.mlp(layer)) for index, layer in enumerate(family.layers(retriever.model)))
    return {index: mlp for index, mlp in found if mlp is not None}


def widths(retriever: Retriever) -> dict[int, int]:
    """Neurons of every MLP that is there, by layer."""
    return {index: retriever.family.down(mlp).in_features for index, mlp in mlps(retriever).items()}


@contextmanager
def on_neurons(retriever: Retriever, change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, ``change(layer, neurons)`` sees what enters each down projection and may return what shall
    enter it.

    neurons: (..., width) = Act(W_gate x) * W_up x, or Act(W_up x) without a gate.
    """

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor] | None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            changed = change(index, args[0])
            return None if changed is None else (changed,)

        return before

    with ExitStack() as stack:
        for index, mlp in mlps(retriever).items():
            handle = retriever.family.down(mlp).register_forward_pre_hook(hook(index))
            stack.callback(handle.remove)
        yield


@contextmanager
def gated(retriever: Retriever, gates: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, neuron i is multiplied by relu(z_i) (paper section 3.2); gates: layer -> (width,)."""
    with on_neurons(retriever, lambda layer, neurons: neurons * gates[layer].relu().to(neurons.dtype)):
        yield


@contextmanager
def frozen(retriever: Retriever) -> Iterator[None]:
    """Inside, gradients flow through the model but to none of its weights; dropout is off."""
    model = retriever.model
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


def fresh_gates(retriever: Retriever) -> dict[int, Tensor]:
    """z = 1 for every neuron: the model unchanged. layer -> (width,) float32, trainable."""
    device = retriever.model.device
    return {
        layer: torch.ones(width, device=device, requires_grad=True)
        for layer, width in widths(retriever).items()
    }


@torch.no_grad()
def sort_neurons(retriever: Retriever, scores: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Reorder neurons in place, best first, so that every width is a prefix of one model.

    The order of neurons changes nothing but the order of a sum. Equal scores keep their order. Returns what
    moved where: layer -> (width,) indices of the old neurons. Raises InputError when the model was narrowed
    before (its plan counts neurons in the old order) or when a layer's scores do not fit.
    """
    if any(layer.neurons is not None for layer in retriever.plan.layers):
        raise InputError("the model's MLPs are narrowed already; sort the neurons of the full-width model")
    orders = {}
    for layer, mlp in mlps(retriever).items():
        width = retriever.family.down(mlp).in_features
        found = len(scores[layer]) if layer in scores else 0
        if found != width:
            raise InputError(f"layer {layer} has {width} neurons; found {found} scores")
        orders[layer] = np.argsort(-np.asarray(scores[layer], dtype=np.float64), kind="stable")
        _permute(retriever, mlp, torch.from_numpy(orders[layer]).to(retriever.model.device))
    return orders


def _permute(retriever: Retriever, mlp: nn.Module, order: Tensor) -> None:
    family = retriever.family
    down, up, gate = family.down(mlp), family.up(mlp), family.gate(mlp)
    down.weight.copy_(down.weight[:, order])
    rows = torch.cat([order, order + len(order)]) if family.fused else order
    for linear in dict.fromkeys((gate or up, up)):
        linear.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[rows])
