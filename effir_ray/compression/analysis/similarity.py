"""How near a query is to a document that answers it, and to one that does not, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effir_ray.compression.calibration import PairBatch, make_pair_batches
from effir_ray.config import Config
from effir_ray.data.pairs import Pair
from effir_ray.encoding.padded import PaddedTexts, hidden_states
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress


class LayerSimilarity(Config):
    """Cosines of pooled hidden states after ``blocks`` blocks (0: the token embeddings): the mean over pairs,
    and between what values the middle half of them lies."""

    blocks: int
    positive: float
    positive_low: float
    positive_high: float
    negative: float
    negative_low: float
    negative_high: float


@torch.inference_mode()
def layer_similarities(
    retriever: Retriever, pairs: Sequence[Pair], *, max_length: int | None = None
) -> list[LayerSimilarity]:
    """One entry for the token embeddings and one for every block (the paper's figures 6 and 7).

    A query's negative is the next pair's document, unless that is its own as well. Hidden states are pooled
    as the model pools its last one, without the final norm. Empty where there are no two pairs of different
    documents.
    """
    if len(pairs) < 2:
        return []
    positives: list[np.ndarray] = []  # (blocks + 1, pairs) a batch
    negatives: list[np.ndarray] = []
    with progress("Comparing queries and documents", unit="batches") as bar:
        for batch in make_pair_batches(retriever, pairs, max_length=max_length):
            queries, documents = (_pooled(retriever, texts) for texts in (batch.queries, batch.documents))
            other = _others(batch).to(documents.device)
            positives.append(cosine_similarity(queries, documents, dim=-1).cpu().numpy())
            cosines = cosine_similarity(queries, documents.roll(-1, dims=1), dim=-1)
            negatives.append(cosines[:, other].cpu().numpy())
            bar.advance()
    if not sum(part.shape[1] for part in negatives):
        return []
    near, far = (np.concatenate(parts, axis=1) for parts in (positives, negatives))
    return [
        LayerSimilarity(
            blocks=blocks, **_spread("positive", near[blocks]), **_spread("negative", far[blocks])
        )
        for blocks in range(len(near))
    ]


def _others(batch: PairBatch) -> Tensor:
    """(pairs,) whether the next pair's document is another one."""
    rows = torch.arange(len(batch))
    return batch.allowed[rows, rows.roll(-1)]


def _pooled(retriever: Retriever, texts: PaddedTexts) -> Tensor:
    """(blocks + 1, texts, hidden) of one forward."""
    mask = texts.attention_mask.to(retriever.model.device)
    streams: dict[int, Tensor] = {}

    def keep(index: int, unit: str, before: Tensor, after: Tensor) -> None:
        if unit == "block":
            if index == 0:
                streams[0] = retriever.pool(before.float(), mask)
            streams[index + 1] = retriever.pool(after.float(), mask)

    with retriever.family.watch(retriever.model, keep):
        hidden_states(retriever, texts)
    return torch.stack([streams[blocks] for blocks in sorted(streams)])


def _spread(name: str, cosines: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(cosines, [0.25, 0.75])
    return {name: float(cosines.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
