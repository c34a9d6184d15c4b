"""``random:<model>[:seed]``: tiny random-weight models of every supported type, for tests and dry runs.

They have the traits that break code: grouped queries, sliding windows, alternating layer types, fused
projections. The tokenizer is a real byte-level BPE whose merges spell a few dozen English words, built here
so that it is the same in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from effir_ray.errors import InputError
from effir_ray.models.architecture import build_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY_SIZE = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # The usual 0.02 makes sublayers of so narrow a model almost the identity; nothing would be tested.
    "initializer_range": 0.1,
}
_DECODER: dict[str, Any] = {
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GEMMA: dict[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_TRAITS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DECODER),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 16}),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 16}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "bert": ("bert", {"pad_token_id": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "modernbert": (
        "modernbert",
        {
            "bos_token_id": 0,
            "cls_token_id": 0,
            "eos_token_id": 1,
            "sep_token_id": 1,
            "pad_token_id": 2,
            "local_attention": 16,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
}
RANDOM_MODELS = tuple(_TRAITS)

_WORDS = (
    "the of and to in is that for it as with are by on be this from or an at which have has not were "
    "was their more one can its other also new may these time some than only two our use used "
    "between study results cell cells protein model data search document query text function class "
    "return value list string file number"
)


def random_config(kind: str) -> PreTrainedConfig:
    """The configuration of ``random:<kind>``; InputError for an unknown kind."""
    from transformers import AutoConfig

    if kind not in _TRAITS:
        raise InputError(
            f"'random:{kind}' is not known; known: {', '.join(f'random:{name}' for name in _TRAITS)}"
        )
    model_type, traits = _TRAITS[kind]
    return AutoConfig.for_model(model_type, **{**_COMMON, **traits})


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The same weights for the same seed, whatever the caller's random state, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config).eval()


def random_tokenizer(causal: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ``<s> text`` for decoders, ``[CLS] text [SEP]`` for encoders (ids 0, 1; padding 2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end, pad = ("<s>", "</s>", "<pad>") if causal else ("[CLS]", "[SEP]", "[PAD]")
    vocabulary = {start: 0, end: 1, pad: 2}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in _WORDS.split():
        whole = "Ġ"  # a space, in the byte-level alphabet
        for letter in word:
            if len(vocabulary) == VOCABULARY_SIZE:
                break
            if whole + letter not in vocabulary:
                vocabulary[whole + letter] = len(vocabulary)
                merges.append((whole, letter))
            whole += letter
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    template = f"{start} $A" if causal else f"{start} $A {end}"
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(start, 0), (end, 1)]
    )
    names = {"bos_token": start, "eos_token": end} if causal else {"cls_token": start, "sep_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, **names)
