"""ModernBERT: pre-norm encoder, gate and up projection fused into one Linear ``Wi``, q/k/v into ``Wqkv``."""

from effir_ray.models.family import Family

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
)
