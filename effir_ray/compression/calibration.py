"""Calibration texts as padded batches, made as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever

if TYPE_CHECKING:
    from effir_ray.data.datasets import Dataset
    from effir_ray.data.pairs import Pair as TrainingPair

TEMPERATURE = 0.02  # of the paper's InfoNCE
WINDOW = 512  # texts tokenised and sorted by length at a time: bounds memory, keeps padding low


class Pair(Protocol):
    """A query and what answers it; only the first positive is used."""

    @property
    def query(self) -> str: ...

    @property
    def positives(self) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded texts; both tensors (batch, tokens), int64, the mask 1 on real tokens."""

    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Row i of ``documents`` answers row i of ``queries``; the other rows are its in-batch negatives.

    same: (batch, batch) bool, True off the diagonal where two rows have one document: no negatives of each
    other.
    """

    queries: Batch
    documents: Batch
    same: Tensor

    def __len__(self) -> int:
        return len(self.queries)


def make_batches(
    retriever: Retriever,
    texts: Sequence[str],
    *,
    kind: Literal["query", "document"] = "document",
    token_budget: int = 4096,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """Batches of at most ``token_budget`` tokens, padding included (one text may exceed it alone).

    The partition depends on the texts only, so results do not depend on who works on which batch.
    """
    for start in range(0, len(texts), WINDOW):
        tokens = retriever.tokenize(list(texts[start : start + WINDOW]), kind, max_length)
        group: list[list[int]] = []
        for text in sorted((text for text in tokens if text), key=len, reverse=True):
            if group and (len(group) + 1) * len(group[0]) > token_budget:
                yield pad(retriever, group)
                group = []
            group.append(text)
        if group:
            yield pad(retriever, group)


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
    positives = [pair.positives[0] for pair in pairs]
    queries = retriever.tokenize([pair.query for pair in pairs], "query", max_length)
    documents = retriever.tokenize(positives, "document", max_length)
    numbers: dict[str, int] = {}
    identity = torch.tensor([numbers.setdefault(text, len(numbers)) for text in positives])
    same = (identity[:, None] == identity[None, :]).fill_diagonal_(False)
    return PairBatch(queries=pad(retriever, queries), documents=pad(retriever, documents), same=same)


def pad(retriever: Retriever, tokens: Sequence[Sequence[int]]) -> Batch:
    """Right padding to the longest text; on the CPU, so that a batch can travel to a worker."""
    width = max(1, *(len(text) for text in tokens))
    input_ids = torch.full((len(tokens), width), retriever.tokenizer.pad_token_id or 0, dtype=torch.long)
    attention_mask = torch.zeros((len(tokens), width), dtype=torch.long)
    for row, text in enumerate(tokens):
        input_ids[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        attention_mask[row, : len(text)] = 1
    return Batch(input_ids=input_ids, attention_mask=attention_mask)


def run(retriever: Retriever, batch: Batch) -> Tensor:
    """Final hidden states, (batch, tokens, hidden)."""
    options = {"use_cache": False} if retriever.family.causal else {}
    device = retriever.model.device
    output = retriever.model(
        input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), **options
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def embed(retriever: Retriever, batch: Batch) -> Tensor:
    """Pooled text vectors, (batch, hidden); differentiable."""
    return retriever.pool(run(retriever, batch), batch.attention_mask.to(retriever.model.device))


def pair_loss(queries: Tensor, documents: Tensor, same: Tensor) -> Tensor:
    """Mean InfoNCE over in-batch negatives on cosine similarity (the paper's retrieval loss).

    queries, documents: (batch, hidden), row i of one answers row i of the other; same: see PairBatch.
    """
    queries = torch.nn.functional.normalize(queries.float(), dim=-1)
    documents = torch.nn.functional.normalize(documents.float(), dim=-1)
    similarity = queries @ documents.T / TEMPERATURE  # (batch, batch)
    similarity = similarity.masked_fill(same.to(similarity.device), float("-inf"))
    return torch.nn.functional.cross_entropy(similarity, torch.arange(len(queries), device=queries.device))


def draw_texts(dataset: Dataset, count: int, seed: int) -> list[str]:
    """Documents drawn by hash of their id: task-agnostic text, no labels (paper section 3.1)."""
    ids = dataset.corpus.ids
    drawn = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return dataset.corpus.texts(drawn[:count])


def draw_pairs(dataset: str, count: int, seed: int, *, split: str = "train") -> list[TrainingPair]:
    """Pairs of the data set, shuffled: train pairs to learn gates from, dev pairs for the dev loss."""
    from effir_ray.data.pairs import load_pairs, shuffled

    return list(shuffled(load_pairs(dataset, split=split), seed=seed)[:count])
