"""Importance of a sublayer as the angle it turns the residual stream by: one pass for all sublayers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effir_ray.compression.calibration import Batch, run
from effir_ray.compression.depth.masking import UNITS, Unit
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.retriever import Retriever

View = Callable[[Tensor], Tensor]
"""What of the stream is compared: (batch, tokens, hidden) -> (vectors, hidden)."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Per-batch sums that add up in any number of workers.

    totals: (3, layers) float64, rows in the order of UNITS; weight: what they are to be divided by in the
    end.
    """

    totals: np.ndarray
    weight: float


def mean(parts: list[Sums]) -> np.ndarray:
    """(3, layers) float64. Parts come in batch order: one result for any number of workers.

    Raises InputError when there was nothing to measure, TrialFailure when a score is not finite.
    """
    if not parts:
        raise InputError("the calibration texts have no tokens; give texts of at least one character")
    totals: np.ndarray = np.sum([part.totals for part in parts], axis=0)
    if not np.isfinite(totals).all():
        raise TrialFailure(
            "importance is not a finite number; the model's hidden states overflow or hold NaN"
        )
    return totals / sum(part.weight for part in parts)


def token_angles(retriever: Retriever, batch: Batch) -> Sums:
    """Sums over real tokens, never over padding, of S = 1 - cos(x, x + F(x)) (the paper's importance)."""
    real = batch.attention_mask.bool().to(retriever.model.device)  # (batch, tokens)
    return _angles(retriever, batch, lambda stream: stream[real])


def pooled_angles(retriever: Retriever, batch: Batch) -> Sums:
    """The same on text vectors: 1 - cos(pool(x), pool(x + F(x))), with the retriever's own pooling."""
    mask = batch.attention_mask.to(retriever.model.device)
    return _angles(retriever, batch, lambda stream: retriever.pool(stream, mask))


@torch.inference_mode()
def _angles(retriever: Retriever, batch: Batch, view: View) -> Sums:
    """One forward; only one block's stream is held at a time."""
    layers = len(retriever.family.layers(retriever.model))
    totals = np.zeros((len(UNITS), layers))
    weight = 0

    def add(index: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        nonlocal weight
        turned = 1.0 - cosine_similarity(view(before).float(), view(after).float(), dim=-1)  # (vectors,)
        totals[UNITS.index(unit), index] += turned.sum(dtype=torch.float64).item()
        weight = len(turned)

    with retriever.family.watch(retriever.model, add):
        run(retriever, batch)
    return Sums(totals=totals, weight=weight)
