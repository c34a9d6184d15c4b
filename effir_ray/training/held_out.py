"""Dev stays held out however training pairs are given: none of them asks what a dev query asks.

Data sets keep their dev queries out of ``train`` themselves, by id; files of pairs know nothing of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effir_ray.training.config import TrainConfig
from effir_ray.training.pairs import Pair
from effir_ray.training.streaming import PairStream, is_stream, open_pairs

if TYPE_CHECKING:
    from effir_ray.retrieval.datasets import Dataset


def dev_dataset(config: TrainConfig) -> Dataset | None:
    """The data set whose dev split chooses the weights; None where none does."""
    if config.dev is None:
        return None
    from effir_ray.retrieval.datasets import load_dataset

    return load_dataset(config.dev.dataset or config.dataset)


def training_pairs(
    source: str, split: str, dev: Dataset | None, *, left_out: int = 0
) -> tuple[list[Pair] | PairStream, int]:
    """The pairs of ``source`` without those whose query has the text of a dev query, and how many those are.

    ``left_out``: of a stream, what ``count_left_out`` said.
    """
    pairs, queries = open_pairs(source, split=split), _queries(dev)
    if isinstance(pairs, PairStream):
        return pairs.without(queries, left_out), left_out
    kept = [pair for pair in pairs if pair.query not in queries]
    return kept, len(pairs) - len(kept)


def count_left_out(source: str, dev: Dataset | None) -> int:
    """How many pairs of a stream ``training_pairs`` leaves out (it takes a pass); 0 of what is no stream."""
    return PairStream(source).count(_queries(dev)) if dev is not None and is_stream(source) else 0


def _queries(dev: Dataset | None) -> frozenset[str]:
    return frozenset() if dev is None else frozenset(dev.queries("dev").values())
