"""Ranking the intermediate neurons of all MLPs, by each width method a schedule can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from effir_ray.compression.calibration import (
    Batch,
    Pair,
    PairBatch,
    embed,
    make_pair_batches,
    pair_loss,
    run,
)
from effir_ray.compression.schedule import WidthMethod
from effir_ray.compression.width.neurons import fresh_gates, frozen, gated, mlps, on_neurons, widths
from effir_ray.compression.width.slimming import SlimmingConfig, train_gates
from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever


def rank_neurons(
    retriever: Retriever,
    method: WidthMethod,
    pairs: Sequence[Pair],
    *,
    steps: int = 500,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
) -> dict[int, np.ndarray]:
    """layer -> a score for every neuron, (width,) float, comparable over all layers; higher = keep.

    - ``self-slimming``: relu(z) after ``steps`` steps on ``pairs`` (slimming.py);
    - ``magnitude``: L2 norm of all weights of the neuron;
    - ``activation``: root mean square of Act(W_gate x) over the tokens of ``pairs`` (Act(W_up x) without a
      gate);
    - ``gate-activation``: the same of Act(W_gate x) * W_up x, all that the neuron passes on;
    - ``taylor``: |dL/dz| of the InfoNCE loss at z = 1, averaged over batches: first-order estimate of the
      loss change when the neuron goes (Molchanov et al., 2019);
    - ``random``: uniform, from ``seed``.

    The model is not changed. Raises InputError for an unknown method or when one that needs pairs finds
    fewer than 2.
    """
    if method not in get_args(WidthMethod):
        raise InputError(f"width method '{method}'; expected one of {', '.join(get_args(WidthMethod))}")
    if method == "random":
        generator = np.random.default_rng(seed)
        return {layer: generator.random(width) for layer, width in widths(retriever).items()}
    if method == "magnitude":
        return magnitude(retriever)
    if method == "self-slimming":
        config = SlimmingConfig(steps=steps, seed=seed, batch_size=batch_size, max_length=max_length)
        return train_gates(retriever, pairs, config).scores()
    batches = make_pair_batches(retriever, pairs, batch_size=batch_size, max_length=max_length)
    if method == "taylor":
        return taylor(retriever, batches)
    texts = (batch for pair in batches for batch in (pair.queries, pair.documents))
    return activation(retriever, texts) if method == "activation" else gate_activation(retriever, texts)


@torch.no_grad()
def magnitude(retriever: Retriever) -> dict[int, np.ndarray]:
    """sqrt(sum of squares of the neuron's rows in gate and up and its column in down), biases left out."""
    family = retriever.family
    scores = {}
    for layer, mlp in mlps(retriever).items():
        down, up, gate = family.down(mlp), family.up(mlp), family.gate(mlp)
        squares = down.weight.float().square().sum(dim=0)  # (width,)
        for linear in {up, gate or up}:
            rows = (
                linear.weight.float().square().sum(dim=1)
            )  # (width,), or (2 * width,) of a fused projection
            squares = squares + rows.reshape(-1, len(squares)).sum(dim=0)
        scores[layer] = squares.sqrt().cpu().numpy()
    return scores


@torch.inference_mode()
def activation(retriever: Retriever, batches: Iterable[Batch]) -> dict[int, np.ndarray]:
    """Root mean square of what each neuron's activation function puts out, over real tokens."""
    family = retriever.family
    sums = {layer: _Square(width) for layer, width in widths(retriever).items()}
    function = activation_function(retriever)
    real = torch.empty(0)  # the mask of the running batch

    def listen(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            gate = output[..., : sums[layer].width]  # a fused projection has the gate first
            sums[layer].add(function(gate), real)

        return after

    with ExitStack() as stack:
        for layer, mlp in mlps(retriever).items():
            linear = family.gate(mlp) or family.up(mlp)
            stack.callback(linear.register_forward_hook(listen(layer)).remove)
        for batch in batches:
            real = batch.attention_mask.bool()
            run(retriever, batch)
    return {layer: total.root_mean() for layer, total in sums.items()}


@torch.inference_mode()
def gate_activation(retriever: Retriever, batches: Iterable[Batch]) -> dict[int, np.ndarray]:
    """Root mean square of what each neuron passes to the down projection, over real tokens."""
    sums = {layer: _Square(width) for layer, width in widths(retriever).items()}
    real = torch.empty(0)  # the mask of the running batch

    def listen(layer: int, neurons: Tensor) -> None:
        sums[layer].add(neurons, real)

    with on_neurons(retriever, listen):
        for batch in batches:
            real = batch.attention_mask.bool()
            run(retriever, batch)
    return {layer: total.root_mean() for layer, total in sums.items()}


def taylor(retriever: Retriever, batches: Iterable[PairBatch]) -> dict[int, np.ndarray]:
    """Mean over batches of |dL/dz_i| at z = 1, L = InfoNCE."""
    gates = fresh_gates(retriever)
    totals = {layer: torch.zeros_like(gate) for layer, gate in gates.items()}
    count = 0
    with frozen(retriever), gated(retriever, gates):
        for batch in batches:
            loss = pair_loss(embed(retriever, batch.queries), embed(retriever, batch.documents), batch.same)
            gradients = torch.autograd.grad(loss, list(gates.values()))
            for layer, gradient in zip(gates, gradients, strict=True):
                totals[layer] += gradient.abs()
            count += 1
    return {layer: (total / count).cpu().numpy() for layer, total in totals.items()}


def activation_function(retriever: Retriever) -> Callable[[Tensor], Tensor]:
    """Of the MLPs; Gemma and ModernBERT call it ``hidden_activation``, the others ``hidden_act``."""
    from transformers.activations import ACT2FN

    config = retriever.model.config
    function: Callable[[Tensor], Tensor] = ACT2FN[
        getattr(config, "hidden_activation", None) or config.hidden_act
    ]
    return function


class _Square:
    """Streams the mean square of every neuron in float64."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.total = np.zeros(width)
        self.tokens = 0

    def add(self, neurons: Tensor, real: Tensor) -> None:
        """neurons: (batch, tokens, width); real: bool (batch, tokens)."""
        chosen = neurons[real.to(neurons.device)].float()  # (real tokens, width)
        self.total += chosen.square().sum(dim=0, dtype=torch.float64).cpu().numpy()
        self.tokens += len(chosen)

    def root_mean(self) -> np.ndarray:
        return np.sqrt(self.total / max(self.tokens, 1))
