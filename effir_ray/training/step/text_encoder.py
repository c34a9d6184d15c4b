"""The model as it is trained: texts of a pass one after the other, without padding where the family allows.

All linear layers then work on real tokens alone, in one large product a pass, and attention runs inside each
text (``encoding.varlen_attention``). The model's own modules compute everything else, so that adapters,
hooks, gradient checkpointing and ZeRO's partitions work as in any Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from effir_ray.encoding.padded import embed, pad
from effir_ray.encoding.varlen_attention import Packing, attend, has_flash, pool
from effir_ray.models.retriever import Retriever

_NAME = "effir_packed"
_packed: ContextVar[bool] = ContextVar("packed", default=False)


class TextEncoder(nn.Module):
    """The model and its pooling as one module: engines wrap exactly what is trained."""

    def __init__(self, retriever: Retriever) -> None:
        super().__init__()
        self.model = retriever.model
        self._retriever = retriever
        self._window: int | None = getattr(retriever.model.config, "sliding_window", None)
        self.padded = retriever.family.packing is None or _slow_when_packed(retriever)
        if not self.padded:
            self.model.set_attn_implementation(_NAME)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(tokens,) ids of texts that follow each other and (texts,) their lengths -> embeddings
        (texts, dimension), float32.

        ``lengths`` stays on the CPU. Texts of equal length side by side make attention on CPUs fastest.
        """
        sizes: list[int] = lengths.tolist()
        if self.padded:
            return self._forward_padded(ids, sizes)
        window = self._window or max(sizes)
        if max(sizes) <= window:
            return self._forward_packed(ids, sizes)
        # Only the model's own masks know windows.
        texts: tuple[Tensor, ...] = torch.split(ids, sizes)
        short, long = (
            [row for row, size in enumerate(sizes) if (size > window) is far] for far in (False, True)
        )
        parts = [
            forward(torch.cat([texts[row] for row in rows]), [sizes[row] for row in rows])
            for forward, rows in ((self._forward_packed, short), (self._forward_padded, long))
            if rows
        ]
        return torch.cat(parts)[torch.tensor([*short, *long], device=ids.device).argsort()]

    def _forward_packed(self, ids: Tensor, sizes: list[int]) -> Tensor:
        packing = Packing.of(sizes, ids.device)
        with _without_mask():
            # A decoder would otherwise fill a key-value cache that nobody reads.
            output = self.model(
                input_ids=ids[None], position_ids=packing.positions_t[None], packing=packing, use_cache=False
            )
        return pool(output.last_hidden_state[0], packing, self._retriever).float()

    def _forward_padded(self, ids: Tensor, sizes: list[int]) -> Tensor:
        texts: tuple[Tensor, ...] = torch.split(ids, sizes)
        return embed(self._retriever, pad(texts)).float()


def _slow_when_packed(retriever: Retriever) -> bool:
    """On GPUs attention with dropout, or with heads that the packed kernel does not take, would be a call for
    every length of text.
    """
    model: Any = retriever.model
    config = model.config
    if model.device.type != "cuda":
        return False
    heads = config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attention_probs_dropout_prob", 0)
    return bool(dropout) or not has_flash(model.device, channels)


def without_dropout(model: nn.Module) -> None:
    """Every dropout at probability 0: modules, and what attention reads from its layer or the configuration.

    Evaluation mode would do the same, but is also where gradient checkpointing is off.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    config: Any = model.config
    for name in ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)


@contextmanager
def _without_mask() -> Iterator[None]:
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def _mask(*arguments: Any, **options: Any) -> Any:
    return None if _packed.get() else sdpa_mask(*arguments, **options)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as Hugging Face's layers call it: (1, heads, tokens, d) -> (1, tokens, heads * d)."""
    if packing is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, **options
        )
        return result
    # Under autocast rotary positions leave query and key in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    attended = attend(q, k, v, packing, causal=module.is_causal, dropout=dropout)
    return attended[None], None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
