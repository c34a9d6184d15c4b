"""Tokenizers in one uniform shape: a fast tokenizer whose own post-processor adds BOS, EOS, [CLS] and [SEP].

That way truncation keeps the EOS token, and a saved folder tokenizes the same way in sentence-transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from effir_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(folder: Path, *, append_eos: bool, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """Raises InputError when the folder has no tokenizer that the tokenizers library can run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
    ):
        raise InputError(
            f"{folder}: no tokenizer (tokenizer.json); expected the tokenizer's files beside config.json"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises no type of its own
        raise InputError(f"{folder}: cannot load the tokenizer: {' '.join(str(error).split())}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{folder}: its tokenizer has no fast version; expected a tokenizer.json")
    backend.no_padding()
    backend.no_truncation()
    tokens = {name: getattr(loaded, name) for name in _SPECIAL if getattr(loaded, name, None) is not None}
    tokens.setdefault("pad_token", tokens.get("eos_token"))
    if tokens["pad_token"] is None:
        raise InputError(
            f"{folder}: the tokenizer has neither a padding nor an EOS token; expected at least one"
        )
    # Two inputs only: token types of a single text are all zero, which models assume when they are not given.
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **tokens)
    return with_eos(tokenizer) if append_eos else tokenizer


def with_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make the tokenizer end every text with its EOS token, unless it already does."""
    from tokenizers.processors import TemplateProcessing

    eos = tokenizer.eos_token
    if eos is None:
        raise InputError(
            "append_eos is set but the tokenizer has no EOS token; expected one in tokenizer_config.json"
        )
    around = tokenizer("")["input_ids"]
    if around and around[-1] == tokenizer.eos_token_id:
        return tokenizer
    first = tokenizer.convert_ids_to_tokens(around)
    template = " ".join([*first, "$A", eos])
    special = [*zip(first, around, strict=True), (eos, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer
