"""Self-slimming: trained gates tell which neurons a retriever can do without (paper section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from effir_ray.compression.calibration import Pair, PairBatch, check_pairs, embed, pair_batch, pair_loss
from effir_ray.compression.width.neurons import fresh_gates, frozen, gated
from effir_ray.config import Config
from effir_ray.errors import TrialFailure
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress


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
    return pair_loss(queries, documents, batch.same) + config.penalty * sparsity_penalty(gates, config.beta)


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
