"""Training pairs: queries with relevant documents and hard negatives, from data sets or JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from effir_ray.errors import InputError
from effir_ray.training.pair_layouts import Pair, parse_pair

__all__ = ["Pair", "load_pairs", "shuffled", "write_pairs"]


def load_pairs(
    source: str | Path,
    *,
    split: str = "train",
    hard_negatives: int | None = None,
) -> list[Pair]:
    """Every training pair of ``source``, in the source's order.

    ``source`` is a ``.jsonl`` file (a layout of ``pair_layouts``; what ``effir-ray mine`` and ``annotate``
    write), a BEIR folder or ``stdlib``. Data sets give the pairs of ``split`` without negatives: held-out dev
    queries are no part of ``train`` there, and mining starts from the same pairs, so a model is never
    trained on a query that chooses it. ``hard_negatives`` keeps at most so many negatives a query.

    Raises InputError naming file, line and field.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        if split != "train":
            raise InputError(f"{path}: a JSONL file holds training pairs only; found split '{split}'")
        pairs = list(read_jsonl(path))
    elif path.suffix in (".json", ".parquet", ".tsv", ".csv"):
        raise InputError(f"{path}: expected a .jsonl file, a BEIR folder or 'stdlib' here")
    else:
        pairs = _from_dataset(str(source), split)
    if not pairs:
        raise InputError(f"{source}: no training pairs in split '{split}'")
    return [pair.with_negatives(hard_negatives) for pair in pairs]


def read_jsonl(path: Path) -> Iterator[Pair]:
    """The pairs of a JSONL file, line by line; blank lines are passed over."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_line(line, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def parse_line(line: str, where: str) -> Pair:
    """One line of JSON as a pair; ``where`` (``file:line``) opens the message of the InputError."""
    try:
        return parse_pair(json.loads(line))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """One line a pair in Tevatron's layout, plus ``teacher_scores`` where known."""
    with path.open("w", encoding="utf-8") as out:
        for pair in pairs:
            out.write(to_json(pair) + "\n")


def to_json(pair: Pair) -> str:
    """The line of ``write_pairs`` for one pair; titles are already joined to their texts."""
    record: dict[str, object] = {
        "query_id": pair.query_id,
        "query": pair.query,
        "positive_passages": _passages(pair.positive_ids, pair.positives),
        "negative_passages": _passages(pair.negative_ids, pair.negatives),
    }
    if pair.teacher_scores is not None:
        record["teacher_scores"] = pair.teacher_scores
    return json.dumps(record, ensure_ascii=False)


def shuffled(pairs: Sequence[Pair], *, seed: int, epoch: int = 0) -> list[Pair]:
    """A permutation of ``pairs`` that depends on (seed, epoch) alone, the same on every rank and platform."""
    order = np.random.default_rng((seed, epoch)).permutation(len(pairs))
    return [pairs[index] for index in order]


def _from_dataset(source: str, split: str) -> list[Pair]:
    from effir_ray.retrieval.datasets import load_dataset

    dataset = load_dataset(source)
    queries, qrels = dataset.queries(split), dataset.qrels(split)
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


def _passages(ids: Sequence[str], texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"docid": name, "title": "", "text": text} for name, text in zip(ids, texts, strict=True)]
