"""Dev and test stay held out however training pairs are given: none of them asks what a query there asks.

Data sets keep these queries out of ``train`` themselves; files of pairs and other data sets know nothing of
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effir_ray.data.pair_layouts import normalised
from effir_ray.data.pair_stream import PairStream, Survey, is_stream
from effir_ray.data.pairs import Pair, check_split, held_out_questions, load_pairs
from effir_ray.training.config import TrainConfig

if TYPE_CHECKING:
    from effir_ray.data.datasets import Dataset


def dev_dataset(config: TrainConfig) -> Dataset | None:
    """The data set whose dev split chooses the weights; None where none does."""
    if config.dev is None:
        return None
    from effir_ray.data.datasets import load_dataset

    return load_dataset(config.dev.dataset or config.dataset)


def held_out_by(config: TrainConfig) -> frozenset[str]:
    """The dev and test questions (as ``normalised`` writes them) of what ``dev`` and ``held_out`` name."""
    from effir_ray.data.datasets import load_dataset

    dev = None if config.dev is None else config.dev.dataset or config.dataset
    names = {name for name in (dev, config.held_out) if name is not None}
    return frozenset().union(*(held_out_questions(load_dataset(name)) for name in names))


def training_pairs(
    source: str, split: str, held_out: frozenset[str], *, survey: Survey | None = None
) -> tuple[list[Pair] | PairStream, int]:
    """The pairs of ``source`` that ask no question of ``held_out``, and how many do.

    ``survey``: of a stream, what ``survey_stream`` said.
    """
    if is_stream(source):
        check_split(source, split)
        stream = PairStream(source, held_out=held_out, survey=survey)
        return stream, stream.survey.left_out
    pairs = load_pairs(source, split=split)
    kept = [pair for pair in pairs if normalised(pair.query) not in held_out]
    return kept, len(pairs) - len(kept)


def survey_stream(source: str, held_out: frozenset[str]) -> Survey | None:
    """What workers need to know of a stream, found once; None of what is no stream."""
    return PairStream(source, held_out=held_out).survey if is_stream(source) else None
