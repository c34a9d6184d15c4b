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
from typing import Any, Literal

import torch
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
)
from effir_ray.encoding.projections import NotPlainError
from effir_ray.encoding.varlen_attention import Packing
from effir_ray.hardware import Precision
from effir_ray.models.retriever import Retriever

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

    def split(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """((q + 2 k) d,) in its parts of queries, keys and values."""
        if bias is None:
            return None, None, None
        sizes = [heads * self.channels for heads in (self.queries, self.keys, self.keys)]
        query, key, value = torch.split(bias, sizes)
        return query, key, value


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Between the two products of an MLP: activation, and for a gated one the product of both halves."""

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


class Product:
    """x W^T, without its bias, by oneDNN with weights in its own layout."""

    def __init__(self, weight_oi: Tensor, computes: torch.dtype, quantized: bool) -> None:
        self._computes, self._quantized = computes, quantized
        weight = weight_oi.float()
        if not quantized:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(computes).contiguous())
            self.bytes = weight.numel() * computes.itemsize
            return
        self._scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._zeros = torch.zeros(len(rounded), dtype=torch.int64)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.row_sums = (rounded.float() * self._scales[:, None]).sum(dim=1)  # (o,)
        self.bytes = rounded.numel()

    def __call__(self, x: Rows, zero: int = 128, *, gelu: tuple[Tensor | None] | None = None) -> Rows:
        """(t, i) -> (t, o). ``zero``: the byte that stands for 0. ``gelu``: of the product plus that bias."""
        if gelu is not None:
            return Rows(
                torch.ops.mkldnn._linear_pointwise(x.values, self._weight, gelu[0], "gelu", [], "none")
            )
        if not self._quantized:
            return Rows(torch.ops.mkldnn._linear_pointwise(x.values, self._weight, None, "none", [], "none"))
        sums = torch.ops.onednn.qlinear_pointwise(
            x.values,
            1.0,
            zero,
            self._weight,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            self._computes,
            "none",
            [],
            "none",
        )
        return Rows(sums, x.scale_t)


def to_byte_rows(x_ti: Tensor) -> Rows:
    """x = scale * (bytes - 128), a scale a row, as ``Kernels.to_bytes`` has it, by torch."""
    scale_t = x_ti.abs().amax(dim=1).clamp(min=1e-30) / 127
    return Rows((x_ti / scale_t[:, None] + 128.5).to(torch.uint8), scale_t)


class _Step:
    """A sublayer, ready to run; ``next_norm`` is what the stream is normalised by for whatever follows."""

    def __init__(self, part: Sublayer, kernels: Kernels, computes: torch.dtype, quantized: bool) -> None:
        _check_plain([*part.first, part.second])
        self.does, self._kernels, self._computes = part.does, kernels, computes
        self.takes = torch.uint8 if quantized else computes
        first = torch.cat([linear.weight.detach().float() for linear in part.first])
        self._first = Product(first, computes, quantized)
        self._second = Product(part.second.weight.detach(), computes, quantized)
        self.products = (self._first, self._second)
        self._first_bias = _concatenated(
            [linear.bias for linear in part.first], [len(x.weight) for x in part.first]
        )
        self._second_bias = _concatenated([part.second.bias], [len(part.second.weight)])
        self._inner = part.inner.fields() if part.inner else _NO_NORM
        self.after = part.after.fields() if part.after else None
        self._zero = 128
        # oneDNN has an activation for the end of a product, and none that multiplies halves or counts bytes.
        self._fuses = not quantized and part.does == Gate(activation="gelu", gated=False)
        if isinstance(part.does, Attention):
            self._heads, self._kept = _heads(part.does, self._first_bias)
            self._second_bias = _with_values(part.does, self._first_bias, part.second, self._second_bias)
        elif quantized and not part.does.gated and LOWEST[part.does.activation]:
            # Bytes count from the lowest value: y = W (s b - lowest), of which the last part is a constant.
            self._zero = 0
            constant = -LOWEST[part.does.activation] * self._second.row_sums
            self._second_bias = constant if self._second_bias is None else self._second_bias + constant

    def inside(
        self, x: Rows, packing: Packing, rows_n: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> Rows:
        """What is multiplied second: attended, or activated."""
        if self._fuses:
            return self._first(x, gelu=(self._first_bias,))
        raw = self._first(x)
        if isinstance(self.does, Attention):
            attended = self._kernels.attend(self._heads, raw, packing.bounds, rows_n, rotation)
            return self._kernels.to_bytes(attended) if self.takes == torch.uint8 else Rows(attended)
        return self._kernels.activate(
            raw, self._first_bias, self.does.activation, gated=self.does.gated, out=self.takes
        )

    def finish(
        self, inside: Rows, stream_th: Tensor, following: NormFields, out: torch.dtype | None
    ) -> Rows | None:
        """Add to the stream; returns what the next sublayer takes."""
        return self._kernels.join(
            self._second(inside, self._zero),
            self._second_bias,
            stream_th,
            self._inner,
            self.after or following,
            post=self.after is not None,
            out=out,
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
        self._takes = torch.uint8 if quantized else self._computes
        self._kernels = kernels
        self._steps = [_Step(part, kernels, self._computes, quantized) for part in parts]
        self._parts = parts  # fields of norms only point at their tensors
        self._before = [part.before.fields() if part.before else _NO_NORM for part in parts]
        self._embedding_norm = self._embedding.norm.fields() if self._embedding.norm else None
        self._final_fields = self._final.fields() if self._final else None
        self.bytes = sum(product.bytes for step in self._steps for product in step.products)
        self._last_attention = max(
            (n for n, part in enumerate(parts) if isinstance(part.does, Attention)), default=None
        )
        attentions = [part.does for part in parts if isinstance(part.does, Attention)]
        kinds = {attention.rotary for attention in attentions if attention.rotary is not None}
        self._rotations = {kind: _Rotations(model.rotary_emb, kind) for kind in kinds}

    def hidden(self, ids_t: Tensor, packing: Packing, rows_n: Tensor | None) -> Tensor:
        """Last hidden states of all tokens, (t, h), or of those at ``rows_n`` alone, (n, h); float32."""
        stream = self._embed(ids_t, packing)
        if rows_n is not None and self._last_attention is None:
            stream = stream[rows_n]
        rotations = {
            kind: rotations.at(packing.positions_t, max(packing.lengths))
            for kind, rotations in self._rotations.items()
        }
        if not self._steps:
            return self._end(None, stream)
        x = self._kernels.join(None, None, stream, _NO_NORM, self._before[0], post=False, out=self._takes)
        for number, step in enumerate(self._steps):
            assert x is not None
            kind = step.does.rotary if isinstance(step.does, Attention) else None
            rows = rows_n if number == self._last_attention else None
            inside = step.inside(x, packing, rows, rotations[kind] if kind else None)
            if rows is not None:
                stream = stream[rows]
            if number + 1 < len(self._steps):
                x = step.finish(inside, stream, self._before[number + 1], self._takes)
            else:
                return self._end((step, inside), stream)
        raise AssertionError("unreachable")

    def mean_pool(self, hidden_th: Tensor, packing: Packing) -> Tensor:
        """(n, h): the mean over the tokens of each text."""
        return self._kernels.mean(hidden_th, packing.bounds)

    def _embed(self, ids_t: Tensor, packing: Packing) -> Tensor:
        tables = self._embedding
        stream = self._kernels.embed(
            tables.tokens, ids_t, tables.positions, packing.positions_t, tables.everywhere, tables.scale
        )
        if self._embedding_norm is not None:
            self._kernels.join(None, None, stream, _NO_NORM, self._embedding_norm, post=True, out=None)
        return stream

    def _end(self, last: tuple[_Step, Rows] | None, stream_th: Tensor) -> Tensor:
        """The stream after ``last`` and the final norm."""
        final, out = self._final_fields or _NO_NORM, torch.float32 if self._final else None
        if last is None:
            normed = self._kernels.join(None, None, stream_th, _NO_NORM, final, post=False, out=out)
        else:
            normed = last[0].finish(last[1], stream_th, final, out)
        return stream_th if normed is None else normed.values


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


def _heads(does: Attention, bias: Tensor | None) -> tuple[Heads, list[Tensor]]:
    """The fields, and the tensors that they point at."""
    scale = does.scale * (1.0 if does.cap else math.log2(math.e))  # powers of two are cheaper than those of e
    query_bias, key_bias, _ = does.split(bias)
    if query_bias is not None and not does.query_norm:
        query_bias = query_bias * scale
    if does.rotary is None and does.key_norm is None:
        key_bias = None  # adds the same to all scores of a query, of which a softmax knows nothing
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
        *(None if part is None else part.data_ptr() for part in (query_bias, key_bias)),
    )
    return heads, [x for x in (query_bias, key_bias, query_norm, key_norm) if x is not None]


def _with_values(
    does: Attention, first_bias: Tensor | None, second: nn.Linear, second_bias: Tensor | None
) -> Tensor | None:
    """The bias of values added to that of the output: weights of a softmax add up to one."""
    value_bias = does.split(first_bias)[2]
    if value_bias is None:
        return second_bias
    heads = value_bias.view(does.keys, does.channels).repeat_interleave(does.queries // does.keys, dim=0)
    added = second.weight.detach().float() @ heads.flatten()
    return added if second_bias is None else second_bias + added


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
