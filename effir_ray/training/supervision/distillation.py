"""Embeddings of an uncompressed teacher for every training text, computed once and kept as stages.

A text is known by its digest: of a stream, memory holds neither texts nor embeddings.

The student's loss terms over them are ``losses.EmbeddingDistillation`` and ``losses.SimilarityDistillation``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from effir_ray.data.pair_stream import PairStream
from effir_ray.data.pairs import Pair
from effir_ray.errors import InputError
from effir_ray.models.folder import TextKind
from effir_ray.models.names import backbone_fingerprint
from effir_ray.stages import StageStore
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import Batch
from effir_ray.training.supervision import resumable
from effir_ray.training.supervision.resumable import Shards

_DIGEST_BYTES = 16  # too many for two texts ever to share a digest by chance
_DIGESTS, _ROWS, _FIRSTS = "digests.npy", "rows.npy", "firsts.npy"


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings by text: row ``rows[j]`` of ``shards`` is that of the text of ``digests[j]``, which are
    sorted. All of it is memory-mapped.
    """

    digests: npt.NDArray[np.bytes_]
    rows: npt.NDArray[np.int64]
    shards: Shards

    def lookup(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(len(texts), d). Raises InputError for a text the teacher has not seen."""
        wanted = _digests(texts)
        places = np.minimum(np.searchsorted(self.digests, wanted), len(self.digests) - 1)
        unknown = np.flatnonzero(self.digests[places] != wanted)
        if unknown.size:
            raise InputError(
                f"the teacher has not encoded this training text: '{texts[int(unknown[0])][:80]}'"
            )
        return self.shards.rows(self.rows[places])


@dataclass(frozen=True)
class TeacherEmbeddings:
    """What the teacher says of every query and document of the training pairs."""

    queries: EmbeddingTable
    documents: EmbeddingTable

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

    ``dtype``: ``encoder_dtype`` of the driver.
    """
    if config.distillation.teacher is None or not len(pairs):  # no pairs at all: ``Batches`` says so
        return None
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
    pairs: Sequence[Pair] | PairStream,
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
    dtype = dtype or resumable.encoder_dtype()
    return TeacherEmbeddings(
        _table(teacher, pairs, "query", query_max_length, stages, dtype),
        _table(teacher, pairs, "document", document_max_length, stages, dtype),
    )


def _table(
    teacher: str | Path,
    pairs: Sequence[Pair] | PairStream,
    kind: TextKind,
    max_length: int | None,
    stages: StageStore,
    dtype: str,
) -> EmbeddingTable:
    data = _fingerprint(pairs, kind)
    index = stages.run("teacher_texts", {"data": data, "kind": kind}, partial(_write_index, pairs, kind))
    shards = resumable.encode_texts(
        stages,
        {"model": backbone_fingerprint(teacher), "dtype": dtype, "data": data},
        lambda: resumable.load_encoder(teacher),
        _DistinctTexts(pairs, kind, np.load(index / _FIRSTS, mmap_mode="r")),
        kind,
        description=f"Teacher, {kind} texts",
        max_length=max_length,
    )
    digests, rows = (np.load(index / name, mmap_mode="r") for name in (_DIGESTS, _ROWS))
    return EmbeddingTable(digests, rows, shards)


class _DistinctTexts:
    """The distinct texts of one kind in the order they appear in, read from front to back when asked for.

    ``firsts``: among all texts of the kind, where every distinct one appears first, ascending.
    """

    def __init__(
        self, pairs: Sequence[Pair] | PairStream, kind: TextKind, firsts: npt.NDArray[np.int64]
    ) -> None:
        self._pairs, self._kind, self._firsts = pairs, kind, firsts
        self._ahead, self._next = self._read(), 0

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, part: slice) -> list[str]:
        start, stop, _ = part.indices(len(self))
        if start < self._next:
            self._ahead, self._next = self._read(), 0
        found = list(islice(self._ahead, start - self._next, stop - self._next))
        self._next = stop
        return found

    def _read(self) -> Iterator[str]:
        firsts = iter(self._firsts)
        wanted = next(firsts, None)
        for place, text in enumerate(_texts(self._pairs, self._kind)):
            if place == wanted:
                yield text
                wanted = next(firsts, None)
        if wanted is not None:
            raise InputError("the training pairs changed while the teacher read them; start again")


def _write_index(pairs: Sequence[Pair] | PairStream, kind: TextKind, folder: Path) -> None:
    """The digests of all distinct texts, sorted, the row of each, and what ``_DistinctTexts`` needs."""
    digests, firsts = np.unique(_digests(_texts(pairs, kind)), return_index=True)
    ascending = np.sort(firsts)
    np.save(folder / _DIGESTS, digests)
    np.save(folder / _ROWS, np.searchsorted(ascending, firsts))
    np.save(folder / _FIRSTS, ascending)


def _texts(pairs: Sequence[Pair] | PairStream, kind: TextKind) -> Iterator[str]:
    for pair in pairs.read() if isinstance(pairs, PairStream) else pairs:
        yield from (pair.query,) if kind == "query" else pair.positives + pair.negatives


def _digests(texts: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """(number of texts,)"""
    found = bytearray()
    for text in texts:
        found += hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
    return np.frombuffer(found, dtype=f"S{_DIGEST_BYTES}")


def _fingerprint(pairs: Sequence[Pair] | PairStream, kind: TextKind) -> str:
    """Of what determines the texts; a stream is not read for it."""
    if isinstance(pairs, PairStream):
        return pairs.fingerprint
    return hashlib.sha256(_digests(_texts(pairs, kind)).tobytes()).hexdigest()
