"""How much every sublayer matters, by each criterion a schedule can name.

Two kinds of evidence: the angle by which a sublayer turns the residual stream (one pass tells it of all
sublayers), and what the whole model loses without it, alone or together with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
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
BUDGET = 512
"""Sets of one unit that ``pooled`` tries: all of them up to 9 layers, else a beam search, which is
greedy (one set a size) from 23 layers on."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What one batch adds. totals: (3, layers) float64, rows in the order of UNITS (``set_distances``:
    (sets,), ``replacements``: (options,)); weight: what the sum of all totals is divided by in the end.
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
    budget: int = BUDGET,
    units: Collection[Unit] = UNITS,
) -> ImportanceScores:
    """A score for every attention, MLP and block; higher = keep.

    - ``cosine``: 1 - cos(x, x + F(x)) averaged over the tokens of ``texts`` (the paper's);
    - ``pooled``: how far the final vectors of ``texts`` and ``queries`` (each with its own prompt) move when
      a set of layers loses the unit. Of each size the set that moves them least is kept (``best``): all sets
      are tried where these are at most ``budget``, else a beam search. The score is the share of the best
      sets that keep the layer. Only ``units`` are tried, the others score 0: each takes its own passes;
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
        return _result(criterion, mean_over(partial(loss_increases, retriever), pair_batches))
    if not texts:
        raise InputError(f"importance by '{criterion}' needs calibration texts; found none")
    if criterion == "cosine":
        return _result(criterion, mean_over(partial(token_angles, retriever), documents(texts)))
    best = {unit: _best_sets(retriever, all_texts, unit, budget) for unit in UNITS if unit in units}
    scores = np.zeros((len(UNITS), len(retriever.family.layers(retriever.model))))
    for unit, sets in best.items():
        scores[UNITS.index(unit)] = _kept_share(retriever, unit, sets)
    return _result(criterion, scores, best)


def _best_sets(
    retriever: Retriever, batches: Callable[[], Iterable[PaddedTexts]], unit: Unit, budget: int
) -> tuple[tuple[int, ...], ...]:
    """Of each size the best layers to drop the unit from. Those that lack it already are in every set: the
    count of a schedule is that of the whole backbone."""

    def evaluate(sets: list[tuple[int, ...]]) -> np.ndarray:
        return mean_over(partial(set_distances, retriever, unit=unit, sets=sets), batches())

    present = sublayers(retriever, unit)
    gone = set(range(len(retriever.family.layers(retriever.model)))) - set(present)
    return tuple(tuple(sorted({*gone, *chosen})) for chosen in best_sets(present, evaluate, budget=budget))


def _kept_share(retriever: Retriever, unit: Unit, best: Sequence[tuple[int, ...]]) -> np.ndarray:
    """(layers,) share of the sets that keep each layer, in (0, 1]; of nested sets its place in the order."""
    scores = np.zeros(len(retriever.family.layers(retriever.model)))
    for layer in sublayers(retriever, unit):
        scores[layer] = (1 + sum(layer not in dropped for dropped in best)) / (1 + len(best))
    return scores


def mean_over(
    measure: Callable[[B], Sums], batches: Iterable[B], title: str = "Scoring sublayers"
) -> np.ndarray:
    """Mean of what ``measure`` sums over batches, float64.

    Raises InputError when there was nothing to measure, TrialFailure when a score is not finite.
    """
    parts = []
    with progress(title, unit="batches") as bar:
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


def _result(
    criterion: Criterion,
    scores: np.ndarray,
    best: Mapping[Unit, tuple[tuple[int, ...], ...]] | None = None,
) -> ImportanceScores:
    attention, mlp, block = (tuple(float(value) for value in row) for row in scores)
    return ImportanceScores(
        criterion=criterion, attention=attention, mlp=mlp, block=block, best=dict(best or {})
    )


@torch.inference_mode()
def token_angles(retriever: Retriever, batch: PaddedTexts) -> Sums:
    """Sums over real tokens, never over padding, of S = 1 - cos(x, x + F(x)) (the paper's importance).

    One forward; only one block's stream is held at a time.
    """
    real = batch.attention_mask.bool().to(retriever.model.device)  # (batch, tokens)
    totals = np.zeros((len(UNITS), len(retriever.family.layers(retriever.model))))

    def add(index: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        turned = 1.0 - cosine_similarity(before[real].float(), after[real].float(), dim=-1)  # (tokens,)
        totals[UNITS.index(unit), index] += turned.sum(dtype=torch.float64).item()

    with retriever.family.watch(retriever.model, add):
        hidden_states(retriever, batch)
    return Sums(totals=totals, weight=int(real.sum()))


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
def set_distances(
    retriever: Retriever, batch: PaddedTexts, *, unit: Unit, sets: Sequence[tuple[int, ...]]
) -> Sums:
    """Sums over texts of 1 - cos(vector of the full model, vector without the unit in the layers of a set);
    totals (sets,). A set's forward starts at its first layer: those before are the full model's.
    """
    inputs: dict[int, Tensor] = {}

    def keep(index: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        if unit == "block":
            inputs[index] = before

    with retriever.family.watch(retriever.model, keep):
        full = embed(retriever, batch)
    distances = []
    for layers in sets:
        start = min(layers)
        dropped = [(unit, layer) for layer in layers]
        with masked(retriever, dropped), resumed(retriever, start, inputs[start]):
            distances.append(distance(full, embed(retriever, batch)))
    return Sums(totals=np.array(distances), weight=len(batch))


def distance(full: Tensor, vectors: Tensor) -> float:
    """Sum over texts of 1 - cos; (texts, hidden) both."""
    return (1.0 - cosine_similarity(full.float(), vectors.float(), dim=-1)).double().sum().item()


def best_sets(
    layers: Sequence[int], evaluate: Callable[[list[tuple[int, ...]]], np.ndarray], *, budget: int = BUDGET
) -> list[tuple[int, ...]]:
    """The best set to drop of each size from 1 to n - 1, of those that at most ``budget`` evaluations reach.

    evaluate: sets of one size -> the damage of each, (sets,). All sets of a size where there are few (all
    sizes, if all sets are within the budget); else the best ones of the size before with one layer more. One
    set a size is always carried on, which is the greedy order, whatever the budget.
    """
    share = budget if 2 ** len(layers) <= budget else budget // len(layers)
    found: list[tuple[int, ...]] = []
    beam: list[tuple[int, ...]] = [()]
    for size in range(1, len(layers)):
        if math.comb(len(layers), size) <= share:
            candidates = list(combinations(layers, size))
        else:
            width = max(1, share // (len(layers) - size + 1))
            longer = (
                tuple(sorted((*taken, layer)))
                for taken in beam[:width]
                for layer in layers
                if layer not in taken
            )
            candidates = list(dict.fromkeys(longer))
        order = np.argsort(evaluate(candidates), kind="stable").tolist()
        beam = [candidates[place] for place in order]
        found.append(beam[0])
    return found


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
