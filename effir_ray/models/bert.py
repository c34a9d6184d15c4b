"""BERT (MiniLM, BGE, E5): post-norm, ungated MLP made of two modules of the block.

The norm sits on the residual stream after the sum. A dropped sublayer is the identity on the stream, so its
norm goes with it.
"""

from effir_ray.models.family import Family

FAMILY = Family(
    name="bert",
    model_types=("bert",),
    causal=False,
    pooling="mean",
    blocks="encoder.layer",
    attention_parts=("attention",),
    mlp_parts=("intermediate", "output"),
    mlp_input="intermediate",
    attention_linears=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    up_name="intermediate.dense",
    gate_name=None,
    down_name="output.dense",
    post_norm=True,
    learned_positions=True,
    head_prefixes=("cls.", "pooler.", "embeddings.position_ids"),
    packing="post-norm",
    # The pooler serves next-sentence prediction; a retriever pools by itself.
    build_options={"add_pooling_layer": False},
    body_prefix="bert.",
)
