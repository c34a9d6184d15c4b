"""How much every sublayer matters, by each criterion a schedule can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np

from effir_ray.compression.calibration import Batch, Pair, make_batches, make_pair_batches
from effir_ray.compression.depth.masking import UNITS, Sublayer, Unit, sublayers
from effir_ray.compression.depth.removal import greedy_order, loss_increases, removal_distances
from effir_ray.compression.depth.similarity import Sums, mean, pooled_angles, token_angles
from effir_ray.compression.planning import ImportanceScores
from effir_ray.compression.schedule import Criterion
from effir_ray.compression.sharding import Mapper, mapper
from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress

B = TypeVar("B")


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
    workers: int | None = None,
    scratch: Path | None = None,
    address: str | None = None,
) -> ImportanceScores:
    """A score for every attention, MLP and block; higher = keep.

    - ``cosine``: 1 - cos(x, x + F(x)) averaged over the tokens of ``texts`` (the paper's);
    - ``pooled``: the same on text vectors, over ``texts`` and ``queries`` (each with its own prompt);
    - ``greedy``: drop the sublayer whose removal moves the final vectors of ``texts`` and ``queries``
      least, score again, and so on in each group; the score is the place in that order, (1 .. n) / n;
    - ``dev-loss``: InfoNCE on ``pairs`` without the sublayer minus that of the full model;
    - ``random``: uniform, from ``seed``.

    Texts are handled in padded batches of ``token_budget`` tokens; memory does not grow with their number.
    ``workers=None`` computes here; ``workers=N`` on N Ray actors with one result for every N (see
    sharding.mapper for ``scratch`` and ``address``). Sublayers that were already dropped score 0.
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

    def all_texts() -> Iterable[Batch]:
        return chain(documents(texts), documents(queries, kind="query"))

    with mapper(retriever, workers=workers, scratch=scratch, address=address) as compute:
        if criterion == "dev-loss":
            batches = make_pair_batches(retriever, pairs, max_length=max_length)
            return _result(criterion, _mean(compute, loss_increases, batches))
        if not texts:
            raise InputError(f"importance by '{criterion}' needs calibration texts; found none")
        if criterion == "cosine":
            return _result(criterion, _mean(compute, token_angles, documents(texts)))
        if criterion == "pooled":
            return _result(criterion, _mean(compute, pooled_angles, all_texts()))
        return _result(criterion, np.stack([_greedy(retriever, compute, all_texts, unit) for unit in UNITS]))


def _greedy(
    retriever: Retriever, compute: Mapper, batches: Callable[[], Iterable[Batch]], unit: Unit
) -> np.ndarray:
    """(layers,) place of each layer in the greedy order, scaled to (0, 1]."""

    def evaluate(dropped: frozenset[Sublayer], candidates: list[int]) -> np.ndarray:
        probe = partial(removal_distances, unit=unit, dropped=dropped, candidates=tuple(candidates))
        return _mean(compute, probe, batches())

    order = greedy_order(sublayers(retriever, unit), unit, evaluate)
    scores = np.zeros(len(retriever.family.layers(retriever.model)))
    scores[order] = np.arange(1, len(order) + 1) / len(order)
    return scores


def _mean(compute: Mapper, function: Callable[[Retriever, B], Sums], batches: Iterable[B]) -> np.ndarray:
    parts = []
    with progress("Scoring sublayers", unit="batches") as bar:
        for part in compute(function, batches):
            parts.append(part)
            bar.advance()
    return mean(parts)


def _result(criterion: Criterion, scores: np.ndarray) -> ImportanceScores:
    attention, mlp, block = (tuple(float(value) for value in row) for row in scores)
    return ImportanceScores(criterion=criterion, attention=attention, mlp=mlp, block=block)
