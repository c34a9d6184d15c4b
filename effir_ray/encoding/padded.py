"""The padded forward pass: any family, any device; what the packed passes are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effir_ray.models.retriever import Retriever


class PaddedForward:
    """Embeds token lists through the model's own forward, padded on the right to the longest of the batch."""

    padded = True
    copied_bytes = 0  # it computes with the model itself

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        # A decoder would fill a key-value cache that nobody reads.
        self._options = {"use_cache": False} if retriever.family.causal else {}

    def __call__(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """b token lists -> embeddings (b, d) on the model's device."""
        device = self._retriever.model.device
        longest = max(len(ids) for ids in tokens)
        input_ids = torch.zeros(len(tokens), longest, dtype=torch.long)  # (b, t)
        mask = torch.zeros(len(tokens), longest, dtype=torch.long)  # (b, t)
        for row, ids in enumerate(tokens):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        input_ids, mask = input_ids.to(device), mask.to(device)
        output = self._retriever.model(input_ids=input_ids, attention_mask=mask, **self._options)
        return self._retriever.pool(output.last_hidden_state, mask)
