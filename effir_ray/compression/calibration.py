"""Calibration texts as padded batches, made as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effir_ray.contrastive import TEMPERATURE, info_nce
from effir_ray.data.datasets import Dataset
from effir_ray.data.pairs import Pair, load_pairs, shuffled
from effir_ray.encoding.batching import token_budget_batches
from effir_ray.encoding.padded import PaddedTexts, pad
from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever

WINDOW = 512  # texts tokenised and sorted by length at a time: bounds memory, keeps padding low


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Row i of ``documents`` answers row i of ``queries``; the other rows are its in-batch negatives.

    allowed: (batch, batch) bool, False off the diagonal where two rows have one document: no negatives of
    each other.
    """

    queries: PaddedTexts
    documents: PaddedTexts
    allowed: Tensor

    def __len__(self) -> int:
        return len(self.queries)


def make_batches(
    retriever: Retriever,
    texts: Sequence[str],
    *,
    kind: Literal["query", "document"] = "document",
    token_budget: int = 4096,
    max_length: int | None = None,
) -> Iterator[PaddedTexts]:
    """Batches of at most ``token_budget`` tokens, padding included (one text may exceed it alone).

    The partition depends on the texts only.
    """
    for start in range(0, len(texts), WINDOW):
        tokens = retriever.tokenize(texts[start : start + WINDOW], kind, max_length)
        for batch in token_budget_batches([len(text) for text in tokens], token_budget):
            yield pad([tokens[index] for index in batch])


def make_pair_batches(
    retriever: Retriever, pairs: Sequence[Pair], *, batch_size: int = 32, max_length: int | None = None
) -> Iterator[PairBatch]:
    """Consecutive pairs, ``batch_size`` at a time; a lone last pair is left out (it has no negatives)."""
    check_pairs(pairs)
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        if len(chosen) > 1:
            yield pair_batch(retriever, chosen, max_length=max_length)


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Raises InputError when there are too few pairs for a contrastive loss."""
    if len(pairs) < 2:
        raise InputError(
            f"{len(pairs)} training pairs; a contrastive loss needs at least 2 (query, positive) pairs"
        )


def pair_batch(retriever: Retriever, pairs: Sequence[Pair], *, max_length: int | None = None) -> PairBatch:
    """Queries and their first positives."""
    positives = [pair.positives[0] for pair in pairs]
    queries = retriever.tokenize([pair.query for pair in pairs], "query", max_length)
    documents = retriever.tokenize(positives, "document", max_length)
    numbers: dict[str, int] = {}
    identity = torch.tensor([numbers.setdefault(text, len(numbers)) for text in positives])
    allowed = (identity[:, None] != identity[None, :]).fill_diagonal_(True)
    return PairBatch(queries=pad(queries), documents=pad(documents), allowed=allowed)


def pair_loss(queries: Tensor, documents: Tensor, allowed: Tensor) -> Tensor:
    """InfoNCE over in-batch negatives (the paper's retrieval loss), differentiable.

    queries, documents: (batch, hidden), row i of one answers row i of the other; allowed: see PairBatch.
    """
    return info_nce(
        queries.float(),
        documents.float(),
        positives=torch.arange(len(queries), device=queries.device),
        allowed=allowed.to(queries.device),
        temperature=TEMPERATURE,
    )


def draw_texts(dataset: Dataset, count: int, seed: int) -> list[str]:
    """Documents drawn by hash of their id: task-agnostic text, no labels (paper section 3.1)."""
    ids = dataset.corpus.ids
    drawn = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return dataset.corpus.texts(drawn[:count])


def draw_pairs(dataset: str, count: int, seed: int, *, split: str = "train") -> list[Pair]:
    """Pairs of the data set, shuffled: train pairs to learn gates from, dev pairs for the dev loss."""
    return list(shuffled(load_pairs(dataset, split=split), seed=seed)[:count])
