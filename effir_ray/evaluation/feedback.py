"""Dense pseudo-relevance feedback: a query moves towards the documents it found first, and searches again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from effir_ray.config import Config

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Feedback(Config):
    """Vector-based Rocchio without a negative part (Li et al. 2021, arXiv 2108.11044, section 3.3).

    The defaults are those of Pyserini's dense Rocchio: 5 documents, alpha 0.4, beta 0.6.
    """

    documents: int = Field(default=5, ge=1)
    alpha: float = Field(default=0.4, ge=0)  # weight of the query
    beta: float = Field(default=0.6, ge=0)  # weight of the mean of the documents


def rocchio(queries: Floats, documents: Floats, found: npt.NDArray[np.bool_], feedback: Feedback) -> Floats:
    """New query vectors ``alpha q + beta mean(d)``.

    ``queries`` (q, d); ``documents`` (q, m, d) what each query found; ``found`` (q, m) which of them count. A
    query that found nothing stays as it is.
    """
    counts = found.sum(axis=1, keepdims=True)  # (q, 1)
    mean = (documents * found[:, :, None]).sum(axis=1) / np.maximum(counts, 1)  # (q, d)
    moved = feedback.alpha * queries + feedback.beta * mean
    return np.where(counts > 0, moved, queries).astype(np.float32)


def gather(shards: Iterable[npt.NDArray[np.generic]], indices: Ints, dimension: int) -> Floats:
    """Rows ``indices`` (q, m) of all shards, as (q, m, d); index -1 gives zeros. One pass."""
    rows = np.zeros((*indices.shape, dimension), dtype=np.float32)
    first = 0
    for shard in shards:
        here = (indices >= first) & (indices < first + len(shard))
        rows[here] = shard[indices[here] - first]
        first += len(shard)
    return rows
