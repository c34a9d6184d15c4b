"""From pairs to tensors: the same batches in the same order for the same seed, tokenised beside the training.

Which pair, positive and negatives a step sees depends on (seed, epoch) alone, not on the number of ranks:
rank r of w takes every w-th pair of the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from effir_ray.data.pair_layouts import normalised
from effir_ray.data.pair_stream import PairStream, Survey, take_survey
from effir_ray.data.pairs import Pair, shared_positives, shuffled
from effir_ray.errors import InputError
from effir_ray.training.config import TrainConfig

Tokenize = Callable[[Sequence[str], str], list[list[int]]]  # texts, "query" | "document" -> token ids


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a step: b queries, and for each its positive and then its hard negatives (k in
    all).

    tokens: b lists of token ids of the queries, then b * k of the documents (k of the first query first).
    document_ids (b, k, 2): 64-bit hashes of a document's id and of its text, since copies have ids of their
    own; positive_ids: both of all known positives of a query, also from other rows that ask the same (of a
    stream, other rows of the batch).
    teacher_scores (b, k): NaN where there are none. texts: as ``tokens``, for a teacher's embeddings.
    number: the 0-based step of the run.
    """

    tokens: list[list[int]]
    texts: list[str]
    document_ids: Tensor
    positive_ids: list[Tensor]
    teacher_scores: Tensor
    number: int = 0

    @property
    def n_queries(self) -> int:
        return self.document_ids.shape[0]

    @property
    def n_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.tokens)


class Batches:
    """All steps of a run, from any step on. ``steps``, ``epoch_steps``: optimizer steps in the run, an epoch;
    ``last``: the one after which it ends, on the way to ``steps`` or there.

    The last pairs of an epoch that fill no batch are left out (another shuffle leaves out others).
    """

    def __init__(
        self,
        pairs: Sequence[Pair] | PairStream,
        config: TrainConfig,
        tokenize: Tokenize,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(pairs) < config.batch_size:
            raise InputError(
                f"{config.dataset}: {len(pairs)} training pairs are fewer than batch_size "
                f"{config.batch_size}; use a smaller batch_size"
            )
        self._pairs, self._config, self._tokenize = pairs, config, tokenize
        self._rank, self._world = rank, world
        survey = check_labels(config, pairs)
        self.negatives = min(config.hard_negatives, survey.negatives)
        self.epoch_steps = len(pairs) // config.batch_size
        self.steps = config.steps or max(1, round(config.epochs * self.epoch_steps))
        self.last = config.stop_after or self.steps
        self.has_teacher_scores = survey.scored
        self._shared = {} if isinstance(pairs, PairStream) else shared_positives(pairs)

    @property
    def note(self) -> str:
        """What the settings ask of the data and it has not got; empty where it has."""
        if self.negatives or not self._config.hard_negatives or not self._config.info_nce:
            return ""
        by = self._config.negatives
        advice = "negatives: bm25 finds some" if by == "given" else f"negatives: {by} found none"
        return f"no negatives in the data: in-batch negatives alone; {advice}"

    def run(self, start: int = 0) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``last``; the next one is tokenised while this one trains."""
        with ThreadPoolExecutor(1) as executor:
            upcoming = None
            for number, examples in enumerate(self._examples(start), start=start):
                following = executor.submit(self._collate, examples, number)
                if upcoming is not None:
                    yield upcoming.result()
                upcoming = following
            if upcoming is not None:
                yield upcoming.result()

    def _examples(self, start: int) -> Iterator[list[Example]]:
        """This rank's examples of every step."""
        size = self._config.batch_size
        pairs: Iterator[Pair] = iter(())
        for step in range(start, self.last):
            epoch, at = divmod(step, self.epoch_steps)
            if step == start or at == 0:
                pairs = self._epoch(epoch, at * size)
            random = np.random.default_rng((self._config.seed, 1, step))
            batch = self._chosen(list(islice(pairs, size)), random)
            _fill(batch, self.negatives, random)
            yield batch[self._rank :: self._world]

    def _chosen(self, pairs: list[Pair], random: np.random.Generator) -> list[Example]:
        shared = shared_positives(pairs) if isinstance(self._pairs, PairStream) else self._shared
        return [
            _choose(pair, self.negatives, random, shared.get(normalised(pair.query), {})) for pair in pairs
        ]

    def _epoch(self, epoch: int, skip: int) -> Iterator[Pair]:
        """The pairs of an epoch in its order, the same on every rank, without the first ``skip``."""
        if isinstance(self._pairs, PairStream):
            return self._pairs.epoch(seed=self._config.seed, epoch=epoch, skip=skip)
        return iter(shuffled(self._pairs, seed=self._config.seed, epoch=epoch)[skip:])

    def _collate(self, examples: list[Example], number: int) -> Batch:
        queries = [example.query for example in examples]
        documents = [text for example in examples for text in example.texts]
        return Batch(
            tokens=self._tokenize(queries, "query") + self._tokenize(documents, "document"),
            texts=queries + documents,
            document_ids=torch.tensor(
                [[_identity(*each) for each in zip(e.ids, e.texts, strict=True)] for e in examples]
            ),
            positive_ids=[
                torch.tensor([_identity(*each) for each in e.positives]).flatten() for e in examples
            ],
            teacher_scores=torch.tensor([example.scores for example in examples]),
            number=number,
        )


def check_labels(config: TrainConfig, pairs: Sequence[Pair] | PairStream) -> Survey:
    """The survey of ``pairs``. Raises InputError for texts without queries where InfoNCE is to learn them."""
    survey = pairs.survey if isinstance(pairs, PairStream) else take_survey(pairs)
    if survey.texts and config.info_nce:
        raise InputError(
            f"{config.dataset}: texts without queries teach no contrast: set info_nce: 0, and distillation "
            "with a teacher and an embedding weight"
        )
    return survey


@dataclass
class Example:
    """What one step shows of a pair: a positive, then hard negatives; ids and scores parallel to texts.

    ``positives``: (id, text) of all known ones.
    """

    query: str
    texts: list[str]
    ids: list[str]
    scores: list[float]
    positives: tuple[tuple[str, str], ...]


def _choose(pair: Pair, negatives: int, random: np.random.Generator, shared: Mapping[str, str]) -> Example:
    """One of the positives, and ``negatives`` of the hard negatives (all, if there are fewer), by chance.

    ``shared``: id -> text of the positives of all rows that ask the same, where there are several.
    """
    n_positives = len(pair.positives)
    positive = int(random.integers(n_positives))
    count = min(negatives, len(pair.negatives))
    chosen = sorted(random.permutation(len(pair.negatives))[:count].tolist())
    missing = (float("nan"),) * (n_positives + len(pair.negatives))
    scores = pair.teacher_scores or missing
    return Example(
        query=pair.query,
        texts=[pair.positives[positive], *(pair.negatives[index] for index in chosen)],
        ids=[pair.positive_ids[positive], *(pair.negative_ids[index] for index in chosen)],
        scores=[scores[positive], *(scores[n_positives + index] for index in chosen)],
        positives=tuple(shared.items()) or tuple(zip(pair.positive_ids, pair.positives, strict=True)),
    )


def _fill(batch: list[Example], negatives: int, random: np.random.Generator) -> None:
    """Hard negatives that are lacking become other queries' positives: every rank needs equal shapes."""
    firsts = [(example.texts[0], example.ids[0]) for example in batch]
    for example in batch:
        while len(example.texts) < 1 + negatives:
            text, name = firsts[int(random.integers(len(firsts)))]
            example.texts.append(text)
            example.ids.append(name)
            example.scores.append(float("nan"))


def _identity(name: str, text: str) -> tuple[int, int]:
    """What tells whether two documents are one: either number is enough."""
    return hash64(name), text_hash(text)


def hash64(name: str) -> int:
    """A document id as a signed 64-bit number: ids of all ranks meet in one tensor."""
    return _hash64(name, b"id")


@lru_cache(maxsize=1 << 14)  # most texts come back: as negatives, in the next epoch, as one of many positives
def text_hash(text: str) -> int:
    """The same of a text, of all its copies alike."""
    return _hash64(normalised(text), b"text")


def _hash64(value: str, kind: bytes) -> int:
    digest = hashlib.blake2b(value.encode(), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "big", signed=True)
