"""Forward passes without padding, compressed models included: on GPUs, and on CPUs without a compiler.

All tokens of a batch lie in one (tokens, hidden) matrix, so every linear layer is one large product; only
attention knows where texts begin. Query, key and value projections are fused, gate and up too; RMSNorm
weights are folded into the projection that follows. The weights are a snapshot of the model's.

Where pooling takes one token of a text, tokens meet for the last time in the last layer that has attention:
its queries, and all that follows, are computed for those n tokens alone.

Shapes: t tokens of all n texts (n after the last attention), h hidden, q query heads, k key-value heads,
d channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from effir_ray.encoding.cpu_kernels import build
from effir_ray.encoding.cpu_pass import CpuModel
from effir_ray.encoding.cuda_graphs import SingleTextGraphs
from effir_ray.encoding.fused_kernels import rotate
from effir_ray.encoding.padded import PaddedForward
from effir_ray.encoding.projections import GatedProjection, NotPlainError, Projection, Quantize, fuse
from effir_ray.encoding.varlen_attention import HALF, Packing, attend, attend_once, mean_pool
from effir_ray.hardware import Precision
from effir_ray.models.retriever import Retriever

_PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # angles do not depend on the longest text of a batch


class _Model(Protocol):
    window: int | None  # longest text for which attention is full

    bytes: int  # of the weights that were copied

    def hidden(self, ids_t: Tensor, packing: Packing, rows_n: Tensor | None) -> Tensor:
        """Last hidden states of all tokens, (t, h), or of those at ``rows_n`` alone, (n, h)."""

    def mean(self, hidden_th: Tensor, packing: Packing) -> Tensor:
        """(n, h): the mean over the tokens of each text."""


class PackedForward:
    """Embeds token lists without padding."""

    padded = False

    def __init__(self, retriever: Retriever, model: _Model) -> None:
        self._retriever, self._model = retriever, model
        self._long = PaddedForward(retriever)
        device = retriever.model.device
        self._alone = SingleTextGraphs(device) if device.type == "cuda" else None

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights that were copied: all but embeddings and norms."""
        return self._model.bytes

    def __call__(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """b token lists, best ordered by length -> embeddings (b, d) on the model's device."""
        lengths = [len(ids) for ids in tokens]
        if self._model.window is not None and max(lengths) > self._model.window:
            return self._long(tokens)
        if self._alone is not None and len(tokens) == 1:
            return self._alone(tokens[0], self._embed)
        ids = torch.from_numpy(np.fromiter(chain.from_iterable(tokens), np.int64, sum(lengths)))
        device = self._retriever.model.device
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        packing = Packing.of(lengths, device)
        return self._embed(ids, packing)

    def _embed(self, ids_t: Tensor, packing: Packing) -> Tensor:
        spec = self._retriever.spec
        rows = packing.pooled_rows(spec.pooling)
        if rows is None:
            pooled = self._model.mean(self._model.hidden(ids_t, packing, None), packing)
        elif spec.pooling == "cls" and self._retriever.family.causal:
            # Its first token sees itself alone: not what the last attention for `rows` computes.
            pooled = self._model.hidden(ids_t, packing, None)[rows]
        else:
            pooled = self._model.hidden(ids_t, packing, rows)
        return self._retriever.finish(pooled)


def packed_forward(retriever: Retriever, precision: Precision) -> PackedForward | None:
    """``precision``: what is multiplied in on CPUs; on GPUs it is the model's own type.

    None where there is no packed pass: unusual settings, adapters, quantised layers, float32 on CUDA (no
    kernel); without the compiled kernels also for bfloat16 on CPUs, Gemma and ModernBERT.
    """
    config: Any = retriever.model.config
    device = retriever.model.device.type
    quantize: Quantize = "int8" if precision == "int8" else None
    if (device == "cuda" and retriever.model.dtype not in HALF) or not _has_plain_rope(config):
        return None
    try:
        if device == "cpu":
            kernels = build().kernels
            if kernels and kernels.multiplies(precision):
                return PackedForward(retriever, CpuModel(retriever, precision, kernels))
            if precision == "bfloat16":
                return None
        if retriever.family.packing == "pre-norm" and config.hidden_act == "silu":
            return PackedForward(retriever, _Llama(retriever, quantize))
        if retriever.family.packing == "post-norm":
            return PackedForward(retriever, _Bert(retriever, quantize))
    except NotPlainError:
        pass
    return None


def _has_plain_rope(config: Any) -> bool:
    """Whether rotary angles depend on positions alone. Some models have one kind of them a kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [kind for kind in settings.values() if isinstance(kind, dict)] or [settings]
    return all(kind.get("rope_type", "default") in _PLAIN_ROPE for kind in nested)


class _Llama:
    """Pre-norm decoder: Llama, SmolLM2, Mistral, Qwen2, Qwen3."""

    mean = staticmethod(mean_pool)

    def __init__(self, retriever: Retriever, quantize: Quantize) -> None:
        model: Any = retriever.model
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm
        self._layers = [_LlamaLayer(layer, quantize) for layer in retriever.family.layers(model)]
        self.bytes = sum(part.bytes for layer in self._layers for part in layer.projections)
        self._last_attention = _last_with_attention(self._layers)
        self.window = _window(model.config)

    def hidden(self, ids_t: Tensor, packing: Packing, rows_n: Tensor | None) -> Tensor:
        x_th = self._embed(ids_t)
        cos, sin = self._rotary(x_th[None], packing.positions_t[None])  # (1, t, d), both halves alike
        half = cos.shape[-1] // 2
        rotation = cos[0, :, None, :half], sin[0, :, None, :half]  # (t, 1, d / 2)
        if rows_n is not None and self._last_attention is None:
            x_th = x_th[rows_n]
        for number, layer in enumerate(self._layers):
            rows = rows_n if number == self._last_attention else None
            x_th = layer.update(x_th, packing, rotation, rows)
        normed: Tensor = self._norm(x_th)
        return normed


class _LlamaLayer:
    def __init__(self, layer: Any, quantize: Quantize) -> None:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        self.has_attention, self._has_mlp = attention is not None, mlp is not None
        self.projections: list[Projection | GatedProjection] = []
        if attention is not None:
            norm = layer.input_layernorm
            self._attention_eps = norm.variance_epsilon
            linears = [attention.q_proj, attention.k_proj, attention.v_proj]
            self._qkv = fuse(linears, scale=norm.weight, quantize=quantize)
            self._out = fuse([attention.o_proj], quantize=quantize)
            self.projections += [self._qkv, self._out]
            self._channels = attention.head_dim
            self._heads = [linear.out_features // attention.head_dim for linear in linears]
            # Qwen3 normalises every head of query and key.
            self._norm_query: nn.Module | None = getattr(attention, "q_norm", None)
            self._norm_key: nn.Module | None = getattr(attention, "k_norm", None)
        if mlp is not None:
            norm = layer.post_attention_layernorm
            self._mlp_eps = norm.variance_epsilon
            self._gate_up = GatedProjection(mlp.gate_proj, mlp.up_proj, norm.weight, quantize)
            self._down = fuse([mlp.down_proj], quantize=quantize)
            self.projections += [self._gate_up, self._down]

    def update(
        self, x_th: Tensor, packing: Packing, rotation: tuple[Tensor, Tensor], rows_n: Tensor | None
    ) -> Tensor:
        """The new residual stream, of the tokens at ``rows_n`` alone if given; ``x_th`` is used up.

        rotation: cos and sin, (t, 1, d / 2).
        """
        if self.has_attention:
            together = self._qkv.project(_rms_normalise(x_th, self._attention_eps))
            heads = together.view(len(x_th), -1, self._channels)
            query, key, value = torch.split(heads, self._heads, dim=1)
            query_rotation = rotation
            if rows_n is not None:
                x_th, query = x_th[rows_n], query[rows_n]
                query_rotation = rotation[0][rows_n], rotation[1][rows_n]
            if self._norm_query is not None and self._norm_key is not None:
                query, key = self._norm_query(query), self._norm_key(key)
            query, key = rotate(query, *query_rotation), rotate(key, *rotation)
            if rows_n is None:
                attended = attend(query, key, value, packing, causal=True)
            else:
                attended = attend_once(query, key, value, packing)
            x_th = self._out.add_to(x_th, attended)
        if self._has_mlp:
            x_th = self._down.add_to(x_th, self._gate_up(_rms_normalise(x_th, self._mlp_eps)))
        return x_th


def _rms_normalise(x_th: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) without its weight, which is folded into the next projection."""
    if x_th.is_cuda:
        return F.rms_norm(x_th, x_th.shape[-1:], eps=eps)
    # Two passes over x; torch's own CPU RMSNorm makes five.
    mean_square = torch.linalg.vector_norm(x_th, dim=1, keepdim=True).square_().div_(x_th.shape[1])
    return torch.mul(x_th, mean_square.add_(eps).rsqrt_())


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


class _Bert:
    """Post-norm encoder: BERT, MiniLM, BGE, E5."""

    mean = staticmethod(mean_pool)
    window: int | None = None

    def __init__(self, retriever: Retriever, quantize: Quantize) -> None:
        model: Any = retriever.model
        self._embeddings = model.embeddings
        self._layers = [_BertLayer(layer, quantize) for layer in retriever.family.layers(model)]
        self.bytes = sum(part.bytes for layer in self._layers for part in layer.projections)
        self._last_attention = _last_with_attention(self._layers)

    def hidden(self, ids_t: Tensor, packing: Packing, rows_n: Tensor | None) -> Tensor:
        x_th: Tensor = self._embeddings(input_ids=ids_t[None], position_ids=packing.positions_t[None])[0]
        if rows_n is not None and self._last_attention is None:
            x_th = x_th[rows_n]
        for number, layer in enumerate(self._layers):
            x_th = layer.update(x_th, packing, rows_n if number == self._last_attention else None)
        return x_th


class _BertLayer:
    def __init__(self, layer: Any, quantize: Quantize) -> None:
        attention, inner = getattr(layer, "attention", None), getattr(layer, "intermediate", None)
        self.has_attention, self._has_mlp = attention is not None, inner is not None
        self.projections: list[Projection | GatedProjection] = []
        if attention is not None:
            part = attention.self
            self._qkv = fuse([part.query, part.key, part.value], quantize=quantize)
            self._heads, self._channels = part.num_attention_heads, part.attention_head_size
            self._out = fuse([attention.output.dense], quantize=quantize)
            self._attention_norm: nn.LayerNorm = attention.output.LayerNorm
            self.projections += [self._qkv, self._out]
        if inner is not None:
            self._up, activation = fuse([inner.dense], quantize=quantize), inner.intermediate_act_fn
            self._has_gelu = isinstance(activation, GELUActivation)
            self._activation: nn.Module = nn.Identity() if self._has_gelu else activation
            self._down = fuse([layer.output.dense], quantize=quantize)
            self._mlp_norm: nn.LayerNorm = layer.output.LayerNorm
            self.projections += [self._up, self._down]

    def update(self, x_th: Tensor, packing: Packing, rows_n: Tensor | None) -> Tensor:
        """The new residual stream, of the tokens at ``rows_n`` alone if given; ``x_th`` is used up."""
        if self.has_attention:
            heads = self._qkv.project(x_th).view(len(x_th), -1, self._channels)
            query, key, value = torch.split(heads, self._heads, dim=1)
            if rows_n is None:
                attended = attend(query, key, value, packing, causal=False)
            else:
                x_th, attended = x_th[rows_n], attend_once(query[rows_n], key, value, packing)
            x_th = self._attention_norm(self._out.add_to(x_th, attended))
        if self._has_mlp:
            inner = self._activation(self._up.project(x_th, "gelu" if self._has_gelu else "none"))
            x_th = self._mlp_norm(self._down.add_to(x_th, inner))
        return x_th


def _last_with_attention(layers: Sequence[_LlamaLayer | _BertLayer]) -> int | None:
    return max((number for number, layer in enumerate(layers) if layer.has_attention), default=None)
