"""How much every sublayer matters, by each criterion a schedule can name.

Two kinds of evidence: the angle by which a sublayer turns the residual stream (one pass tells it of all
sublayers), and what the whole model loses without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effir_ray.compression.calibration import PairBatch, make_batches, make_pair_batches, pair_loss
from effir_ray.compression.depth.masking import Sublayer, masked, resumed, sublayers
from effir_ray.compression.planning import ImportanceScores
from effir_ray.compression.schedule import UNITS, Criterion, Unit
from effir_ray.data.pairs import Pair
from effir_ray.encoding.padded import PaddedTexts, embed, hidden_states
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress

B = TypeVar("B")
View = Callable[[Tensor], Tensor]
"""What of the stream is compared: (batch, tokens, hidden) -> (vectors, hidden)."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What one batch adds. totals: (3, layers) float64, rows in the order of UNITS (``removal_distances``:
    (candidates,)); weight: what the sum of all totals is divided by in the end.
    """

    totals: np.ndarray
    weight: float


def measure_importance(
    retriever: Retriever,
    texts: Sequence[str] = (),
    *,
    criterion: Criterion = "cosine",
    queries: Sequence[str] = (),
    pairs: Sequence[Pair] = (),
    token_budget: int = 4096,
    max_length: int | None = None,
    seed: int = 0,
) -> ImportanceScores:
    """A score for every attention, MLP and block; higher = keep.

    - ``cosine``: 1 - cos(x, x + F(x)) averaged over the tokens of ``texts`` (the paper's);
    - ``pooled``: the same on text vectors, over ``texts`` and ``queries`` (each with its own prompt);
    - ``greedy``: drop the sublayer whose removal moves the final vectors of ``texts`` and ``queries``
      least, score again, and so on in each group; the score is the place in that order, (1 .. n) / n;
    - ``dev-loss``: InfoNCE on ``pairs`` without the sublayer minus that of the full model;
    - ``random``: uniform, from ``seed``.

    Texts are handled in padded batches of ``token_budget`` tokens; memory does not grow with their number.
    Sublayers that were already dropped score 0.
    Raises InputError for an unknown criterion or when its texts or pairs are missing.
    """
    if criterion not in get_args(Criterion):
        raise InputError(
            f"importance criterion '{criterion}'; expected one of {', '.join(get_args(Criterion))}"
        )
    if criterion == "random":
        scores = np.random.default_rng(seed).random(
            (len(UNITS), len(retriever.family.layers(retriever.model)))
        )
        return _result(criterion, scores)
    documents = partial(make_batches, retriever, token_budget=token_budget, max_length=max_length)

    def all_texts() -> Iterable[PaddedTexts]:
        return chain(documents(texts), documents(queries, kind="query"))

    if criterion == "dev-loss":
        pair_batches = make_pair_batches(retriever, pairs, max_length=max_length)
        return _result(criterion, _mean(partial(loss_increases, retriever), pair_batches))
    if not texts:
        raise InputError(f"importance by '{criterion}' needs calibration texts; found none")
    if criterion == "cosine":
        return _result(criterion, _mean(partial(token_angles, retriever), documents(texts)))
    if criterion == "pooled":
        return _result(criterion, _mean(partial(pooled_angles, retriever), all_texts()))
    return _result(criterion, np.stack([_greedy(retriever, all_texts, unit) for unit in UNITS]))


def _greedy(retriever: Retriever, batches: Callable[[], Iterable[PaddedTexts]], unit: Unit) -> np.ndarray:
    """(layers,) place of each layer in the greedy order, scaled to (0, 1]."""

    def evaluate(dropped: list[int], candidates: list[int]) -> np.ndarray:
        probe = partial(removal_distances, retriever, unit=unit, dropped=dropped, candidates=candidates)
        return _mean(probe, batches())

    order = greedy_order(sublayers(retriever, unit), evaluate)
    scores = np.zeros(len(retriever.family.layers(retriever.model)))
    scores[order] = np.arange(1, len(order) + 1) / len(order)
    return scores


def _mean(measure: Callable[[B], Sums], batches: Iterable[B]) -> np.ndarray:
    """Mean of what ``measure`` sums over batches, float64.

    Raises InputError when there was nothing to measure, TrialFailure when a score is not finite.
    """
    parts = []
    with progress("Scoring sublayers", unit="batches") as bar:
        for batch in batches:
            parts.append(measure(batch))
            bar.advance()
    if not parts:
        raise InputError("there is nothing to measure importance on; give at least one text")
    totals: np.ndarray = np.sum([part.totals for part in parts], axis=0)
    if not np.isfinite(totals).all():
        raise TrialFailure(
            "importance is not a finite number; the model's hidden states overflow or hold NaN"
        )
    return totals / sum(part.weight for part in parts)


def _result(criterion: Criterion, scores: np.ndarray) -> ImportanceScores:
    attention, mlp, block = (tuple(float(value) for value in row) for row in scores)
    return ImportanceScores(criterion=criterion, attention=attention, mlp=mlp, block=block)


def token_angles(retriever: Retriever, batch: PaddedTexts) -> Sums:
    """Sums over real tokens, never over padding, of S = 1 - cos(x, x + F(x)) (the paper's importance)."""
    real = batch.attention_mask.bool().to(retriever.model.device)  # (batch, tokens)
    return _angles(retriever, batch, lambda stream: stream[real])


def pooled_angles(retriever: Retriever, batch: PaddedTexts) -> Sums:
    """The same on text vectors: 1 - cos(pool(x), pool(x + F(x))), with the retriever's own pooling."""
    mask = batch.attention_mask.to(retriever.model.device)
    return _angles(retriever, batch, lambda stream: retriever.pool(stream, mask))


@torch.inference_mode()
def _angles(retriever: Retriever, batch: PaddedTexts, view: View) -> Sums:
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
        hidden_states(retriever, batch)
    return Sums(totals=totals, weight=weight)


@torch.inference_mode()
def without_each(
    retriever: Retriever, batch: PaddedTexts, candidates: Iterable[Sublayer], dropped: Iterable[Sublayer] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Text vectors without ``dropped``, and without ``dropped`` and each candidate; (batch, hidden) each.

    A candidate at layer l shares the layers before l with the model it is taken from, so its forward starts
    at the cached input of block l.
    """
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
    batch: PaddedTexts,
    *,
    unit: Unit,
    dropped: Sequence[int],
    candidates: Sequence[int],
) -> Sums:
    """Sums over texts of 1 - cos(vector of the full model, vector without the unit in the layers ``dropped``
    and in the candidate); totals (candidates,).
    """
    full = embed(retriever, batch).float()
    gone = [(unit, layer) for layer in dropped]
    _, vectors = without_each(retriever, batch, [(unit, layer) for layer in candidates], gone)
    distances = [
        (1.0 - cosine_similarity(full, vector.float(), dim=-1)).double().sum().item() for vector in vectors
    ]
    return Sums(totals=np.array(distances), weight=len(batch))


def greedy_order(layers: list[int], evaluate: Callable[[list[int], list[int]], np.ndarray]) -> list[int]:
    """Drop the candidate whose loss hurts least, score what remains again, until one is left.

    evaluate: (dropped already, candidates) -> damage of dropping each candidate as well, (candidates,).
    Returns the layers in the order in which they go; the last one is the most important.
    """
    order: list[int] = []
    remaining = list(layers)
    while len(remaining) > 1:
        damage = evaluate(order, remaining)
        order.append(remaining.pop(int(np.argmin(damage))))
    return order + remaining


@torch.inference_mode()
def loss_increases(retriever: Retriever, batch: PairBatch) -> Sums:
    """Sums over pairs of (InfoNCE without the sublayer - InfoNCE of the full model); totals (3, layers)."""
    layers = len(retriever.family.layers(retriever.model))
    candidates = [(unit, layer) for unit in UNITS for layer in sublayers(retriever, unit)]
    queries, other_queries = without_each(retriever, batch.queries, candidates)
    documents, other_documents = without_each(retriever, batch.documents, candidates)
    base = pair_loss(queries, documents, batch.allowed).item()
    totals = np.zeros((len(UNITS), layers))
    for (unit, layer), query, document in zip(candidates, other_queries, other_documents, strict=True):
        increase = pair_loss(query, document, batch.allowed).item() - base
        totals[UNITS.index(unit), layer] = increase * len(batch)
    return Sums(totals=totals, weight=len(batch))
