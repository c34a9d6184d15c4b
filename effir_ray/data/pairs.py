"""Training pairs: queries with relevant documents and hard negatives, from data sets or JSONL files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pair_layouts import Pair, normalised, parse_line, to_json
from effir_ray.data.pair_stream import PairStream, is_stream
from effir_ray.errors import InputError
from effir_ray.readers import read_lines

__all__ = ["Pair", "load_pairs", "shared_positives", "shuffled", "write_pairs"]


def load_pairs(
    source: str | Path,
    *,
    split: str = "train",
    hard_negatives: int | None = None,
    texts: bool = False,
) -> list[Pair]:
    """Every training pair of ``source``, in the source's order.

    ``source`` is a ``.jsonl`` file (a layout of ``pair_layouts``; what ``effir-ray mine`` and ``annotate``
    write), whatever ``streaming`` reads (all of it is then in memory), a BEIR folder or ``stdlib``. Data sets
    give the pairs of ``split`` without negatives; ``train`` asks nothing that a dev or test query asks, and
    mining starts from the same pairs, so a model is never trained on a query that chooses or reports it.
    ``hard_negatives`` keeps at most so many negatives a query. ``texts``: whether texts without queries (a
    corpus) will do, each beside a query-like part of itself.

    Raises InputError naming file, line and field.
    """
    path = Path(source)
    if path.suffix == ".jsonl" or is_stream(str(source)):
        check_split(source, split)
        pairs = list(PairStream(str(source)).read() if is_stream(str(source)) else read_jsonl(path))
    elif path.suffix in (".json", ".tsv", ".csv"):
        raise InputError(f"{path}: expected .jsonl or .parquet files, a BEIR folder or 'stdlib' here")
    else:
        pairs = _from_dataset(str(source), split)
    if not pairs:
        raise InputError(f"{source}: no training pairs in split '{split}'")
    if not texts and not all(pair.labelled for pair in pairs):
        raise InputError(f"{source}: texts without queries; expected pairs of a query and its positives here")
    return [pair.with_negatives(hard_negatives) for pair in pairs]


def check_split(source: str | Path, split: str) -> None:
    """Raise InputError where files of pairs are asked for another split than ``train``."""
    if split != "train":
        raise InputError(f"{source}: pair files hold training pairs only; found split '{split}'")


def read_jsonl(path: Path) -> Iterator[Pair]:
    """The pairs of a JSONL file, line by line; blank lines are passed over."""
    for number, _, raw in read_lines(path):
        yield parse_line(raw, f"{path}:{number}")


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """One line a pair in Tevatron's layout, plus ``teacher_scores`` where known."""
    with path.open("w", encoding="utf-8") as out:
        for pair in pairs:
            out.write(to_json(pair) + "\n")


def shuffled(pairs: Sequence[Pair], *, seed: int, epoch: int = 0) -> list[Pair]:
    """A permutation of ``pairs`` that depends on (seed, epoch) alone, the same on every rank and platform."""
    order = np.random.default_rng((seed, epoch)).permutation(len(pairs))
    return [pairs[index] for index in order]


def shared_positives(pairs: Sequence[Pair]) -> dict[str, dict[str, str]]:
    """``normalised`` -> id -> text of all positives of the questions that several pairs ask.

    One row a positive is a usual layout; what one row knows to be relevant is no negative of another.
    """
    rows = Counter(normalised(pair.query) for pair in pairs)
    known: dict[str, dict[str, str]] = {question: {} for question, count in rows.items() if count > 1}
    for pair in pairs:
        if (found := known.get(normalised(pair.query))) is not None:
            found.update(zip(pair.positive_ids, pair.positives, strict=True))
    return known


def held_out_questions(dataset: Dataset) -> frozenset[str]:
    """``normalised`` of every query of the splits that are not trained on."""
    splits = (split for split in dataset.splits if split != "train")
    return frozenset(normalised(query) for split in splits for query in dataset.queries(split).values())


def _from_dataset(source: str, split: str) -> list[Pair]:
    dataset = load_dataset(source)
    queries, qrels = dataset.queries(split), dataset.qrels(split)
    if split == "train":  # splits are disjoint by id; two ids may ask the same
        held_out = held_out_questions(dataset)
        queries = {name: query for name, query in queries.items() if normalised(query) not in held_out}
    relevant = {
        name: sorted(
            (i for i, grade in qrels[name].items() if grade > 0 and i in dataset.corpus.position),
            key=lambda i: (-qrels[name][i], i),
        )
        for name in queries
    }
    ids = sorted({i for chosen in relevant.values() for i in chosen}, key=dataset.corpus.position.__getitem__)
    texts = dict(zip(ids, dataset.corpus.texts(ids), strict=True))
    pairs = []
    for name, query in queries.items():
        chosen = [i for i in relevant[name] if texts[i].strip()]
        if chosen:
            positives = tuple(texts[i] for i in chosen)
            pairs.append(Pair(name, query, positives, positive_ids=tuple(chosen)))
    return pairs
