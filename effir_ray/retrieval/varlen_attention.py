"""Attention over texts of different lengths that lie one after the other, without padding and without masks.

Shapes: t tokens of all texts, n texts, q query heads, k key-value heads, d channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the texts of a batch lie."""

    lengths: tuple[int, ...]
    lengths_n: Tensor  # int64
    bounds: Tensor  # (n + 1,) int32: text j is tokens bounds[j] to bounds[j + 1]
    positions_t: Tensor  # int64: position of each token in its text

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        lengths_n = torch.tensor(lengths)
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths_n, dim=0, out=bounds[1:])
        starts_t = torch.repeat_interleave(bounds[:-1], lengths_n)
        positions_t = torch.arange(len(starts_t)) - starts_t
        moved = [_to(part, device) for part in (lengths_n, bounds.int(), positions_t)]
        return cls(tuple(lengths), *moved)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies from pinned memory do not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend(
    query_tqd: Tensor, key_tkd: Tensor, value_tkd: Tensor, packing: Packing, *, causal: bool
) -> Tensor:
    """Softmax attention inside each text, (t, q * d)."""
    if query_tqd.is_cuda:
        return _attend_flash(query_tqd, key_tkd, value_tkd, packing, causal)
    return _attend_by_length(query_tqd, key_tkd, value_tkd, packing, causal)


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool) -> Tensor:
    """torch's varlen kernel, half precision only. ``num_splits=1``: no text's bits depend on its batch."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packing.lengths)
    output = varlen_attn(
        query,
        key,
        value,
        packing.bounds,
        packing.bounds,
        longest,
        longest,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
        num_splits=1,
    )
    assert isinstance(output, Tensor)  # a tuple only with return_aux
    return output.flatten(1)


def _attend_by_length(query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool) -> Tensor:
    """One call for each run of texts of equal length (batches are ordered by it): views, no mask."""
    grouped = query.shape[1] != key.shape[1]
    parts, start = [], 0
    for length, run in groupby(packing.lengths):
        count = sum(1 for _ in run)
        stop = start + count * length
        q, k, v = (
            x[start:stop].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)
        )
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal and length > 1, enable_gqa=grouped
        )  # (count, q, length, d)
        parts.append(output.transpose(1, 2).reshape(stop - start, -1))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pool(hidden_th: Tensor, packing: Packing, how: str) -> Tensor:
    """(t, h) -> (n, h): the last or first token of each text, or the mean over its tokens."""
    if how == "last":
        return hidden_th[packing.bounds[1:].long() - 1]
    if how == "cls":
        return hidden_th[packing.bounds[:-1].long()]
    pooled: Tensor = torch.segment_reduce(hidden_th, "mean", lengths=packing.lengths_n, axis=0)
    return pooled
