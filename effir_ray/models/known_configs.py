"""Shapes of the paper's backbones and of those in ``search_spaces/``, so that plans and sizes need no
network.

Values are those of each repository's config.json; what is not listed is transformers' default for the model
type.
"""

from __future__ import annotations

from typing import Any


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


_MISTRAL = {
    "model_type": "mistral",
    **_shape(4096, 14336, 32, 32, 8, 32000),
    **_rope(10000.0),
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, **_rope(1e6)}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "intfloat/e5-mistral-7b-instruct": _MISTRAL,
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        **_shape(4096, 11008, 32, 32, 32, 32000),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama",
        **_shape(4096, 14336, 32, 32, 8, 128256),
        **_rope(500000.0),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        **_shape(2048, 8192, 16, 32, 8, 128256),
        **_rope(500000.0, **_LLAMA3_SCALING),
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "princeton-nlp/Sheared-LLaMA-2.7B": {
        "model_type": "llama",
        **_shape(2560, 6912, 32, 20, 20, 32000),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "Qwen/Qwen1.5-4B": {**_QWEN, **_shape(2560, 6912, 40, 20, 20, 151936), "max_position_embeddings": 32768},
    "Qwen/Qwen2.5-1.5B": {**_QWEN, **_shape(1536, 8960, 28, 12, 2, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-3B": {
        **_QWEN,
        **_shape(2048, 11008, 36, 16, 2, 151936),
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B": {**_QWEN, **_shape(3584, 18944, 28, 28, 4, 152064)},
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        **_shape(2304, 9216, 26, 8, 4, 256000),
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    },
    "answerdotai/ModernBERT-base": {
        "model_type": "modernbert",
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "vocab_size": 50368,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
    },
    "smollm2-135m": {
        "model_type": "llama",
        **_shape(576, 1536, 30, 9, 3, 49152),
        **_rope(100000.0),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "minilm-l6": {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30522,
    },
}
