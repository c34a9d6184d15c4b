"""Packed passes on CPUs by compiled kernels: every family, three precisions.

A pass is a chain of sublayers on a float32 residual stream. Each takes the normalised stream, multiplies,
attends or activates, multiplies again, and one kernel adds the result to the stream and normalises it for
the sublayer after it. Dropped sublayers are simply not in the chain. Products multiply float32, bfloat16, or
bytes that have one scale a row (so no text depends on those beside it); all else is float32.

Shapes: t tokens of all n texts (n after the last attention of a model whose pooling takes one token), h
hidden, q query heads, k key-value heads, d channels a head, i inputs and o outputs of a product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effir_ray.encoding.cpu_kernels import LOWEST, Heads, Kernels, NormFields, Rows, SublayerFields, address
from effir_ray.encoding.cpu_products import IN_ONE, Linear, PanelProduct, make_product
from effir_ray.encoding.padded import embed, pad
from effir_ray.encoding.probe import PROBE
from effir_ray.encoding.projections import NotPlainError, check_plain
from effir_ray.encoding.sublayers import PARTS, Attention, Sublayer
from effir_ray.encoding.varlen_attention import Packing
from effir_ray.hardware import Precision
from effir_ray.models.retriever import Retriever

SMOOTHING = 0.5
"""How much of a channel's size goes over to the weights."""

_NO_NORM = NormFields(0, 0.0, None, None)


Times = tuple[Tensor | None, Tensor | None]  # of the inputs of a sublayer's two products, (i,) each


def smoothing(retriever: Retriever, parts: Sequence[Sublayer]) -> list[Times]:
    """What channels are multiplied by before they become bytes, and weights divided by: those that are always
    large are made smaller, at the weights' expense. SmoothQuant (arXiv 2211.10438), equation 4, over texts
    that are the same for all models.
    """
    largest: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen = args[0].detach().float().abs().flatten(0, -2).amax(dim=0)
        largest[module] = torch.maximum(largest[module], seen) if module in largest else seen

    watched = [(part.first[0], part.second) for part in parts]
    handles = [module.register_forward_pre_hook(look) for pair in watched for module in pair]
    try:
        with torch.inference_mode():
            for ids in retriever.tokenize(PROBE, "document"):
                embed(retriever, pad([ids]))
    finally:
        for handle in handles:
            handle.remove()

    def balanced(inputs: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
        columns = torch.stack([linear.weight.detach().float().abs().amax(dim=0) for linear in linears])
        weights, inputs = columns.amax(dim=0).clamp(min=1e-5), inputs.clamp(min=1e-5)
        return (weights ** (1 - SMOOTHING) / inputs**SMOOTHING).contiguous()

    return [
        (balanced(largest[part.first[0]], part.first), balanced(largest[part.second], [part.second]))
        for part in parts
    ]


class _Step:
    """A sublayer, ready to run."""

    def __init__(
        self, part: Sublayer, kernels: Kernels, computes: torch.dtype, in_bytes: bool, times: Times
    ) -> None:
        check_plain(*part.first, part.second)
        self.does, self._kernels = part.does, kernels
        self.takes = torch.uint8 if in_bytes else computes
        self._second_in_bytes = in_bytes
        self._lowest = 0.0
        then = None
        if isinstance(part.does, Attention):
            self._heads, self._kept = _heads(part.does)
        else:
            then = part.does
            self._lowest = LOWEST[then.activation] if in_bytes and not then.gated else 0.0
        weight = torch.cat([linear.weight.detach().float() for linear in part.first])
        sizes = [linear.out_features for linear in part.first]
        bias = _concatenated([x.bias for x in part.first], sizes)
        first = Linear(weight=weight, bias=bias, then=then, times=times[0])
        bias = None if part.second.bias is None else part.second.bias.detach().float()
        weight = part.second.weight.detach().float()
        second = Linear(weight=weight, bias=bias, lowest=self._lowest, times=times[1])
        self.times, self._second_times = times
        inputs = first.weight.shape[1] if then else math.gcd(first.weight.shape[1], weight.shape[1])
        if inputs % IN_ONE:
            raise NotPlainError(f"{inputs} inputs")
        self._first = make_product(first, kernels, computes, quantized=in_bytes)
        self._second = make_product(second, kernels, computes, quantized=in_bytes)
        self.bytes = self._first.bytes + self._second.bytes
        self._inner = part.inner.fields() if part.inner else _NO_NORM
        self._after = part.after.fields() if part.after else None

    def inside(
        self, x: Rows, packing: Packing, rows_n: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> Rows:
        """What is multiplied second: attended, or activated."""
        between = self._first(x)
        if isinstance(self.does, Attention):
            between = self._kernels.attend(self._heads, between, packing.bounds, rows_n, rotation)
        return self._to_bytes(between) if self._second_in_bytes else Rows(between)

    def _to_bytes(self, between: Tensor) -> Rows:
        return self._kernels.to_bytes(between, self._lowest, self._second_times)

    def fields(self, before: NormFields, rotary: int) -> SublayerFields | None:
        """All of it for a pass in one call; None where a product is not the kernels' own."""
        if not (isinstance(self._first, PanelProduct) and isinstance(self._second, PanelProduct)):
            return None
        attends = isinstance(self.does, Attention)
        return SublayerFields(
            int(attends),
            rotary,
            int(self._after is not None),
            self._lowest,
            *map(address, (self.times, self._second_times)),
            self._heads if attends else Heads(),
            self._first.weights,
            self._second.weights,
            before,
            self._inner,
            self._after or _NO_NORM,
        )

    def finish(
        self, inside: Rows, stream_th: Tensor, following: NormFields, next_step: _Step | None
    ) -> Rows | None:
        """Add to the stream; returns it normalised by ``following``, as ``next_step`` takes it, or in float32
        after the last."""
        return self._kernels.join(
            self._second(inside),
            stream_th,
            self._inner,
            self._after or following,
            post=self._after is not None,
            out=next_step.takes if next_step else torch.float32,
            times=next_step.times if next_step else None,
        )


class CpuModel:
    """A chain of sublayers for ``PackedForward``."""

    window: int | None = None  # sliding windows are the kernels' own

    def __init__(self, retriever: Retriever, precision: Precision, kernels: Kernels) -> None:
        """Raises NotPlainError for layers that compute more than their weights say."""
        model: Any = retriever.model
        describe = PARTS.get(retriever.family.name)
        if describe is None:
            raise NotPlainError(f"family {retriever.family.name}")
        self._embedding, parts, self._final = describe(retriever)
        quantized = precision == "int8"
        half = precision == "bfloat16" or (quantized and kernels.has_bfloat16)
        self._computes = torch.bfloat16 if half else torch.float32
        self._kernels = kernels
        times = smoothing(retriever, parts) if quantized else [(None, None)] * len(parts)
        self._steps = [
            _Step(part, kernels, self._computes, quantized, each)
            for part, each in zip(parts, times, strict=True)
        ]
        self._parts = parts  # fields of norms only point at their tensors
        self._before = [part.before.fields() if part.before else _NO_NORM for part in parts]
        self._embedding_norm = self._embedding.norm.fields() if self._embedding.norm else None
        self._final_fields = self._final.fields() if self._final else None
        self.bytes = sum(step.bytes for step in self._steps)
        self._last_attention = max(
            (n for n, part in enumerate(parts) if isinstance(part.does, Attention)), default=None
        )
        attentions = [part.does for part in parts if isinstance(part.does, Attention)]
        kinds = {attention.rotary for attention in attentions if attention.rotary is not None}
        self._rotations = {kind: _Rotations(model.rotary_emb, kind) for kind in sorted(kinds)}
        fields = [
            step.fields(before, self._rotary_of(step))
            for step, before in zip(self._steps, self._before, strict=True)
        ]
        known = [each for each in fields if each is not None]
        self._chain = (SublayerFields * len(known))(*known) if len(known) == len(fields) else None

    def hidden(self, ids_t: Tensor, packing: Packing, rows_n: Tensor | None) -> Tensor:
        """Last hidden states of all tokens, (t, h), or of those at ``rows_n`` alone, (n, h); float32."""
        stream = self._embed(ids_t, packing)
        if rows_n is not None and self._last_attention is None:
            stream, rows_n = stream[rows_n], None
        rotations = {
            kind: rotations.at(packing.positions_t, max(packing.lengths))
            for kind, rotations in self._rotations.items()
        }
        if self._chain is not None:
            return self._kernels.run(
                self._chain,
                -1 if self._last_attention is None else self._last_attention,
                self._computes,
                stream,
                packing.bounds,
                rows_n,
                list(rotations.values()),
                self._final_fields or _NO_NORM,
            )
        first = self._steps[0]
        x = self._kernels.join(
            None, stream, _NO_NORM, self._before[0], post=False, out=first.takes, times=first.times
        )
        for number, step in enumerate(self._steps):
            assert x is not None
            kind = step.does.rotary if isinstance(step.does, Attention) else None
            rows = rows_n if number == self._last_attention else None
            inside = step.inside(x, packing, rows, rotations[kind] if kind else None)
            if rows is not None:
                stream = stream[rows]
            if number + 1 < len(self._steps):
                following = self._before[number + 1]
                x = step.finish(inside, stream, following, self._steps[number + 1])
            else:
                out = step.finish(inside, stream, self._final_fields or _NO_NORM, None)
                return stream if out is None else out.values
        raise AssertionError("unreachable")

    def _rotary_of(self, step: _Step) -> int:
        """Which of the rotations, -1 for none."""
        kind = step.does.rotary if isinstance(step.does, Attention) else None
        return -1 if kind is None else list(self._rotations).index(kind)

    def mean(self, hidden_th: Tensor, packing: Packing) -> Tensor:
        """(n, h): the mean over the tokens of each text."""
        return self._kernels.mean(hidden_th, packing.bounds)

    def _embed(self, ids_t: Tensor, packing: Packing) -> Tensor:
        tables = self._embedding
        stream = self._kernels.embed(
            tables.tokens, ids_t, tables.positions, packing.positions_t, tables.everywhere, tables.scale
        )
        if self._embedding_norm is not None:
            self._kernels.join(None, stream, _NO_NORM, self._embedding_norm, post=True, out=None)
        return stream


class _Rotations:
    """cos and sin of rotary positions, as a table that grows."""

    def __init__(self, rotary: nn.Module, kind: str) -> None:
        self._rotary, self._kind = rotary, kind
        self._cos = self._sin = torch.empty(0, 0)

    def at(self, positions_t: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """(t, turned channels / 2) each; ``longest``: one more than the highest position."""
        if longest > len(self._cos):
            places = torch.arange(max(512, 2 * longest))[None]
            arguments = () if self._kind == "all" else (self._kind,)
            cos, sin = self._rotary(torch.empty(1), places, *arguments)  # (1, t, turned), both halves alike
            half = cos.shape[-1] // 2
            self._cos, self._sin = (x[0, :, :half].float().contiguous() for x in (cos, sin))
        return self._cos[positions_t], self._sin[positions_t]


def _heads(does: Attention) -> tuple[Heads, list[Tensor]]:
    """The fields, and the tensors that they point at."""
    scale = does.scale * (1.0 if does.cap else math.log2(math.e))  # powers of two are cheaper than those of e
    query_norm, key_norm = (
        None if norm is None else norm.weight for norm in (does.query_norm, does.key_norm)
    )
    if query_norm is not None:
        query_norm = query_norm * scale
    heads = Heads(
        does.queries,
        does.keys,
        does.channels,
        does.left,
        does.right,
        scale,
        does.cap,
        *map(address, (query_norm, key_norm)),
        does.query_norm.eps if does.query_norm else 0.0,
    )
    return heads, [x for x in (query_norm, key_norm) if x is not None]


def _concatenated(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, sizes, strict=True)
    return torch.cat([torch.zeros(n) if b is None else b.detach().float() for b, n in pairs])
