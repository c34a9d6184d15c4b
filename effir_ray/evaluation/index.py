"""Exact inner-product search whose result does not depend on how it was computed.

FAISS and torch round differently, and so does one library on shards of different sizes. Therefore a backend
only proposes candidates; every candidate is scored again by one kernel (``_canonical_scores``), and a
candidate list is known to be complete because no float32 dot product errs by more than ``_error_bound``. The
result is the same for every backend and sharding: ordered by score, then by lower index.

Shapes: q queries, n documents of a shard, d dimensions, c candidates a query, k results a query.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from effir_ray.errors import InputError, TrialFailure

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Backend = Literal["auto", "faiss", "torch"]
_Propose = Callable[[Floats, Floats, int], tuple[Floats, Ints]]

_FAISS_GPU_RESULTS = 2048  # the most that its GPU kernels select
_SPARE = 32  # candidates beyond k: room for near-ties at the border, so that few queries need a full pass
_QUERY_BLOCK = 1024
_PAIR_ELEMENTS = 1 << 22  # float64 products at once: 32 MiB


def exact_search(
    queries: npt.ArrayLike,
    documents: npt.NDArray[np.generic] | Iterable[npt.NDArray[np.generic]],
    *,
    k: int,
    backend: Backend = "auto",
) -> tuple[Floats, Ints]:
    """The ``k`` documents of highest inner product for every query.

    ``queries`` is (q, d); ``documents`` is (n, d), or an iterable of such shards that are numbered on and
    never held together: memory is one shard and (q, k) results. Returns scores (q, k) float32 and indices (q,
    k) int64, best first, equal scores by lower index; where there are fewer than ``k`` documents the rest is
    -inf and -1.

    Raises InputError for shapes that do not fit and TrialFailure for NaN or infinite embeddings.
    """
    queries = _checked(queries, "queries")
    if k < 1:
        raise InputError(f"k is {k}; at least 1 result a query is needed")
    propose = _proposer(backend)
    scores: Floats = np.full((len(queries), k), -np.inf, dtype=np.float32)
    indices: Ints = np.full((len(queries), k), -1, dtype=np.int64)
    first = 0
    for shard in [documents] if isinstance(documents, np.ndarray) else documents:
        block = _checked(shard, "documents")
        if block.shape[1] != queries.shape[1]:
            raise InputError(f"documents have {block.shape[1]} dimensions, queries {queries.shape[1]}")
        for start in range(0, len(queries) if len(block) else 0, _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            found = _search_shard(queries[rows], block, scores[rows, -1], k, propose)
            scores[rows], indices[rows] = merge_results(
                [(scores[rows], indices[rows]), (found[0], np.where(found[1] >= 0, found[1] + first, -1))], k
            )
        first += len(block)
    return scores, indices


def merge_results(parts: Iterable[tuple[Floats, Ints]], k: int) -> tuple[Floats, Ints]:
    """The best ``k`` of several results (q, k_i) over different documents; -inf marks places not filled."""
    lists = list(parts)
    scores = np.concatenate([part[0] for part in lists], axis=1)
    indices = np.concatenate([part[1] for part in lists], axis=1)
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)


def _search_shard(
    queries: Floats, shard: Floats, threshold: Floats, k: int, propose: _Propose
) -> tuple[Floats, Ints]:
    """All documents of ``shard`` that can be among the best k: scores and indices (q, c'), padded with -inf
    and -1.

    ``threshold`` (q,) is each query's k-th best score so far; nothing below it is of use.
    """
    wanted = min(len(shard), k + _SPARE)
    rough, columns = propose(queries, shard, wanted)  # (q, c), (q, c), best first
    error = _error_bound(queries, shard)  # (q,)
    kth = rough[:, k - 1] - error if wanted >= k else np.full(len(queries), -np.inf, dtype=np.float32)
    least = np.maximum(threshold, kth) - error  # (q,): no document of rough score below this is in the result
    kept = rough >= least[:, None]
    scores: Floats = np.full(rough.shape, -np.inf, dtype=np.float32)
    rows, places = np.nonzero(kept)
    scores[rows, places] = _canonical_scores(queries, shard, rows, columns[rows, places])
    indices = np.where(kept, columns, -1)
    if wanted < len(shard):
        for row in np.flatnonzero(kept[:, -1]):  # the list ended inside a tie: look at every document
            scores[row], indices[row] = _search_row(queries[row], shard, least[row], wanted)
    return scores, indices


def _search_row(query: Floats, shard: Floats, least: float, count: int) -> tuple[Floats, Ints]:
    """The best ``count`` documents for one query (d,), among all whose rough score is at least ``least``."""
    columns = np.flatnonzero(shard @ query >= least)
    scores = _canonical_scores(query[None], shard, np.zeros(len(columns), dtype=np.int64), columns)
    padding = (0, max(0, count - len(columns)))
    padded = np.pad(scores, padding, constant_values=-np.inf), np.pad(columns, padding, constant_values=-1)
    best = merge_results([(padded[0][None], padded[1][None])], count)
    return best[0][0], best[1][0]


def _canonical_scores(queries: Floats, shard: Floats, rows: Ints, columns: Ints) -> Floats:
    """Inner products of the pairs (rows[i], columns[i]), (pairs,): the only scores a result contains.

    Products of float32 are exact in float64, and numpy sums a contiguous last axis in an order that depends
    on its length alone: the same pair gives the same bits wherever it is computed.
    """
    scores: Floats = np.empty(len(rows), dtype=np.float32)
    step = max(1, _PAIR_ELEMENTS // queries.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        products = queries[rows[part]].astype(np.float64) * shard[columns[part]]
        scores[part] = products.sum(axis=1)
    return scores


def _error_bound(queries: Floats, shard: Floats) -> Floats:
    """(q,): how far a float32 dot product of a query with any document can be from its canonical score.

    At most d u |q| |x| for any order of summation, to first order in u = 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), plus rounding the canonical score; doubled for higher
    orders.
    """
    longest = float(np.sqrt(np.einsum("nd,nd->n", shard, shard).max()))
    lengths = np.sqrt(np.einsum("qd,qd->q", queries, queries))
    bound: Floats = (2 * (queries.shape[1] + 1) * 2.0**-24 * longest * lengths).astype(np.float32)
    return bound


def _proposer(backend: Backend) -> _Propose:
    if backend == "auto":
        backend = "faiss" if _prefers_faiss() else "torch"
    if backend == "torch":
        return _propose_torch
    if backend == "faiss":
        if not _has_faiss():
            raise InputError("backend 'faiss': faiss is not installed; install effir-ray[cpu] or use 'torch'")
        return _propose_faiss
    raise InputError(f"unknown search backend '{backend}'; use auto, faiss or torch")


def _prefers_faiss() -> bool:
    """Not where there is a GPU that only torch can use."""
    import torch

    if not _has_faiss():
        return False
    return not torch.cuda.is_available() or faiss_gpus() > 0


def _has_faiss() -> bool:
    from importlib.util import find_spec

    return find_spec("faiss") is not None


def _propose_faiss(queries: Floats, shard: Floats, count: int) -> tuple[Floats, Ints]:
    _prepare_openmp()
    import faiss

    product = faiss.METRIC_INNER_PRODUCT
    if count > _FAISS_GPU_RESULTS or not faiss_gpus():
        scores, columns = faiss.knn(queries, shard, count, metric=product)
    else:
        scores, columns = faiss.knn_gpu(_faiss_gpu_resources(), queries, shard, count, metric=product)
    return scores, columns


def faiss_gpus() -> int:
    """How many GPUs the installed FAISS can search on; 0 for builds without GPU support."""
    _prepare_openmp()
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


@cache
def _faiss_gpu_resources() -> Any:
    """Streams and scratch memory: gigabytes that FAISS would reserve anew for every shard."""
    import faiss

    return faiss.StandardGpuResources()


def _prepare_openmp() -> None:
    """faiss brings its own OpenMP, whose waiting threads would spin against torch's: 3x slower on few cores.

    Read once when faiss is loaded, so it is set before that; a value the user chose is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _propose_torch(queries: Floats, shard: Floats, count: int) -> tuple[Floats, Ints]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # its 10-bit mantissa would break the error bound
    try:
        documents = torch.from_numpy(shard).to(device)
        scores = torch.from_numpy(queries).to(device) @ documents.T  # (q, n)
        best, columns = scores.topk(count, dim=1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return best.cpu().numpy(), columns.cpu().numpy()


def _checked(embeddings: npt.ArrayLike, what: str) -> Floats:
    array = np.ascontiguousarray(embeddings, dtype=np.float32)
    if array.ndim != 2:
        raise InputError(f"{what}: found an array of shape {array.shape}; expected (rows, dimensions)")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise TrialFailure(f"{what}: row {row} of the embeddings holds NaN or infinite values")
    return array
