"""Hard negatives by BM25 or by a retriever, with likely false negatives removed by score.

Rule: TopK-PercPos of NV-Retriever (Moreira et al., arXiv 2407.15831, section 3): of the documents ranked for
a query keep the best ones that score below 95 % of the positive's score. Written as
``score < positive - margin * |positive|`` so that it also holds for negative scores; with several positives
the best-scoring one counts, those of other rows that ask the same included. A document with the text of a
positive is never a negative.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from effir_ray.data.datasets import load_dataset
from effir_ray.data.pair_layouts import normalised
from effir_ray.data.pair_stream import is_stream, source_fingerprint
from effir_ray.data.pairs import Pair, load_pairs, shared_positives
from effir_ray.errors import InputError
from effir_ray.evaluation.bm25 import NAME as BM25
from effir_ray.evaluation.bm25 import Rank, bm25_ranker
from effir_ray.evaluation.index import exact_search
from effir_ray.models.names import backbone_fingerprint
from effir_ray.stages import StageStore
from effir_ray.training.supervision.resumable import encode_texts, encoder_dtype, in_chunks, load_encoder

MARGIN = 0.05  # NV-Retriever, table 3: 95 % is its best threshold
DEPTH = 100  # documents looked at for each query


@dataclass(frozen=True)
class Collection:
    """What negatives are drawn from. ``documents`` streams (id, text); ``texts`` looks ids up."""

    ids: list[str]
    texts: Callable[[Sequence[str]], list[str]]
    documents: Callable[[], Iterator[tuple[str, str]]]
    fingerprint: str


def mine(
    source: str | Path,
    *,
    by: str = BM25,
    stages: StageStore,
    split: str = "train",
    negatives: int = 7,
    depth: int = DEPTH,
    margin: float = MARGIN,
) -> Path:
    """Mine hard negatives for the pairs of ``source``; returns a JSONL file for ``load_pairs``.

    ``source``: what ``load_pairs`` takes; a data set's negatives come from its corpus, those of files of
    pairs from all documents in them, which are then in memory. ``by``: ``bm25`` or any model
    ``load_retriever`` takes. A query gets fewer than ``negatives`` where fewer pass the rule, none where its
    positive is not among the best ``depth``.
    A killed run resumes at the last finished chunk; a second run returns at once.
    """
    if not 0 < negatives <= depth:
        raise InputError(f"negatives is {negatives}; expected 1 to depth ({depth})")
    if not 0 <= margin < 1:
        raise InputError(f"margin is {margin:g}; expected a fraction of the positive's score, 0 to 1")
    pairs = load_pairs(source, split=split)
    collection = collect(source, pairs)
    inputs = {
        "data": collection.fingerprint,
        "split": split,
        "by": by if by == BM25 else f"{backbone_fingerprint(by)}-{encoder_dtype()}",
        "negatives": negatives,
        "depth": depth,
        "margin": margin,
        "positives": "of all rows that ask the same",
    }
    shared = shared_positives(pairs)

    def make_process() -> Callable[[Sequence[Pair]], list[Pair]]:
        if by == BM25:
            rank = bm25_ranker([text for _, text in collection.documents()], depth)
        else:
            rank = dense(by, collection, depth, stages)
        return partial(
            mine_pairs,
            rank=rank,
            collection=collection,
            negatives=negatives,
            margin=margin,
            shared=shared,
        )

    return in_chunks(stages, "negatives", inputs, pairs, make_process, description=f"Mining by {by}")


def collect(source: str | Path, pairs: Sequence[Pair]) -> Collection:
    """The data set's corpus, or all documents of the pairs in files."""
    if Path(source).suffix == ".jsonl" or is_stream(str(source)):
        known = {
            name: text
            for pair in pairs
            for name, text in zip(
                pair.positive_ids + pair.negative_ids, pair.positives + pair.negatives, strict=True
            )
        }
        return Collection(
            list(known),
            lambda ids: [known[name] for name in ids],
            lambda: iter(known.items()),
            source_fingerprint(str(source)),
        )
    dataset = load_dataset(source)
    return Collection(
        dataset.corpus.ids,
        dataset.corpus.texts,
        lambda: ((document.id, document.document_text) for document in dataset.corpus.iter_documents()),
        dataset.fingerprint,
    )


def dense(model: str, collection: Collection, depth: int, stages: StageStore) -> Rank:
    """Exact inner-product search by ``model``; the corpus is encoded once, as stages of its own."""
    encoder = load_encoder(model)
    inputs = {
        "data": collection.fingerprint,
        "model": backbone_fingerprint(model),
        "dtype": encoder_dtype(),
    }
    texts = [text for _, text in collection.documents()]
    documents = encode_texts(
        stages, inputs, lambda: encoder, texts, "document", description="Encoding the corpus"
    )

    def rank(queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        embeddings = encoder.encode(queries, "query")
        return exact_search(embeddings, documents, k=min(depth, len(texts)), backend="auto")

    return rank


def hard_negatives(
    scores: Sequence[float],
    candidates: Sequence[str],
    positives: Container[str],
    *,
    negatives: int,
    margin: float,
) -> list[str]:
    """The ids that pass the rule, best first. ``candidates`` (ids) are ranked by ``scores``, best first."""
    positive = max(
        (score for score, name in zip(scores, candidates, strict=True) if name in positives), default=None
    )
    if positive is None:  # it scores below all candidates, so none of them is safely below it
        return []
    bound = positive - margin * abs(positive)
    kept = (
        name
        for score, name in zip(scores, candidates, strict=True)
        if score < bound and name not in positives
    )
    return list(islice(kept, negatives))


def mine_pairs(
    pairs: Sequence[Pair],
    *,
    rank: Rank,
    collection: Collection,
    negatives: int,
    margin: float = MARGIN,
    shared: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Pair]:
    """``pairs`` with new hard negatives from ``collection`` as ranked by ``rank``; old ones and scores go.

    ``shared``: ``shared_positives`` of all pairs, where these are a part of them.
    """
    shared = shared_positives(pairs) if shared is None else shared
    scores, indices = rank([pair.query for pair in pairs])
    mined = []
    for pair, row_scores, row in zip(pairs, scores.tolist(), indices.tolist(), strict=True):
        candidates = [collection.ids[index] for index in row]
        positives = shared.get(normalised(pair.query)) or dict(
            zip(pair.positive_ids, pair.positives, strict=True)
        )
        # A few spare ones: copies of a positive under another id are only seen in the texts.
        chosen = hard_negatives(row_scores, candidates, positives, negatives=negatives + 3, margin=margin)
        texts = dict(zip(chosen, collection.texts(chosen), strict=True))
        known = frozenset(map(normalised, positives.values()))
        kept = [name for name in chosen if texts[name].strip() and normalised(texts[name]) not in known]
        kept = kept[:negatives]
        mined.append(
            replace(
                pair,
                negatives=tuple(texts[name] for name in kept),
                negative_ids=tuple(kept),
                teacher_scores=None,
            )
        )
    return mined
