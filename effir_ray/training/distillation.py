"""Embeddings of an uncompressed teacher for every training text, computed once and kept as stages.

The student's loss terms over them are ``losses.EmbeddingDistillation`` and ``losses.SimilarityDistillation``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from effir_ray.errors import InputError
from effir_ray.stages import StageStore
from effir_ray.training import embedding_stage
from effir_ray.training.batches import Batch
from effir_ray.training.config import TrainConfig
from effir_ray.training.embedding_stage import Kind
from effir_ray.training.pairs import Pair
from effir_ray.training.streaming import PairStream


@dataclass(frozen=True)
class Table:
    """Embeddings by text: shard i holds rows ``i * shard_size`` on. ``rows``: text -> row."""

    rows: dict[str, int]
    shards: list[npt.NDArray[np.float32]]

    def lookup(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(len(texts), d). Raises InputError for a text the teacher has not seen."""
        size = len(self.shards[0])
        found = []
        for text in texts:
            row = self.rows.get(text)
            if row is None:
                raise InputError(f"the teacher has not encoded this training text: '{text[:80]}'")
            found.append(self.shards[row // size][row % size])
        return np.stack(found)


@dataclass(frozen=True)
class TeacherEmbeddings:
    """What the teacher says of every query and document of the training pairs."""

    queries: Table
    documents: Table

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``ContrastiveStep`` asks of a teacher: queries (b, t) and documents (b * k, t) of a batch."""
        b = batch.n_queries
        return (
            torch.from_numpy(self.queries.lookup(batch.texts[:b])),
            torch.from_numpy(self.documents.lookup(batch.texts[b:])),
        )


def embeddings_for(
    config: TrainConfig, pairs: list[Pair] | PairStream, stages: StageStore, dtype: str
) -> TeacherEmbeddings | None:
    """What the teacher of a run says of its pairs; None without a teacher. Workers find the driver's files.

    ``dtype``: ``encoder_dtype`` of the driver. Raises InputError for a stream.
    """
    if config.distillation.teacher is None:
        return None
    if isinstance(pairs, PairStream):
        raise InputError(
            f"{pairs.source} is streamed, and a teacher's embeddings of a stream are not kept; "
            "annotate the pairs with a reranker's scores instead"
        )
    return teacher_embeddings(
        config.distillation.teacher,
        pairs,
        stages=stages,
        query_max_length=config.query_max_length,
        document_max_length=config.document_max_length,
        dtype=dtype,
    )


def teacher_embeddings(
    teacher: str | Path,
    pairs: Sequence[Pair],
    *,
    stages: StageStore,
    query_max_length: int | None = None,
    document_max_length: int | None = None,
    dtype: str | None = None,
) -> TeacherEmbeddings:
    """Encode every distinct text of ``pairs`` with ``teacher`` (any name ``load_retriever`` takes) once.

    A second call, on this or another process that shares ``stages``, only maps files; a killed one resumes.
    ``dtype``: what the first call computed in, where that was on another machine.
    """
    dtype = dtype or embedding_stage.encoder_dtype()
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    documents = list(dict.fromkeys(text for pair in pairs for text in pair.positives + pair.negatives))
    return TeacherEmbeddings(
        _table(teacher, queries, "query", query_max_length, stages, dtype),
        _table(teacher, documents, "document", document_max_length, stages, dtype),
    )


def _table(
    teacher: str | Path,
    texts: list[str],
    kind: Kind,
    max_length: int | None,
    stages: StageStore,
    dtype: str,
) -> Table:
    from effir_ray.backbones.registry import backbone_fingerprint

    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    shards = embedding_stage.encode_texts(
        stages,
        {"model": backbone_fingerprint(teacher), "dtype": dtype, "data": digest.hexdigest()},
        lambda: embedding_stage.load_encoder(teacher),
        texts,
        kind,
        description=f"Teacher, {kind} texts",
        max_length=max_length,
    )
    return Table({text: row for row, text in enumerate(texts)}, shards)
