"""What each family's blocks are, as a chain of sublayers on one residual stream.

Shapes: h hidden, q query heads, k key-value heads, d channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.activations import ACT2FN

from effir_ray.encoding.cpu_kernels import EVERYTHING, READABLE, Activation, NormFields, address
from effir_ray.encoding.projections import NotPlainError, check_plain
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
        return NormFields(kind, self.eps, address(self.weight), address(self.bias))


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


Parts = tuple[Embedding, list[Sublayer], Norm | None]  # the sublayers in order, and the final norm


def _chain(
    retriever: Retriever, attention: Callable[[int, Any], Sublayer], mlp: Callable[[Any], Sublayer]
) -> list[Sublayer]:
    """What is left of every block, as ``attention`` (of its number and itself) and ``mlp`` describe it."""
    parts = []
    for index, layer in enumerate(retriever.family.layers(retriever.model)):
        if retriever.family.attention(layer) is not None:
            parts.append(attention(index, layer))
        if retriever.family.mlp(layer) is not None:
            parts.append(mlp(layer))
    return parts


def _llama(retriever: Retriever) -> Parts:
    model: Any = retriever.model

    def attention(index: int, block: Any) -> Sublayer:
        return _rotary_attention(retriever, index, block, before=_rms(block.input_layernorm))

    def mlp(block: Any) -> Sublayer:
        return _gated_mlp(block.mlp, before=_rms(block.post_attention_layernorm))

    embedding = Embedding(tokens=_table(model.embed_tokens))
    return embedding, _chain(retriever, attention, mlp), _rms(model.norm)


def _gemma(retriever: Retriever) -> Parts:
    model: Any = retriever.model

    def attention(index: int, block: Any) -> Sublayer:
        before, inner = _rms(block.input_layernorm), _rms(block.post_attention_layernorm)
        return _rotary_attention(retriever, index, block, before=before, inner=inner)

    def mlp(block: Any) -> Sublayer:
        before, inner = _rms(block.pre_feedforward_layernorm), _rms(block.post_feedforward_layernorm)
        return _gated_mlp(block.mlp, before=before, inner=inner)

    table = model.embed_tokens
    # Gemma 2 and 3 multiply by a number that is rounded to the type of the weights.
    embedding = Embedding(tokens=_table(table), scale=float(table.embed_scale.to(table.weight.dtype)))
    return embedding, _chain(retriever, attention, mlp), _rms(model.norm)


def _rotary_attention(
    retriever: Retriever, index: int, block: Any, *, before: Norm, inner: Norm | None = None
) -> Sublayer:
    module = block.self_attn
    config: Any = retriever.model.config
    linears = [module.q_proj, module.k_proj, module.v_proj]
    check_plain(*linears)
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
    return Sublayer(does=does, first=linears, second=module.o_proj, before=before, inner=inner)


def _rotary_kind(retriever: Retriever, index: int) -> str:
    """'all' where one rotary embedding serves all layers."""
    model: Any = retriever.model
    by_kind = isinstance(getattr(model.rotary_emb, "rope_type", None), dict)
    return str(model.config.layer_types[index]) if by_kind else "all"


def _gated_mlp(mlp: Any, *, before: Norm, inner: Norm | None = None) -> Sublayer:
    does, first = Gate(activation=_activation(mlp.act_fn), gated=True), [mlp.gate_proj, mlp.up_proj]
    return Sublayer(does=does, first=first, second=mlp.down_proj, before=before, inner=inner)


def _modernbert(retriever: Retriever) -> Parts:
    model: Any = retriever.model
    heads = model.config.num_attention_heads

    def attention(index: int, block: Any) -> Sublayer:
        module, norm = block.attn, block.attn_norm
        left, right = _sight(retriever.family.window(model.config, index), causal=False)
        does = Attention(
            queries=heads,
            keys=heads,
            channels=module.head_dim,
            left=left,
            right=right,
            scale=module.head_dim**-0.5,
            rotary=_rotary_kind(retriever, index),
        )
        before = None if isinstance(norm, nn.Identity) else _layer_norm(norm)
        return Sublayer(does=does, first=[module.Wqkv], second=module.Wo, before=before)

    def mlp(block: Any) -> Sublayer:
        gate = Gate(activation=_activation(block.mlp.act), gated=True)
        before = _layer_norm(block.mlp_norm)
        return Sublayer(does=gate, first=[block.mlp.Wi], second=block.mlp.Wo, before=before)

    tables = model.embeddings
    embedding = Embedding(tokens=_table(tables.tok_embeddings), norm=_layer_norm(tables.norm))
    return embedding, _chain(retriever, attention, mlp), _layer_norm(model.final_norm)


def _bert(retriever: Retriever) -> Parts:
    def attention(index: int, block: Any) -> Sublayer:
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
        first, after = [module.query, module.key, module.value], _layer_norm(output.LayerNorm)
        return Sublayer(does=does, first=first, second=output.dense, after=after)

    def mlp(block: Any) -> Sublayer:
        inner, output = block.intermediate, block.output
        gate = Gate(activation=_activation(inner.intermediate_act_fn), gated=False)
        after = _layer_norm(output.LayerNorm)
        return Sublayer(does=gate, first=[inner.dense], second=output.dense, after=after)

    tables: Any = retriever.model.embeddings
    embedding = Embedding(
        tokens=_table(tables.word_embeddings),
        positions=_table(tables.position_embeddings),
        everywhere=_table(tables.token_type_embeddings),
        norm=_layer_norm(tables.LayerNorm),
    )
    return embedding, _chain(retriever, attention, mlp), None


PARTS: dict[str, Callable[[Retriever], Parts]] = {
    "llama": _llama,
    "gemma": _gemma,
    "modernbert": _modernbert,
    "bert": _bert,
}


def _table(embedding: nn.Embedding) -> Tensor:
    """Its rows, in a type that the kernels read."""
    weight = embedding.weight.detach()
    return weight if weight.dtype in READABLE else weight.float()


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
