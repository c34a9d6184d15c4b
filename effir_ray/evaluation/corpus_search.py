"""From query vectors and an embedded corpus to a ranking: here or on Ray, with or without feedback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from effir_ray.cluster.connection import connect
from effir_ray.cluster.devices import room
from effir_ray.cluster.lost import in_one_line
from effir_ray.cluster.probe import Shared, check_shared
from effir_ray.config import Config
from effir_ray.encoding.embedding_shards import CorpusEmbeddings, Encoding, ShardFolder
from effir_ray.errors import InputError
from effir_ray.evaluation.index import Backend, Floats, Ints, exact_search, merge_results
from effir_ray.evaluation.metrics import Run
from effir_ray.progress import progress

Search = Callable[[Floats, int], tuple[Floats, Ints]]

DEPTH = 100  # documents a query in a run: as deep as Recall@100 and MAP@100 look


class EmbeddedCorpus(Protocol):
    """Document embeddings in the order of ``ids``, streamed as shards (n_i, d); every call starts again."""

    @property
    def ids(self) -> Sequence[str]: ...

    def shards(self) -> Iterable[npt.NDArray[np.generic]]: ...


class Feedback(Config):
    """Vector-based Rocchio without a negative part (Li et al. 2021, arXiv 2108.11044, section 3.3).

    The defaults are those of Pyserini's dense Rocchio: 5 documents, alpha 0.4, beta 0.6.
    """

    documents: int = Field(default=5, ge=1)
    alpha: float = Field(default=0.4, ge=0)  # weight of the query
    beta: float = Field(default=0.6, ge=0)  # weight of the mean of the documents


def search_corpus(
    query_ids: Sequence[str],
    queries: Floats,
    corpus: EmbeddedCorpus,
    *,
    depth: int = DEPTH,
    backend: Backend = "auto",
    feedback: Feedback | None = None,
    workers: int = 1,
    address: str | None = None,
) -> Run:
    """The best ``depth`` documents of every query vector (q, d), best first, itself left out (as BEIR does).

    With ``feedback`` the queries move towards what they find first, and the corpus is searched again. More
    than one worker search stored embeddings as Ray tasks on the cluster at ``address``.
    """
    ids = corpus.ids
    search = _searcher(corpus, backend, workers, address)
    if feedback is not None:
        _, indices = search(queries, feedback.documents + 1)
        found = _not_self(query_ids, indices, ids)
        found &= np.cumsum(found, axis=1) <= feedback.documents
        documents = gather(corpus.shards(), indices, queries.shape[1])
        queries = rocchio(queries, documents, found, feedback)
    scores, indices = search(queries, depth + 1)
    found = _not_self(query_ids, indices, ids)
    run: Run = {}
    for row, query_id in enumerate(query_ids):
        places = np.flatnonzero(found[row])[:depth]
        run[query_id] = {ids[indices[row, place]]: float(scores[row, place]) for place in places}
    return run


def _searcher(corpus: EmbeddedCorpus, backend: Backend, workers: int, address: str | None) -> Search:
    if workers > 1 and isinstance(corpus, CorpusEmbeddings):
        return lambda queries, k: search_on_ray(
            queries, corpus, k=k, backend=backend, workers=workers, address=address
        )
    return lambda queries, k: exact_search(queries, corpus.shards(), k=k, backend=backend)


def _not_self(
    query_ids: Sequence[str], indices: npt.NDArray[np.int64], ids: Sequence[str]
) -> npt.NDArray[np.bool_]:
    """(q, k): which places hold a document other than the query itself."""
    return np.array(
        [[i >= 0 and ids[i] != own for i in row] for own, row in zip(query_ids, indices, strict=True)],
        dtype=np.bool_,
    ).reshape(indices.shape)


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


def search_on_ray(
    queries: Floats,
    corpus: CorpusEmbeddings,
    *,
    k: int,
    backend: Backend = "auto",
    workers: int,
    address: str | None = None,
) -> tuple[Floats, Ints]:
    """``exact_search`` of queries (q, d) by ``workers`` tasks at once, one core or GPU each.

    Every task searches a run of consecutive shards that it reads itself; only queries and (q, k) results
    travel. The result is that of ``exact_search`` bit for bit, however the shards are spread (see ``index``).
    The corpus must lie where every node can read it. Raises InputError for fewer than one worker, LostProcess
    when the same part was lost again and again, and what ``exact_search`` raises.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; at least 1 is needed")
    import ray

    connect(address)
    shared = check_shared(corpus.folder.local, {})
    gpu = 1 if room().gpus else 0
    # Without a strategy of its own a task of a study's trial would have to fit into what that has reserved.
    task = ray.remote(num_cpus=1, num_gpus=gpu, scheduling_strategy="DEFAULT")(_search_shards)
    sent = ray.put(queries)
    runs = [run for run in np.array_split(np.arange(corpus.encoding.shards), workers) if len(run)]
    pending = [task.remote(sent, shared, corpus.folder, corpus.encoding, run, k, backend) for run in runs]
    parts = []
    with progress("Searching", total=len(runs), unit="parts") as bar, in_one_line("searching"):
        for reference in pending:
            parts.append(ray.get(reference))
            bar.advance()
    return merge_results(parts, k)


def _search_shards(
    queries: Floats,
    shared: Shared | None,
    folder: ShardFolder,
    encoding: Encoding,
    shards: npt.NDArray[np.int64],
    k: int,
    backend: Backend,
) -> tuple[Floats, Ints]:
    """The best k of some consecutive shards, numbered as in the whole corpus."""
    if shared is not None:
        shared.check()
    rows = (folder.read_shard(int(shard), ["embedding"])[1] for shard in shards)
    scores, indices = exact_search(queries, rows, k=k, backend=backend)
    return scores, np.where(indices >= 0, indices + encoding.rows(int(shards[0])).start, -1)
