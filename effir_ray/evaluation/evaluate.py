"""A model's scores on a data set: encode, search exactly, compare with the judgements."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from effir_ray.data.datasets import Corpus, Dataset, load_dataset
from effir_ray.encoding.corpus_encoding import encode_corpus
from effir_ray.encoding.encoder import Encoder, as_encoder
from effir_ray.errors import InputError
from effir_ray.evaluation.bm25 import NAME as BM25
from effir_ray.evaluation.bm25 import bm25_run
from effir_ray.evaluation.corpus_search import DEPTH, EmbeddedCorpus, Feedback, search_corpus
from effir_ray.evaluation.index import Backend, Floats
from effir_ray.evaluation.metrics import Run, Scores, check_cutoffs, score_run
from effir_ray.evaluation.trec import write_run
from effir_ray.files import write_whole
from effir_ray.hardware import Computed, Precision
from effir_ray.models.retriever import Retriever

_CHUNK = 16_384  # documents whose texts and embeddings are in memory at once


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured. ``search_ms``: finding the documents of all queries at once,
    with reading the stored embeddings, milliseconds a query.
    """

    model: str
    dataset: str
    split: str
    fingerprint: str  # of the data set
    scores: Scores
    run: Run
    n_queries: int
    n_documents: int
    seconds: float
    search_ms: float
    feedback: Feedback | None
    precision: Computed | None  # of queries; None for BM25
    warnings: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the run and the scores of single queries."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": self.split,
            "scores": self.scores.mean,
            "n_queries": self.n_queries,
            "n_documents": self.n_documents,
            "seconds": self.seconds,
            "search_ms": self.search_ms,
            "feedback": self.feedback.model_dump() if self.feedback else None,
            "precision": self.precision,
            "warnings": list(self.warnings),
        }

    def mteb_result(self) -> dict[str, Any]:
        """The same in the JSON form of an MTEB task result."""
        names = {metric: metric.replace("@", "_at_") for metric in self.scores.mean}
        scores = {names[metric]: value for metric, value in self.scores.mean.items()}
        return {
            "dataset_revision": self.fingerprint,
            "task_name": self.dataset,
            "mteb_version": None,
            "scores": {
                self.split: [
                    {
                        **scores,
                        "main_score": scores["ndcg_at_10"],
                        "hf_subset": "default",
                        "languages": ["eng-Latn"],
                    }
                ]
            },
            "evaluation_time": self.seconds,
            "kg_co2_emissions": None,
        }


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
    precision: Precision | None = None,
    workers: int = 1,
    address: str | None = None,
) -> Evaluation:
    """Score ``model`` (a name, a folder, a loaded retriever or an encoder) on one split of ``dataset``;
    ``bm25`` is BM25.

    ``precision``: what the model multiplies in, see ``Encoder``; an encoder keeps its own.
    Reported are nDCG@10, Recall@100, MRR@10 and MAP@100, and all four at each of ``cutoffs``.

    The data set is read and checked before the model is loaded. With ``out`` the run (``run.trec``), the
    scores in MTEB's form (``mteb.json``), those of every query (``per_query.json``) and a summary
    (``evaluation.json``) are written there; a model given by name is then encoded by ``workers`` into
    ``out/embeddings``, see ``encode_corpus``, where a killed evaluation goes on. Otherwise embeddings pass
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
    queries = dataset.queries(split)
    _check_out(out)
    check_cutoffs(cutoffs)
    if model == BM25:
        if feedback is not None:
            raise InputError("feedback moves query embeddings; bm25 has none")
        searching = time.perf_counter()
        run = bm25_run(dataset, split, depth=max([DEPTH, *cutoffs]))
        return _written(_scored(BM25, dataset, split, run, started, searching, None, cutoffs, None), out)
    with tempfile.TemporaryDirectory(prefix="effir-ray-") as scratch:
        corpus: EmbeddedCorpus
        if out is not None and isinstance(model, str | Path):
            corpus = encode_corpus(
                model,
                dataset,
                out / "embeddings",
                workers=workers,
                max_length=document_max_length,
                precision=precision,
                address=address,
            )
            # Not before: what encoded has a copy of its own on the same GPU.
            encoder = as_encoder(model, precision=precision)
        else:
            encoder = as_encoder(model, precision=precision)
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
        name = encoder.retriever.name
        return _written(
            _scored(name, dataset, split, run, started, searching, feedback, cutoffs, encoder.precision), out
        )


def _scored(
    model: str,
    dataset: Dataset,
    split: str,
    run: Run,
    started: float,
    searching: float,
    feedback: Feedback | None,
    cutoffs: Sequence[int],
    precision: Computed | None,
) -> Evaluation:
    """``started``, ``searching``: ``perf_counter`` when the evaluation and its search began."""
    now, qrels = time.perf_counter(), dataset.qrels(split)
    return Evaluation(
        model=model,
        dataset=dataset.name,
        split=split,
        fingerprint=dataset.fingerprint,
        scores=score_run(run, qrels, cutoffs=cutoffs),
        run=run,
        n_queries=len(qrels),
        n_documents=len(dataset.corpus),
        seconds=time.perf_counter() - started,
        search_ms=1000 * (now - searching) / len(qrels),
        feedback=feedback,
        precision=precision,
        warnings=dataset.warnings,
    )


def _written(evaluation: Evaluation, out: Path | None) -> Evaluation:
    if out is not None:
        write_evaluation(evaluation, out)
    return evaluation


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


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Write ``run.trec``, ``mteb.json``, ``per_query.json`` and ``evaluation.json`` into ``out``."""
    write_run(evaluation.run, out / "run.trec", tag=evaluation.model)
    files = {
        "mteb.json": evaluation.mteb_result(),
        "per_query.json": evaluation.scores.per_query,
        "evaluation.json": evaluation.summary(),
    }
    for name, content in files.items():
        write_whole(out / name, json.dumps(content, indent=2))
