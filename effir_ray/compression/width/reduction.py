"""Ranking the intermediate neurons of all MLPs, by each width method a schedule can name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from effir_ray.compression.calibration import (
    PairBatch,
    check_pairs,
    make_pair_batches,
    pair_batch,
    pair_loss,
)
from effir_ray.compression.schedule import WidthMethod
from effir_ray.compression.width.neurons import fresh_gates, frozen, gated, mlps, on_neurons, widths
from effir_ray.config import Config
from effir_ray.data.pairs import Pair
from effir_ray.encoding.padded import PaddedTexts, embed, hidden_states
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress


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

    - ``self-slimming``: relu(z) after ``steps`` steps on ``pairs`` (``train_gates``);
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
        for linear in dict.fromkeys((gate or up, up)):
            rows = (
                linear.weight.float().square().sum(dim=1)
            )  # (width,), or (2 * width,) of a fused projection
            squares = squares + rows.reshape(-1, len(squares)).sum(dim=0)
        scores[layer] = squares.sqrt().cpu().numpy()
    return scores


@torch.inference_mode()
def activation(retriever: Retriever, batches: Iterable[PaddedTexts]) -> dict[int, np.ndarray]:
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
            hidden_states(retriever, batch)
    return {layer: total.root_mean() for layer, total in sums.items()}


@torch.inference_mode()
def gate_activation(retriever: Retriever, batches: Iterable[PaddedTexts]) -> dict[int, np.ndarray]:
    """Root mean square of what each neuron passes to the down projection, over real tokens."""
    sums = {layer: _Square(width) for layer, width in widths(retriever).items()}
    real = torch.empty(0)  # the mask of the running batch

    def listen(layer: int, neurons: Tensor) -> None:
        sums[layer].add(neurons, real)

    with on_neurons(retriever, listen):
        for batch in batches:
            real = batch.attention_mask.bool()
            hidden_states(retriever, batch)
    return {layer: total.root_mean() for layer, total in sums.items()}


def taylor(retriever: Retriever, batches: Iterable[PairBatch]) -> dict[int, np.ndarray]:
    """Mean over batches of |dL/dz_i| at z = 1, L = InfoNCE."""
    gates = fresh_gates(retriever)
    totals = {layer: torch.zeros_like(gate) for layer, gate in gates.items()}
    count = 0
    with frozen(retriever), gated(retriever, gates):
        for batch in batches:
            queries, documents = embed(retriever, batch.queries), embed(retriever, batch.documents)
            loss = pair_loss(queries, documents, batch.allowed)
            gradients = torch.autograd.grad(loss, list(gates.values()))
            for layer, gradient in zip(gates, gradients, strict=True):
                totals[layer] += gradient.abs()
            count += 1
    return {layer: (total / count).cpu().numpy() for layer, total in totals.items()}


def activation_function(retriever: Retriever) -> Callable[[Tensor], Tensor]:
    """Of the MLPs; Gemma and ModernBERT call it ``hidden_activation``, the others ``hidden_act``."""
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


class SlimmingConfig(Config):
    """Steps, beta and lambda are the paper's; optimiser and learning rate (Adam, 0.01) are ours."""

    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=0.01, gt=0)
    beta: float = Field(default=5.0, gt=0)
    penalty: float = Field(default=1e-8, ge=0)
    max_length: int | None = Field(default=None, ge=1)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Slimming:
    """gates: layer -> z, (width,) float32; losses: InfoNCE + penalty of every step."""

    gates: dict[int, Tensor]
    losses: tuple[float, ...]

    def scores(self) -> dict[int, np.ndarray]:
        """relu(z), what the global ranking compares: layer -> (width,)."""
        return {layer: gate.relu().cpu().numpy() for layer, gate in self.gates.items()}


def sparsity_penalty(gates: Mapping[int, Tensor], beta: float) -> Tensor:
    """R(z) = sum_i sigmoid(beta * |z_i|) over all gates."""
    return torch.stack([torch.sigmoid(beta * gate.abs()).sum() for gate in gates.values()]).sum()


def slimming_loss(
    retriever: Retriever, batch: PairBatch, gates: Mapping[int, Tensor], config: SlimmingConfig
) -> Tensor:
    """L = InfoNCE + lambda * R(z) of the gated model."""
    with gated(retriever, gates):
        queries, documents = embed(retriever, batch.queries), embed(retriever, batch.documents)
    penalty = config.penalty * sparsity_penalty(gates, config.beta)
    return pair_loss(queries, documents, batch.allowed) + penalty


def train_gates(retriever: Retriever, pairs: Sequence[Pair], config: SlimmingConfig) -> Slimming:
    """Train one gate a neuron, everything else frozen. The model is afterwards as it was, bit for bit.

    Raises InputError for fewer than 2 pairs, TrialFailure when the loss stops being a number.
    """
    check_pairs(pairs)
    gates = fresh_gates(retriever)
    optimizer = torch.optim.Adam(gates.values(), lr=config.learning_rate)
    losses = []
    with frozen(retriever), progress("Slimming", total=config.steps, unit="steps") as bar:
        for chosen in _batches(pairs, config):
            batch = pair_batch(retriever, chosen, max_length=config.max_length)
            loss = slimming_loss(retriever, batch, gates, config)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrialFailure(f"self-slimming: the loss became {losses[-1]} at step {len(losses)}")
            bar.advance(loss=losses[-1])
    return Slimming(gates={layer: gate.detach() for layer, gate in gates.items()}, losses=tuple(losses))


def _batches(pairs: Sequence[Pair], config: SlimmingConfig) -> Iterator[list[Pair]]:
    """``steps`` batches of different pairs, drawn from one seeded shuffle after the other."""
    generator = np.random.default_rng(config.seed)
    size = min(config.batch_size, len(pairs))
    order = np.empty(0, dtype=np.int64)
    for _ in range(config.steps):
        if len(order) < size:
            order = generator.permutation(len(pairs))
        yield [pairs[index] for index in order[:size]]
        order = order[size:]
