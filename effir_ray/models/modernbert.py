"""ModernBERT: pre-norm encoder, gate and up projection fused into one Linear ``Wi``, q/k/v into ``Wqkv``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effir_ray.models.family import Family, sliding_window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _window(config: PreTrainedConfig, index: int) -> int | None:
    """transformers' number is how far to each side."""
    window = sliding_window(config, index)
    return None if window is None else 2 * window + 1


FAMILY = Family(
    name="modernbert",
    model_types=("modernbert",),
    causal=False,
    pooling="mean",
    blocks="layers",
    attention_parts=("attn", "attn_norm"),
    mlp_parts=("mlp", "mlp_norm"),
    mlp_input="mlp_norm",
    attention_linears=("attn.Wqkv", "attn.Wo"),
    up_name="mlp.Wi",
    gate_name="mlp.Wi",
    down_name="mlp.Wo",
    head_prefixes=("head.", "decoder."),
    window=_window,
    # It has no attention norm.
    first_block_differs=True,
)
