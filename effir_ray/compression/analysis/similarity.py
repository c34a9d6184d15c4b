"""How near a query is to a document that answers it, and to one that does not, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effir_ray.config import Config
from effir_ray.data.pairs import Pair
from effir_ray.encoding.batching import token_budget_batches
from effir_ray.encoding.padded import hidden_states, pad
from effir_ray.models.folder import TextKind
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress

TOKEN_BUDGET = 4096


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
    positives = [pair.positives[0] for pair in pairs]
    answers = torch.tensor([positives.index(text) for text in positives], dtype=torch.long)
    other = answers != answers.roll(-1)
    if not other.any():
        return []
    queries = _pooled(retriever, [pair.query for pair in pairs], "query", max_length)
    documents = _pooled(retriever, positives, "document", max_length)
    near = cosine_similarity(queries, documents, dim=-1).numpy()
    far = cosine_similarity(queries, documents.roll(-1, dims=1), dim=-1)[:, other].numpy()
    return [
        LayerSimilarity(
            blocks=blocks, **_spread("positive", near[blocks]), **_spread("negative", far[blocks])
        )
        for blocks in range(len(near))
    ]


def _pooled(retriever: Retriever, texts: Sequence[str], kind: TextKind, max_length: int | None) -> Tensor:
    """(blocks + 1, texts, hidden) on the CPU: the stream before the first block and after each."""
    tokens = retriever.tokenize(texts, kind, max_length)
    found: dict[int, list[Tensor]] = {}
    places: list[int] = []
    mask = torch.empty(0)

    def keep(index: int, unit: str, before: Tensor, after: Tensor) -> None:
        if unit == "block":
            if index == 0:
                found.setdefault(0, []).append(retriever.pool(before.float(), mask).cpu())
            found.setdefault(index + 1, []).append(retriever.pool(after.float(), mask).cpu())

    with (
        retriever.family.watch(retriever.model, keep),
        progress("Comparing queries and documents", unit="texts", total=len(tokens)) as bar,
    ):
        for batch in token_budget_batches([len(text) for text in tokens], TOKEN_BUDGET):
            padded = pad([tokens[place] for place in batch]).to(retriever.model.device)
            mask = padded.attention_mask
            hidden_states(retriever, padded)
            places += batch
            bar.advance(len(batch))
    order = torch.tensor(places).argsort()
    return torch.stack([torch.cat(found[blocks])[order] for blocks in sorted(found)])


def _spread(name: str, cosines: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(cosines, [0.25, 0.75])
    return {name: float(cosines.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
