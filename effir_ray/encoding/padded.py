"""The padded forward pass: any family, any device, differentiable; what packed passes are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from effir_ray.models.retriever import Retriever


@dataclass(frozen=True, kw_only=True)
class PaddedTexts:
    """Right-padded texts; both tensors (texts, tokens), int64, the mask 1 on real tokens."""

    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> PaddedTexts:
        return PaddedTexts(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


def pad(texts: Sequence[Sequence[int] | Tensor]) -> PaddedTexts:
    """Token lists (or (tokens,) tensors, whose device is kept) to the longest of them.

    Padding is token 0 for every model: the mask hides it, so no real token depends on which it is.
    """
    rows = [torch.as_tensor(tokens, dtype=torch.long) for tokens in texts]
    return PaddedTexts(
        input_ids=pad_sequence(rows, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    )


def hidden_states(retriever: Retriever, texts: PaddedTexts) -> Tensor:
    """Final hidden states, (texts, tokens, hidden), of the model as it is: hooks, gates and all."""
    texts = texts.to(retriever.model.device)
    # A decoder would fill a key-value cache that nobody reads.
    options = {"use_cache": False} if retriever.family.causal else {}
    output = retriever.model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, **options)
    hidden: Tensor = output.last_hidden_state
    return hidden


def embed(retriever: Retriever, texts: PaddedTexts) -> Tensor:
    """Text vectors, (texts, dimension), pooled as the retriever pools."""
    texts = texts.to(retriever.model.device)
    return retriever.pool(hidden_states(retriever, texts), texts.attention_mask)


class PaddedForward:
    """Embeds token lists through the model's own forward."""

    padded = True
    copied_bytes = 0  # it computes with the model itself

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    def __call__(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """b token lists -> embeddings (b, d) on the model's device."""
        return embed(self._retriever, pad(tokens))
