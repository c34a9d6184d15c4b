"""Importance measured by removal: what the whole model loses without a sublayer.

Every candidate at layer l shares the layers before l with the model it is taken from, so a forward for it
starts at the cached input of block l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effir_ray.compression.calibration import Batch, PairBatch, embed, pair_loss
from effir_ray.compression.depth.masking import UNITS, Sublayer, Unit, masked, resumed, sublayers
from effir_ray.compression.depth.similarity import Sums
from effir_ray.models.retriever import Retriever

Evaluate = Callable[[frozenset[Sublayer], list[int]], np.ndarray]
"""(already dropped, candidate layers) -> damage of dropping each candidate as well, (candidates,)."""


@torch.inference_mode()
def without_each(
    retriever: Retriever, batch: Batch, candidates: Iterable[Sublayer], dropped: Iterable[Sublayer] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Text vectors without ``dropped``, and without ``dropped`` and each candidate; (batch, hidden) each."""
    inputs: dict[int, Tensor] = {}

    def keep(index: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        if unit == "block":
            inputs[index] = before

    with masked(retriever, dropped):
        with retriever.family.watch(retriever.model, keep):
            base = embed(retriever, batch)
        vectors = []
        for unit, layer in candidates:
            with masked(retriever, [(unit, layer)]), resumed(retriever, layer, inputs[layer]):
                vectors.append(embed(retriever, batch))
    return base, vectors


@torch.inference_mode()
def removal_distances(
    retriever: Retriever,
    batch: Batch,
    *,
    unit: Unit,
    dropped: frozenset[Sublayer],
    candidates: tuple[int, ...],
) -> Sums:
    """Sums over texts of 1 - cos(vector of the full model, vector without ``dropped`` and the candidate).

    totals: (candidates,).
    """
    full = embed(retriever, batch).float()
    _, vectors = without_each(retriever, batch, [(unit, layer) for layer in candidates], dropped)
    distances = [
        (1.0 - cosine_similarity(full, vector.float(), dim=-1)).double().sum().item() for vector in vectors
    ]
    return Sums(totals=np.array(distances), weight=len(batch))


def greedy_order(layers: list[int], unit: Unit, evaluate: Evaluate) -> list[int]:
    """Drop the candidate whose loss hurts least, score what remains again, until one is left.

    Returns the layers in the order in which they go; the last one is the most important.
    """
    order: list[int] = []
    remaining = list(layers)
    while len(remaining) > 1:
        damage = evaluate(frozenset((unit, layer) for layer in order), remaining)
        order.append(remaining.pop(int(np.argmin(damage))))
    return order + remaining


@torch.inference_mode()
def loss_increases(retriever: Retriever, batch: PairBatch) -> Sums:
    """Sums over pairs of (InfoNCE without the sublayer - InfoNCE of the full model); totals (3, layers)."""
    layers = len(retriever.family.layers(retriever.model))
    candidates = [(unit, layer) for unit in UNITS for layer in sublayers(retriever, unit)]
    queries, other_queries = without_each(retriever, batch.queries, candidates)
    documents, other_documents = without_each(retriever, batch.documents, candidates)
    base = pair_loss(queries, documents, batch.same).item()
    totals = np.zeros((len(UNITS), layers))
    for (unit, layer), query, document in zip(candidates, other_queries, other_documents, strict=True):
        increase = pair_loss(query, document, batch.same).item() - base
        totals[UNITS.index(unit), layer] = increase * len(batch)
    return Sums(totals=totals, weight=len(batch))
