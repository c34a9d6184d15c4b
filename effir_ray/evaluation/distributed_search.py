"""Exact search over the shards of an embedded corpus, spread over the nodes of a Ray cluster.

Every task searches a run of consecutive shards that it reads itself; only queries and (q, k) results travel.
The result is that of ``exact_search`` bit for bit, however the shards are spread (see ``index``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from effir_ray.encoding.embedding_shards import CorpusEmbeddings, Encoding, ShardFolder
from effir_ray.errors import InputError
from effir_ray.evaluation.index import Backend, Floats, Ints, exact_search, merge_results
from effir_ray.progress import progress


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

    The corpus must lie where every node can read it. Raises InputError for fewer than one worker, and what
    ``exact_search`` raises.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; at least 1 is needed")
    from effir_ray.cluster.connection import connect

    connect(address)
    import ray
    from ray.exceptions import RayTaskError

    gpu = 1 if ray.cluster_resources().get("GPU", 0) else 0
    task = ray.remote(num_cpus=1, num_gpus=gpu)(_search_shards)
    sent = ray.put(queries)
    runs = [run for run in np.array_split(np.arange(corpus.encoding.shards), workers) if len(run)]
    pending = [task.remote(sent, corpus.folder, corpus.encoding, run, k, backend) for run in runs]
    parts = []
    with progress("Searching", total=len(runs), unit="parts") as bar:
        try:
            for reference in pending:
                parts.append(ray.get(reference))
                bar.advance()
        except RayTaskError as error:
            raise error.cause from None
    return merge_results(parts, k)


def _search_shards(
    queries: Floats,
    folder: ShardFolder,
    encoding: Encoding,
    shards: npt.NDArray[np.int64],
    k: int,
    backend: Backend,
) -> tuple[Floats, Ints]:
    """The best k of some consecutive shards, numbered as in the whole corpus."""
    rows = (folder.read_shard(int(shard), ["embedding"])[1] for shard in shards)
    scores, indices = exact_search(queries, rows, k=k, backend=backend)
    return scores, np.where(indices >= 0, indices + encoding.rows(int(shards[0])).start, -1)
