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

from effir_ray.models.retriever import Retriever

HALF = (torch.float16, torch.bfloat16)


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

    def pooled_rows(self, how: str) -> Tensor | None:
        """Index (n,) of the one token of each text that pooling takes; None where it takes the mean."""
        rows = {"last": self.bounds[1:].long() - 1, "cls": self.bounds[:-1].long()}
        return rows.get(how)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies from pinned memory do not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def has_flash(device: torch.device, channels: int) -> bool:
    """Whether torch's kernel for packed texts takes heads of so many channels there. It knows half precision
    only, and no dropout.
    """
    if device.type != "cuda" or channels % 8 or channels > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query_tqd: Tensor,
    key_tkd: Tensor,
    value_tkd: Tensor,
    packing: Packing,
    *,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention inside each text, (t, q * d)."""
    if has_flash(query_tqd.device, query_tqd.shape[-1]) and query_tqd.dtype in HALF and not dropout:
        longest = max(packing.lengths)
        return _attend_flash(query_tqd, packing.bounds, longest, key_tkd, value_tkd, packing, causal)
    return _attend_by_length(query_tqd, packing.lengths, key_tkd, value_tkd, packing, causal, dropout)


def attend_once(query_nqd: Tensor, key_tkd: Tensor, value_tkd: Tensor, packing: Packing) -> Tensor:
    """Softmax attention of one query a text over that whole text, (n, q * d)."""
    n = len(packing.lengths)
    if has_flash(query_nqd.device, query_nqd.shape[-1]) and query_nqd.dtype in HALF:
        bounds = torch.arange(n + 1, dtype=torch.int32, device=query_nqd.device)
        return _attend_flash(query_nqd, bounds, 1, key_tkd, value_tkd, packing, causal=False)
    return _attend_by_length(query_nqd, (1,) * n, key_tkd, value_tkd, packing, causal=False)


def _attend_flash(
    query: Tensor,
    query_bounds: Tensor,
    longest_query: int,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool,
) -> Tensor:
    """torch's varlen kernel, half precision only. ``num_splits=1``: no text's bits depend on its batch."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        query_bounds,
        packing.bounds,
        longest_query,
        max(packing.lengths),
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
        num_splits=1,
    )
    assert isinstance(output, Tensor)  # a tuple only with return_aux
    return output.flatten(1)


def _attend_by_length(
    query: Tensor,
    queries: Sequence[int],
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """One call for each run of texts of equal length (batches are ordered by it): views, no mask.

    ``queries``: how many rows of ``query`` each text has.
    """
    grouped = query.shape[1] != key.shape[1]
    parts, query_start, start = [], 0, 0
    for (rows, length), run in groupby(zip(queries, packing.lengths, strict=True)):
        count = sum(1 for _ in run)
        query_stop, stop = query_start + count * rows, start + count * length
        q = query[query_start:query_stop].view(count, rows, *query.shape[1:]).transpose(1, 2)
        k, v = (x[start:stop].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (key, value))
        output = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal and length > 1, enable_gqa=grouped
        )  # (count, q, rows, d)
        parts.append(output.transpose(1, 2).reshape(count * rows, -1))
        query_start, start = query_stop, stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mean_pool(hidden_th: Tensor, packing: Packing) -> Tensor:
    """(t, h) -> (n, h): the mean over the tokens of each text."""
    # unsafe: without checks of ``lengths``, for which a GPU would have to be waited for.
    # It adds up in the type of its input, and sums of hundreds of tokens stand still in half precision.
    pooled: Tensor = torch.segment_reduce(
        hidden_th.float(), "mean", lengths=packing.lengths_n, axis=0, unsafe=True
    )
    return pooled.to(hidden_th.dtype)


def pool(hidden_th: Tensor, packing: Packing, retriever: Retriever) -> Tensor:
    """(t, h) -> (n, d): embeddings as ``retriever`` makes them of hidden states."""
    rows = packing.pooled_rows(retriever.spec.pooling)
    return retriever.finish(mean_pool(hidden_th, packing) if rows is None else hidden_th[rows])
