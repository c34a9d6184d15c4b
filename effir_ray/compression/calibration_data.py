"""Texts and pairs for importance and neuron scores, drawn from a retrieval data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from effir_ray.compression.schedule import Criterion
from effir_ray.errors import InputError

if TYPE_CHECKING:
    from effir_ray.compression.analysis import Analysis
    from effir_ray.retrieval.datasets import Dataset
    from effir_ray.training.pairs import Pair


def draw_texts(dataset: Dataset, count: int, seed: int) -> list[str]:
    """Documents drawn by hash of their id: task-agnostic text, no labels (paper section 3.1)."""
    ids = dataset.corpus.ids
    drawn = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return dataset.corpus.texts(drawn[:count])


def draw_pairs(dataset: str, count: int, seed: int, *, split: str = "train") -> list[Pair]:
    """Pairs of the data set, shuffled: train pairs to learn gates from, dev pairs for the dev loss."""
    from effir_ray.training.pairs import load_pairs, shuffled

    return list(shuffled(load_pairs(dataset, split=split), seed=seed)[:count])


def analyze_on(
    dataset: str,
    backbone: str,
    out: Path,
    *,
    texts: int = 256,
    criteria: Sequence[str] = ("cosine",),
    first_blocks: int | None = None,
    seed: int = 0,
) -> Analysis:
    """``analyze`` with ``texts`` documents of ``dataset``; pooled adds dev queries, dev-loss dev pairs.

    Raises InputError for an unknown criterion.
    """
    from effir_ray.compression.analysis import analyze
    from effir_ray.retrieval.datasets import load_dataset

    asked = tuple(name.strip() for name in criteria)
    unknown = [name for name in asked if name not in get_args(Criterion)]
    if unknown:
        known = ", ".join(get_args(Criterion))
        raise InputError(f"unknown importance criterion '{unknown[0]}'; expected one of {known}")
    data = load_dataset(dataset)
    return analyze(
        backbone,
        out,
        texts=draw_texts(data, texts, seed),
        queries=list(data.queries("dev").values())[:texts] if "pooled" in asked else (),
        pairs=draw_pairs(dataset, texts, seed, split="dev") if "dev-loss" in asked else (),
        criteria=cast("tuple[Criterion, ...]", asked),
        first_blocks=first_blocks,
        seed=seed,
    )
