"""Gemma 2 and 3 (text): norms before and after each sublayer, both of which go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effir_ray.models.family import Family, sliding_window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _window(config: PreTrainedConfig, index: int) -> int | None:
    """EmbeddingGemma looks to both sides, less than the window's tokens to each."""
    window = sliding_window(config, index)
    if window is None or not getattr(config, "use_bidirectional_attention", None):
        return window
    return 2 * window - 1


FAMILY = Family(
    name="gemma",
    model_types=("gemma2", "gemma3_text"),
    causal=True,
    pooling="last",
    blocks="layers",
    attention_parts=("self_attn", "input_layernorm", "post_attention_layernorm"),
    mlp_parts=("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    mlp_input="pre_feedforward_layernorm",
    attention_linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    up_name="mlp.up_proj",
    gate_name="mlp.gate_proj",
    down_name="mlp.down_proj",
    window=_window,
)
