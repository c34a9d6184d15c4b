"""Fewer tokens: rows of the embedding matrix that texts hardly need go, and the tokenizer forgets them.

In small models the embedding matrix is a fifth to two thirds of all parameters, and no FLOPs. A text whose
tokens all stay is tokenised as before and embedded to the same vector; a word whose token is gone is spelt in
shorter ones, down to characters or bytes, which stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from effir_ray.data.pairs import Pair
from effir_ray.errors import InputError
from effir_ray.models.folder import RetrieverSpec
from effir_ray.models.tokenizers import keep_tokens, merged_through, needed_tokens, tokens_in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from effir_ray.models.retriever import Retriever

MOST_TEXTS = 100_000
"""Texts that are looked at: more change the order of rare tokens alone."""

_AT_ONCE = 1000


def token_counts(
    tokenizer: PreTrainedTokenizerFast, spec: RetrieverSpec, examples: Sequence[Pair], *, max_length: int
) -> NDArray[np.int64]:
    """(largest id + 1,) how often each token is in the texts and the queries about them, prompts included."""
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    texts = [spec.document_prompt + example.positives[0] for example in examples]
    texts += [spec.query_prompt + example.query for example in examples]
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        encoded = tokenizer(some, truncation=True, max_length=max_length, return_attention_mask=False)
        counts += np.bincount(list(chain.from_iterable(encoded["input_ids"])), minlength=len(counts))
    return counts


def choose_tokens(tokenizer: PreTrainedTokenizerFast, counts: NDArray[np.int64], size: int) -> list[int]:
    """Ids of the ``size`` tokens that stay, in the order of their new ids.

    Special tokens, characters and bytes always do; then the most frequent, of equally frequent ones those
    with the lowest id, which vocabularies give to what is frequent in general. With a token stay those that
    it is merged from. Raises InputError for a size below what always stays, or above what there is.
    """
    check_size(tokenizer, size)
    kept, through = needed_tokens(tokenizer), merged_through(tokenizer)
    there = set(tokenizer.get_vocab().values()) - kept
    ranked = [token for token in np.lexsort((np.arange(len(counts)), -counts)).tolist() if token in there]
    while len(kept) < size:
        waiting = []  # what needs too many others, some of which may be there in the next round
        for token in ranked:
            if len(kept) == size:
                break
            added = ({token} | through(token)) - kept
            if len(kept) + len(added) <= size:
                kept |= added
            else:
                waiting.append(token)
        ranked = waiting
    return tokens_in_order(tokenizer, kept)


def check_size(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    """Raise InputError unless ``size`` tokens can stay."""
    least = len(needed_tokens(tokenizer))
    if not least <= size <= len(tokenizer):
        raise InputError(
            f"vocabulary is {size}; expected {least} (special tokens, characters and bytes, which stay) to "
            f"{len(tokenizer)}"
        )


@torch.no_grad()
def cut_vocabulary(retriever: Retriever, kept: Sequence[int]) -> Retriever:
    """Leave ``retriever`` only the tokens ``kept`` (see ``choose_tokens``), in place."""
    retriever.tokenizer = keep_tokens(retriever.tokenizer, kept)
    embedding: Any = retriever.model.get_input_embeddings()
    weight, place = embedding.weight, {old: new for new, old in enumerate(kept)}
    rows = torch.tensor(kept, device=weight.device)
    embedding.weight = nn.Parameter(weight.index_select(0, rows), requires_grad=weight.requires_grad)
    embedding.num_embeddings = len(kept)
    embedding.padding_idx = place.get(embedding.padding_idx)
    config: Any = retriever.model.config
    config.vocab_size = len(kept)
    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and value is not None:
            many = isinstance(value, list)
            found = [place[token] for token in (value if many else [value]) if token in place]
            setattr(config, name, found if many else next(iter(found), None))
    return retriever
