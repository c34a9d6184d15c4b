"""Forward passes without padding for Llama-like decoders and BERT, compressed ones included.

All tokens of a batch lie in one (tokens, hidden) matrix, so every linear layer is one large product; only
attention knows where texts begin. Query, key and value projections are fused, gate and up too; RMSNorm
weights are folded into the projection that follows. The weights are a snapshot of the model's.

Shapes: t tokens of all texts, h hidden, q query heads, k key-value heads, d channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effir_ray.backbones.retriever import Retriever
from effir_ray.retrieval.padded import PaddedForward
from effir_ray.retrieval.projections import fuse
from effir_ray.retrieval.varlen_attention import Packing, attend, pool

Quantize = Literal["int8"] | None

_PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # angles do not depend on the longest text of a batch


class _Model(Protocol):
    window: int | None  # longest text for which attention is full

    def hidden(self, ids_t: Tensor, packing: Packing) -> Tensor:
        """Last hidden states (t, h)."""


class PackedForward:
    """Embeds token lists without padding."""

    padded = False

    def __init__(self, retriever: Retriever, model: _Model) -> None:
        self._retriever, self._model = retriever, model
        self._long = PaddedForward(retriever)

    def __call__(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """b token lists, best ordered by length -> embeddings (b, d) on the model's device."""
        lengths = [len(ids) for ids in tokens]
        if self._model.window is not None and max(lengths) > self._model.window:
            return self._long(tokens)
        ids = torch.tensor([i for text in tokens for i in text])
        device = self._retriever.model.device
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        packing = Packing.of(lengths, device)
        pooled = pool(self._model.hidden(ids, packing), packing, self._retriever.spec.pooling)
        return F.normalize(pooled, dim=-1) if self._retriever.spec.normalize else pooled


def packed_forward(retriever: Retriever, quantize: Quantize = None) -> PackedForward | None:
    """None where there is no packed pass: other families, unusual settings, float32 on CUDA (no kernel)."""
    config: Any = retriever.model.config
    if retriever.model.device.type == "cuda" and retriever.model.dtype not in (torch.float16, torch.bfloat16):
        return None
    if retriever.family.name == "llama" and config.hidden_act == "silu":
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return PackedForward(retriever, _Llama(retriever, quantize)) if rope in _PLAIN_ROPE else None
    if retriever.family.name == "bert":
        return PackedForward(retriever, _Bert(retriever, quantize))
    return None


class _Llama:
    """Pre-norm decoder: Llama, SmolLM2, Mistral, Qwen2, Qwen3."""

    def __init__(self, retriever: Retriever, quantize: Quantize) -> None:
        model: Any = retriever.model
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm
        self._layers = [_LlamaLayer(layer, quantize) for layer in retriever.family.layers(model)]
        self.window = _window(model.config)

    def hidden(self, ids_t: Tensor, packing: Packing) -> Tensor:
        x_th = self._embed(ids_t)
        cos, sin = self._rotary(x_th[None], packing.positions_t[None])  # (1, t, d), both halves alike
        half = cos.shape[-1] // 2
        rotation = cos[0, :, None, :half], sin[0, :, None, :half]  # (t, 1, d / 2)
        for layer in self._layers:
            layer.update(x_th, packing, rotation)
        normed: Tensor = self._norm(x_th)
        return normed


class _LlamaLayer:
    def __init__(self, layer: Any, quantize: Quantize) -> None:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        self._has_attention, self._has_mlp = attention is not None, mlp is not None
        if attention is not None:
            norm = layer.input_layernorm
            self._attention_eps = norm.variance_epsilon
            linears = [attention.q_proj, attention.k_proj, attention.v_proj]
            self._qkv = fuse(linears, scale=norm.weight, quantize=quantize)
            self._out = fuse([attention.o_proj], quantize=quantize)
            self._channels = attention.head_dim
            self._heads = [linear.out_features // attention.head_dim for linear in linears]
            # Qwen3 normalises every head of query and key.
            self._norm_query: nn.Module | None = getattr(attention, "q_norm", None)
            self._norm_key: nn.Module | None = getattr(attention, "k_norm", None)
        if mlp is not None:
            norm = layer.post_attention_layernorm
            self._mlp_eps = norm.variance_epsilon
            self._gate_up = fuse([mlp.gate_proj, mlp.up_proj], scale=norm.weight, quantize=quantize)
            self._down = fuse([mlp.down_proj], quantize=quantize)

    def update(self, x_th: Tensor, packing: Packing, rotation: tuple[Tensor, Tensor]) -> None:
        """Run the layer on the residual stream, in place. rotation: cos and sin, (t, 1, d / 2)."""
        if self._has_attention:
            together = self._qkv.project(_rms_normalise(x_th, self._attention_eps))
            heads = together.view(len(x_th), -1, self._channels)
            query, key, value = torch.split(heads, self._heads, dim=1)
            if self._norm_query is not None and self._norm_key is not None:
                query, key = self._norm_query(query), self._norm_key(key)
            query, key = _rotate(query, *rotation), _rotate(key, *rotation)
            self._out.add_to(x_th, attend(query, key, value, packing, causal=True))
        if self._has_mlp:
            gate, up = self._gate_up.project(_rms_normalise(x_th, self._mlp_eps)).chunk(2, dim=1)
            self._down.add_to(x_th, F.silu(gate, inplace=True).mul_(up))


def _rms_normalise(x_th: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) without its weight, which is folded into the next projection."""
    if x_th.is_cuda:
        return F.rms_norm(x_th, x_th.shape[-1:], eps=eps)
    # Two passes over x; torch's own CPU RMSNorm makes five.
    mean_square = torch.linalg.vector_norm(x_th, dim=1, keepdim=True).square_().div_(x_th.shape[1])
    return torch.mul(x_th, mean_square.add_(eps).rsqrt_())


def _rotate(x_tnd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), Hugging Face's layout: channel c turns with channel c + d / 2."""
    first, second = x_tnd.chunk(2, dim=-1)
    rotated = torch.empty(x_tnd.shape, dtype=x_tnd.dtype, device=x_tnd.device)
    low, high = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return rotated


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


class _Bert:
    """Post-norm encoder: BERT, MiniLM, BGE, E5."""

    window: int | None = None

    def __init__(self, retriever: Retriever, quantize: Quantize) -> None:
        model: Any = retriever.model
        self._embeddings = model.embeddings
        self._layers = [_BertLayer(layer, quantize) for layer in retriever.family.layers(model)]

    def hidden(self, ids_t: Tensor, packing: Packing) -> Tensor:
        x_th: Tensor = self._embeddings(input_ids=ids_t[None], position_ids=packing.positions_t[None])[0]
        for layer in self._layers:
            x_th = layer.update(x_th, packing)
        return x_th


class _BertLayer:
    def __init__(self, layer: Any, quantize: Quantize) -> None:
        attention, inner = getattr(layer, "attention", None), getattr(layer, "intermediate", None)
        self._has_attention, self._has_mlp = attention is not None, inner is not None
        if attention is not None:
            part = attention.self
            self._qkv = fuse([part.query, part.key, part.value], quantize=quantize)
            self._heads, self._channels = part.num_attention_heads, part.attention_head_size
            self._out = fuse([attention.output.dense], quantize=quantize)
            self._attention_norm: nn.LayerNorm = attention.output.LayerNorm
        if inner is not None:
            self._up, self._activation = fuse([inner.dense], quantize=quantize), inner.intermediate_act_fn
            self._down = fuse([layer.output.dense], quantize=quantize)
            self._mlp_norm: nn.LayerNorm = layer.output.LayerNorm

    def update(self, x_th: Tensor, packing: Packing) -> Tensor:
        """The new residual stream (t, h); ``x_th`` is used up."""
        if self._has_attention:
            heads = self._qkv.project(x_th).view(len(x_th), -1, self._channels)
            query, key, value = torch.split(heads, self._heads, dim=1)
            self._out.add_to(x_th, attend(query, key, value, packing, causal=False))
            x_th = self._attention_norm(x_th)
        if self._has_mlp:
            self._down.add_to(x_th, self._activation(self._up.project(x_th)))
            x_th = self._mlp_norm(x_th)
        return x_th
