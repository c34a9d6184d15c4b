"""A model's scores on a data set: encode, search exactly, compare with the judgements."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from effir_ray.data.datasets import Corpus, Dataset, load_dataset
from effir_ray.encoding.encoder import as_encoder
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluation_result import Evaluation, write_evaluation
from effir_ray.evaluation.feedback import Feedback, gather, rocchio
from effir_ray.evaluation.index import Backend, exact_search
from effir_ray.evaluation.metrics import Run, check_cutoffs, score_run

if TYPE_CHECKING:
    from effir_ray.encoding.encoder import Encoder
    from effir_ray.models.retriever import Retriever

Floats = npt.NDArray[np.float32]

Search = Callable[[Floats, int], tuple[Floats, npt.NDArray[np.int64]]]

DEPTH = 100  # documents a query in a run: as deep as Recall@100 and MAP@100 look
_CHUNK = 16_384  # documents whose texts and embeddings are in memory at once


class EmbeddedCorpus(Protocol):
    """Document embeddings in the order of ``ids``, streamed as shards (n_i, d); every call starts again."""

    @property
    def ids(self) -> Sequence[str]: ...

    def shards(self) -> Iterable[npt.NDArray[np.generic]]: ...


def evaluate(
    model: str | Path | Retriever | Encoder,
    dataset: str | Path | Dataset,
    *,
    split: str = "test",
    out: Path | None = None,
    query_max_length: int | None = None,
    document_max_length: int | None = None,
    feedback: Feedback | None = None,
    backend: Backend = "auto",
    cutoffs: Sequence[int] = (),
    workers: int = 1,
    address: str | None = None,
) -> Evaluation:
    """Score ``model`` (a name, a folder, a loaded retriever or an encoder) on one split of ``dataset``.

    Reported are nDCG@10, Recall@100, MRR@10 and MAP@100, and all four at each of ``cutoffs``.

    The data set is read and checked before the model is loaded. With ``out`` the run (``run.trec``), the
    scores in MTEB's form (``mteb.json``), those of every query (``per_query.json``) and a summary
    (``evaluation.json``) are written there; a model given by name is then encoded by Ray Data with
    ``workers`` actors into ``out/embeddings``, where a killed evaluation goes on. Otherwise embeddings pass
    through a temporary file of this machine: memory does not grow with the corpus.

    Raises InputError for anything wrong with the data set, the split or the model, and for several workers
    without an ``out`` that they share; TrialFailure for NaN embeddings.
    """
    started = time.perf_counter()
    if workers > 1 and (out is None or not isinstance(model, str | Path)):
        raise InputError(
            f"{workers} workers need a model that they can load by name and a folder they all see (--out)"
        )
    dataset = dataset if isinstance(dataset, Dataset) else load_dataset(dataset)
    queries, qrels = dataset.queries(split), dataset.qrels(split)
    _check_out(out)
    check_cutoffs(cutoffs)
    with tempfile.TemporaryDirectory(prefix="effir-ray-") as scratch:
        corpus: EmbeddedCorpus
        if out is not None and isinstance(model, str | Path):
            from effir_ray.encoding.corpus_encoding import encode_corpus

            corpus = encode_corpus(
                model,
                dataset,
                out / "embeddings",
                workers=workers,
                max_length=document_max_length,
                address=address,
            )
            encoder = as_encoder(model)  # not before: the worker has a copy of its own on the same GPU
        else:
            encoder = as_encoder(model)
            corpus = _encode_here(encoder, dataset.corpus, Path(scratch), document_max_length)
        vectors = encoder.encode(
            list(queries.values()), "query", max_length=query_max_length, progress="Encoding queries"
        )
        searching = time.perf_counter()
        run = search_corpus(
            list(queries),
            vectors,
            corpus,
            depth=max([DEPTH, *cutoffs]),
            backend=backend,
            feedback=feedback,
            workers=workers,
            address=address,
        )
        searching = time.perf_counter() - searching
    evaluation = Evaluation(
        model=encoder.retriever.name,
        dataset=dataset.name,
        split=split,
        fingerprint=dataset.fingerprint,
        scores=score_run(run, qrels, cutoffs=cutoffs),
        run=run,
        n_queries=len(queries),
        n_documents=len(dataset.corpus),
        seconds=time.perf_counter() - started,
        search_ms=1000 * searching / len(queries),
        feedback=feedback,
        warnings=dataset.warnings,
    )
    if out is not None:
        write_evaluation(evaluation, out)
    return evaluation


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
    from effir_ray.encoding.embedding_shards import CorpusEmbeddings

    if workers > 1 and isinstance(corpus, CorpusEmbeddings):
        from effir_ray.evaluation.distributed_search import search_on_ray

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


@dataclass(frozen=True)
class _TemporaryEmbeddings:
    """Embeddings in a memory-mapped file (n, d)."""

    ids: Sequence[str]
    rows: npt.NDArray[np.float32]

    def shards(self) -> Iterator[Floats]:
        return (self.rows[start : start + _CHUNK] for start in range(0, len(self.rows), _CHUNK))


def _encode_here(encoder: Encoder, corpus: Corpus, scratch: Path, max_length: int | None) -> EmbeddedCorpus:
    """Embed the corpus in this process, a chunk of texts in memory at a time."""
    shape = (len(corpus), encoder.dimension)
    rows = np.lib.format.open_memmap(scratch / "documents.npy", mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(corpus), _CHUNK):
        texts = [document.document_text for document in corpus.iter_documents(start, start + _CHUNK)]
        part = f" ({start} of {len(corpus)} done)" if start else ""
        rows[start : start + len(texts)] = encoder.encode(
            texts, "document", max_length=max_length, progress=f"Encoding documents{part}"
        )
    return _TemporaryEmbeddings(corpus.ids, rows)


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be used as the output folder: {error.strerror}") from None
