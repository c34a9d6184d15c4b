"""Packed passes on CPUs with compiled kernels between oneDNN's products: every family, three precisions.

A pass is a chain of sublayers on a float32 residual stream. Each takes the normalised stream, multiplies,
attends or activates, multiplies again, and one kernel adds the result to the stream and normalises it for
the sublayer after it. Dropped sublayers are simply not in the chain. Products multiply float32, bfloat16, or
bytes that have one scale a row (so no text depends on those beside it); all else is float32.

Shapes: t tokens of all n texts (n after the last attention of a model whose pooling takes one token), h
hidden, q query heads, k key-value heads, d channels a head, i inputs and o outputs of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from effir_ray.encoding.cpu_kernels import (
    EVERYTHING,
    LOWEST,
    Activation,
    Heads,
    Kernels,
    NormFields,
    Rows,
    SublayerFields,
    weights_of,
)
from effir_ray.encoding.padded import embed, pad
from effir_ray.encoding.probe import PROBE
from effir_ray.encoding.projections import NotPlainError
from effir_ray.encoding.varlen_attention import Packing
from effir_ray.hardware import Precision, cpu_features
from effir_ray.models.retriever import Retriever

SMOOTHING = 0.5
"""How much of a channel's size goes over to the weights."""

_IN_ONE = 4  # inputs that products take in one go at most, of bytes

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True)
class Norm:
    """LayerNorm or RMSNorm over the last dimension; weight and bias (h,) float32."""

    kind: Literal["layer", "rms"]
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None

    def fields(self) -> NormFields:
        kind = 1 if self.kind == "layer" else 2
        return NormFields(
            kind, self.eps, *(None if x is None else x.data_ptr() for x in (self.weight, self.bias))
        )


_NO_NORM = NormFields(0, 0.0, None, None)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The stream before all sublayers: scale * tokens[ids] + positions[places] + everywhere[0], (t, h)."""

    tokens: Tensor
    positions: Tensor | None = None
    everywhere: Tensor | None = None
    scale: float = 1.0
    norm: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Between the two products of an attention sublayer."""

    queries: int
    keys: int
    channels: int
    left: int
    right: int
    scale: float
    cap: float = 0.0
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rotary: str | None = None  # kind of rotary embedding; None: positions are in the embeddings


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The end of the first product of an MLP: an activation, and for a gated one the product of halves."""

    activation: Activation
    gated: bool


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """``before``: norm of its input (pre-norm families); ``inner``: norm of its output (Gemma); ``after``:
    norm of the stream once it was added (post-norm families)."""

    does: Attention | Gate
    first: Sequence[nn.Linear]  # side by side
    second: nn.Linear
    before: Norm | None = None
    inner: Norm | None = None
    after: Norm | None = None


class Product(Protocol):
    bytes: int  # of the weights, in the form they are kept in

    def __call__(self, x: Rows) -> Tensor:
        """activation(x W^T + b), (t, o), or (t, o / 2) of a gated one."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What a product computes. ``weight`` (o, i) and ``bias`` (o,) float32; of a gated one the first half is
    activated. ``lowest``: what is multiplied is never further below zero. ``times`` (i,): what its channels
    are multiplied by before they become bytes."""

    weight: Tensor
    bias: Tensor | None = None
    then: Gate | None = None
    lowest: float = 0.0
    times: Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.then is not None and self.then.gated

    def bytes(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Weights as signed bytes, what a unit of them is worth (o,), the bias with what ``lowest`` adds, and
        the byte that stands for 0 on the left."""
        weight = self.weight if self.times is None else self.weight / self.times
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
        rounded = (weight / scale[:, None]).round()
        if not self.lowest:
            return rounded.to(torch.int8), scale, self.bias, 128
        # W x = W / times (s b) - lowest * W 1, of which the last part is the same for all x.
        held = rounded * scale[:, None]
        constant = -self.lowest * (held if self.times is None else held * self.times).sum(dim=1)
        return rounded.to(torch.int8), scale, constant if self.bias is None else self.bias + constant, 0


class PanelProduct:
    """By the compiled kernels, for hundreds of tokens as fast as oneDNN, for a query's few up to three times
    faster: no weights are laid out anew, and nothing is looked up."""

    def __init__(self, linear: Linear, kernels: Kernels, computes: torch.dtype, quantized: bool) -> None:
        self._kernels, self._computes = kernels, computes
        weight, bias = linear.weight, linear.bias
        scale = zero = None
        if quantized:
            weight, scale, bias, zero_byte = linear.bytes()
            zero = zero_byte * weight.sum(dim=1, dtype=torch.int32)
        else:
            weight = weight.to(computes)
        halves = 2 if linear.gated else 1
        # Inner neurons as the second product takes them; those that are filled in are zero.
        width = _rounded_up(len(weight) // halves, _IN_ONE) if linear.then else len(weight)
        inputs = _rounded_up(weight.shape[1], _IN_ONE)
        weight = F.pad(weight, (0, inputs - weight.shape[1]))
        panels = self._in_panels(weight, halves)  # (columns, inputs)
        together = 4 // weight.itemsize
        lying = panels.view(-1, kernels.panel, inputs // together, together).transpose(1, 2)
        bias, scale, zero = (None if x is None else self._in_panels(x, halves) for x in (bias, scale, zero))
        activation = None if linear.then is None else linear.then.activation
        lying = lying.contiguous().flatten(2)
        self.weights = weights_of(lying, bias, scale, zero, activation, gated=linear.gated, width=width)
        self._kept = lying, bias, scale, zero
        self.bytes = lying.nbytes

    def _in_panels(self, x: Tensor, halves: int) -> Tensor:
        """(o, ...) in the order of panels, each with its part of both halves; filled up with zeros."""
        part = self._kernels.panel // halves
        split = x.view(halves, len(x) // halves, *x.shape[1:])
        missing = -split.shape[1] % part
        filled = torch.cat([split, split.new_zeros(halves, missing, *x.shape[1:])], dim=1)
        turned = filled.view(halves, -1, part, *x.shape[1:]).transpose(0, 1)
        return turned.reshape(-1, *x.shape[1:]).contiguous()

    def __call__(self, x: Rows) -> Tensor:
        return self._kernels.multiply(x, self.weights, self._computes)


class AmxProduct:
    """By oneDNN, which knows AMX: tiles of products that a compiler's vectors are no match for."""

    def __init__(self, linear: Linear, computes: torch.dtype, quantized: bool) -> None:
        self._computes, self._then, self._quantized = computes, linear.then, quantized
        if quantized:
            weight, self._scale, self._bias, self._zero = linear.bytes()
            self._zeros = torch.zeros(len(weight), dtype=torch.int64)
            self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        else:
            weight, self._bias = linear.weight.to(computes), linear.bias
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bytes = weight.nbytes

    def __call__(self, x: Rows) -> Tensor:
        if x.scale_t is None:
            left = (x.values, self._weight, self._bias)
            y: Tensor = torch.ops.mkldnn._linear_pointwise(*left, "none", [], "none")
        else:
            bytes_ = (x.values, 1.0, self._zero, self._weight, self._scale, self._zeros)
            y = torch.ops.onednn.qlinear_pointwise(*bytes_, None, 1.0, 0, torch.float32, "none", [], "none")
            y = y.mul_(x.scale_t[:, None])
            y = y if self._bias is None else y.add_(self._bias)
        if self._then is None:
            return y.to(self._computes)
        gate, up = y.chunk(2, dim=1) if self._then.gated else (y, None)
        activated = _IN_TORCH[self._then.activation](gate)
        return (activated if up is None else activated * up).to(self._computes).contiguous()


_IN_TORCH: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def make_product(linear: Linear, kernels: Kernels, computes: torch.dtype, *, quantized: bool) -> Product:
    amx = "amx_int8" if quantized else "amx_bf16"
    if amx in cpu_features() and (quantized or computes == torch.bfloat16):
        return AmxProduct(linear, computes, quantized)
    return PanelProduct(linear, kernels, computes, quantized)


def _rounded_up(n: int, step: int) -> int:
    return -(-n // step) * step


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
        _check_plain([*part.first, part.second])
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
        if inputs % _IN_ONE:
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
            *(None if x is None else x.data_ptr() for x in (self.times, self._second_times)),
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
        self._embedding, parts, self._final = _PARTS[retriever.family.name](retriever)
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

    def mean_pool(self, hidden_th: Tensor, packing: Packing) -> Tensor:
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
        *(None if weight is None else weight.data_ptr() for weight in (query_norm, key_norm)),
        does.query_norm.eps if does.query_norm else 0.0,
    )
    return heads, [x for x in (query_norm, key_norm) if x is not None]


def _concatenated(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, sizes, strict=True)
    return torch.cat([torch.zeros(n) if b is None else b.detach().float() for b, n in pairs])


def _check_plain(linears: Sequence[nn.Module]) -> None:
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise NotPlainError(f"{type(linear).__name__} instead of Linear")


# --- families ---

Parts = tuple[Embedding, list[Sublayer], Norm | None]  # the sublayers in order, and the final norm


def _llama(retriever: Retriever) -> Parts:
    model: Any = retriever.model
    parts = []
    for index, layer in enumerate(retriever.family.layers(model)):
        block: Any = layer
        if retriever.family.attention(layer) is not None:
            parts.append(_rotary_attention(retriever, index, before=_rms(block.input_layernorm)))
        if retriever.family.mlp(layer) is not None:
            parts.append(_gated_mlp(block.mlp, before=_rms(block.post_attention_layernorm)))
    return Embedding(tokens=model.embed_tokens.weight.detach()), parts, _rms(model.norm)


def _gemma(retriever: Retriever) -> Parts:
    model: Any = retriever.model
    parts = []
    for index, layer in enumerate(retriever.family.layers(model)):
        block: Any = layer
        if retriever.family.attention(layer) is not None:
            inner = _rms(block.post_attention_layernorm)
            before = _rms(block.input_layernorm)
            parts.append(replace(_rotary_attention(retriever, index, before=before), inner=inner))
        if retriever.family.mlp(layer) is not None:
            inner = _rms(block.post_feedforward_layernorm)
            before = _rms(block.pre_feedforward_layernorm)
            parts.append(replace(_gated_mlp(block.mlp, before=before), inner=inner))
    table = model.embed_tokens
    # Gemma 2 and 3 multiply by a number that is rounded to the type of the weights.
    scale = float(table.embed_scale.to(table.weight.dtype))
    return Embedding(tokens=table.weight.detach(), scale=scale), parts, _rms(model.norm)


def _rotary_attention(retriever: Retriever, index: int, *, before: Norm) -> Sublayer:
    module: Any = retriever.family.attention(retriever.family.layers(retriever.model)[index])
    config: Any = retriever.model.config
    linears = [module.q_proj, module.k_proj, module.v_proj]
    _check_plain(linears)
    queries, keys, _ = (linear.out_features // module.head_dim for linear in linears)
    causal = not getattr(config, "use_bidirectional_attention", None)
    left, right = _sight(retriever.family.window(config, index), causal)
    norms = {
        f"{name}_norm": _rms(getattr(module, f"{name[0]}_norm"))
        for name in ("query", "key")
        if getattr(module, f"{name[0]}_norm", None) is not None
    }
    does = Attention(
        queries=queries,
        keys=keys,
        channels=module.head_dim,
        left=left,
        right=right,
        scale=module.scaling,
        cap=getattr(module, "attn_logit_softcapping", None) or 0.0,
        rotary=_rotary_kind(retriever, index),
        **norms,
    )
    return Sublayer(does=does, first=linears, second=module.o_proj, before=before)


def _rotary_kind(retriever: Retriever, index: int) -> str:
    """'all' where one rotary embedding serves all layers."""
    model: Any = retriever.model
    by_kind = isinstance(getattr(model.rotary_emb, "rope_type", None), dict)
    return str(model.config.layer_types[index]) if by_kind else "all"


def _gated_mlp(mlp: Any, *, before: Norm) -> Sublayer:
    does = Gate(activation=_activation(mlp.act_fn), gated=True)
    return Sublayer(does=does, first=[mlp.gate_proj, mlp.up_proj], second=mlp.down_proj, before=before)


def _modernbert(retriever: Retriever) -> Parts:
    model: Any = retriever.model
    config = model.config
    parts = []
    for index, layer in enumerate(retriever.family.layers(model)):
        block: Any = layer
        attention = retriever.family.attention(layer)
        if attention is not None:
            module: Any = attention
            heads = config.num_attention_heads
            left, right = _sight(retriever.family.window(config, index), causal=False)
            does = Attention(
                queries=heads,
                keys=heads,
                channels=module.head_dim,
                left=left,
                right=right,
                scale=module.head_dim**-0.5,
                rotary=_rotary_kind(retriever, index),
            )
            norm = block.attn_norm
            before = None if isinstance(norm, nn.Identity) else _layer_norm(norm)
            parts.append(Sublayer(does=does, first=[module.Wqkv], second=module.Wo, before=before))
        if retriever.family.mlp(layer) is not None:
            gate = Gate(activation=_activation(block.mlp.act), gated=True)
            before = _layer_norm(block.mlp_norm)
            parts.append(Sublayer(does=gate, first=[block.mlp.Wi], second=block.mlp.Wo, before=before))
    tables = model.embeddings
    embedding = Embedding(tokens=tables.tok_embeddings.weight.detach(), norm=_layer_norm(tables.norm))
    return embedding, parts, _layer_norm(model.final_norm)


def _bert(retriever: Retriever) -> Parts:
    parts = []
    for layer in retriever.family.layers(retriever.model):
        block: Any = layer
        if retriever.family.attention(layer) is not None:
            module, output = block.attention.self, block.attention.output
            heads, channels = module.num_attention_heads, module.attention_head_size
            does = Attention(
                queries=heads,
                keys=heads,
                channels=channels,
                left=EVERYTHING,
                right=EVERYTHING,
                scale=channels**-0.5,
            )
            first = [module.query, module.key, module.value]
            after = _layer_norm(output.LayerNorm)
            parts.append(Sublayer(does=does, first=first, second=output.dense, after=after))
        if retriever.family.mlp(layer) is not None:
            inner, output = block.intermediate, block.output
            gate = Gate(activation=_activation(inner.intermediate_act_fn), gated=False)
            after = _layer_norm(output.LayerNorm)
            parts.append(Sublayer(does=gate, first=[inner.dense], second=output.dense, after=after))
    tables: Any = retriever.model.embeddings
    embedding = Embedding(
        tokens=tables.word_embeddings.weight.detach(),
        positions=tables.position_embeddings.weight.detach(),
        everywhere=tables.token_type_embeddings.weight.detach(),
        norm=_layer_norm(tables.LayerNorm),
    )
    return embedding, parts, None


_PARTS: dict[str, Callable[[Retriever], Parts]] = {
    "llama": _llama,
    "gemma": _gemma,
    "modernbert": _modernbert,
    "bert": _bert,
}


def _sight(window: int | None, causal: bool) -> tuple[int, int]:
    """How many tokens to either side, of a window as ``Family.window`` counts it."""
    if window is None:
        return EVERYTHING, 0 if causal else EVERYTHING
    return (window - 1, 0) if causal else ((window - 1) // 2, (window - 1) // 2)


def _rms(norm: Any) -> Norm:
    weight = norm.weight.detach().float()
    if hasattr(norm, "variance_epsilon"):
        return Norm(kind="rms", eps=norm.variance_epsilon, weight=weight.contiguous())
    return Norm(kind="rms", eps=norm.eps, weight=weight + 1)  # Gemma's weights are around zero


def _layer_norm(norm: nn.LayerNorm) -> Norm:
    parts = [None if x is None else x.detach().float().contiguous() for x in (norm.weight, norm.bias)]
    return Norm(kind="layer", eps=norm.eps, weight=parts[0], bias=parts[1])


def _activation(module: nn.Module) -> Activation:
    """By what transformers makes of the known names. Raises NotPlainError for others."""
    for name, known in _ACTIVATIONS.items():
        if type(ACT2FN[name]) is type(module):
            return known
    raise NotPlainError(f"activation {type(module).__name__}")
