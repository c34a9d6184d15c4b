"""Llama-like decoders: pre-norm blocks, gated MLP. Llama 2/3, SmolLM2, Mistral, Qwen2/2.5, Qwen3."""

from effir_ray.models.family import Family

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    causal=True,
    pooling="last",
    blocks="layers",
    attention_parts=("self_attn", "input_layernorm"),
    mlp_parts=("mlp", "post_attention_layernorm"),
    mlp_input="post_attention_layernorm",
    attention_linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    up_name="mlp.up_proj",
    gate_name="mlp.gate_proj",
    down_name="mlp.down_proj",
    packing="pre-norm",
)
