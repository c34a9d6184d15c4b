"""Tokenizers in one uniform shape: a fast tokenizer whose own post-processor adds BOS, EOS, [CLS] and [SEP].

That way truncation keeps the EOS token, and a saved folder tokenizes the same way in sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effir_ray.errors import InputError
from effir_ray.readers import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(folder: Path, *, append_eos: bool, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """Raises InputError when the folder has no tokenizer that the tokenizers library can run."""
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
    ):
        raise InputError(
            f"{folder}: no tokenizer (tokenizer.json); expected the tokenizer's files beside config.json"
        )
    with _told(folder):
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{folder}: its tokenizer has no fast version; expected a tokenizer.json")
        _check_ids(backend.get_vocab(), folder)
        backend.no_padding()
        backend.no_truncation()
        tokens = {name: found for name in _SPECIAL if (found := getattr(loaded, name, None)) is not None}
        tokens.setdefault("pad_token", tokens.get("eos_token"))
        if tokens["pad_token"] is None:
            raise InputError(
                f"{folder}: the tokenizer has neither a padding nor an EOS token; expected at least one"
            )
        tokenizer = _wrapped(backend, tokens)  # written and read again: not all that loads is whole
        return with_eos(tokenizer) if append_eos else tokenizer


def _check_ids(vocabulary: Mapping[str, int], folder: Path) -> None:
    """Raise InputError for two tokens of one id, of which the library keeps either, as it happens."""
    known: dict[int, str] = {}
    for token, number in vocabulary.items():
        if known.setdefault(number, token) != token:
            first, second = sorted((known[number], token))
            raise InputError(
                f"{folder}: its tokenizer has two tokens of id {number}, {quoted(first)} and {quoted(second)}"
            )


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the tokenizers library has against the tokenizer of ``folder``: it raises no type of its own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: cannot load the tokenizer: {' '.join(str(error).split())}") from None


def _wrapped(backend: Any, tokens: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """With the special ``tokens`` by name. Two inputs only: token types of a single text are all zero, which
    models assume when they are not given."""
    from transformers import PreTrainedTokenizerFast

    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **tokens)


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


def keep_tokens(tokenizer: PreTrainedTokenizerFast, kept: Sequence[int]) -> PreTrainedTokenizerFast:
    """The tokenizer with the tokens ``kept`` alone, whose new ids are their places in it.

    A text that becomes kept tokens becomes the same ones as before. WordPiece takes the longest piece, which
    is still there; Unigram the likeliest way, which no piece that is gone can make less likely; BPE merges by
    rank, and what is merged on the way to a kept token has to be kept with it (``merged_through``). Raises
    InputError for another kind of tokenizer.
    """
    from tokenizers import Tokenizer

    place = {old: new for new, old in enumerate(kept)}
    state = _state(tokenizer)
    state["added_tokens"] = [
        {**token, "id": place[token["id"]]} for token in state["added_tokens"] if token["id"] in place
    ]
    state["post_processor"] = _renumbered(state["post_processor"], place)
    model = state["model"]
    if isinstance(model["vocab"], list):  # Unigram: ids are places
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = place[model["unk_id"]]
    else:
        vocabulary = {piece: place[old] for piece, old in model["vocab"].items() if old in place}
        model["vocab"] = vocabulary
        if "merges" in model:
            merges = [(merge, _merged(merge, model)) for merge in model["merges"]]
            model["merges"] = [merge for merge, parts in merges if all(part in vocabulary for part in parts)]
    tokens = {
        name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name, None) is not None
    }
    return _wrapped(Tokenizer.from_str(json.dumps(state)), tokens)


def _state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"].get("type")
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise InputError(
            f"the vocabulary of a {kind} tokenizer cannot be cut; expected BPE, WordPiece, Unigram"
        )
    return state


def _merged(merge: str | list[str], model: Mapping[str, Any]) -> tuple[str, str, str]:
    """The two pieces of a merge of BPE, and the one they become."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _renumbered(processor: Any, place: Mapping[int, int]) -> Any:
    """A post-processor with the new ids of the special tokens it adds."""
    if not isinstance(processor, dict):
        return processor
    kind = processor.get("type")
    if kind == "Sequence":
        return {**processor, "processors": [_renumbered(each, place) for each in processor["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: {**token, "ids": [place[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**processor, **{end: [processor[end][0], place[processor[end][1]]] for end in ("sep", "cls")}}
    return processor


def merged_through(tokenizer: PreTrainedTokenizerFast) -> Callable[[int], set[int]]:
    """Of BPE: a function from a token to all that its characters are on their way to it; empty for other
    kinds. Merges within what becomes one token are the same whatever stands around it."""
    model = _state(tokenizer)["model"]
    vocabulary = model["vocab"]
    if "merges" not in model:
        return lambda token: set()
    merges = [_merged(merge, model) for merge in model["merges"]]
    ranks = {(first, second): rank for rank, (first, second, _) in enumerate(merges)}
    names = {number: piece for piece, number in vocabulary.items()}

    def through(token: int) -> set[int]:
        symbols, found = _symbols(names.get(token, ""), model), set()
        while len(symbols) > 1:
            rank, place = min(
                (ranks.get((first, second), len(merges)), place)
                for place, (first, second) in enumerate(pairwise(symbols))
            )
            if rank == len(merges):  # no merges lead to it
                return set()
            whole = merges[rank][2]
            symbols[place : place + 2] = [whole]
            found.add(whole)
        found |= set(_symbols(names[token], model)) if token in names else set()
        return {vocabulary[piece] for piece in found if piece in vocabulary}

    return through


def _symbols(piece: str, model: Mapping[str, Any]) -> list[str]:
    """What BPE begins with, as the vocabulary has it."""
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    characters = list(piece.removesuffix(suffix))
    if characters and suffix and piece.endswith(suffix):
        characters[-1] += suffix
    return [character if place == 0 else prefix + character for place, character in enumerate(characters)]


def needed_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """What has to stay, so that every text can be spelt: special tokens that have a part to play, and bytes,
    or where the tokenizer does not fall back on those, single characters."""
    state = _state(tokenizer)
    model = state["model"]
    special = [getattr(tokenizer, f"{name}_id", None) for name in _SPECIAL]
    needed = {int(token) for token in special if token is not None} | set(tokenizer("")["input_ids"])
    vocabulary = model["vocab"]
    pieces = (
        {piece: number for number, (piece, _) in enumerate(vocabulary)}
        if isinstance(vocabulary, list)
        else vocabulary
    )
    if model.get("unk_token") in pieces:
        needed.add(pieces[model["unk_token"]])
    if model.get("unk_id") is not None:
        needed.add(model["unk_id"])
    prefix = model.get("continuing_subword_prefix") or ""
    if model.get("byte_fallback"):
        needed |= {pieces[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in pieces}
    else:
        needed |= {number for piece, number in pieces.items() if len(piece.removeprefix(prefix)) == 1}
    return needed


def tokens_in_order(tokenizer: PreTrainedTokenizerFast, tokens: Collection[int]) -> list[int]:
    """By id, those that were added to the vocabulary of the model last, as the tokenizers library has it."""
    vocabulary = _state(tokenizer)["model"]["vocab"]
    own = set(range(len(vocabulary))) if isinstance(vocabulary, list) else set(vocabulary.values())
    return sorted(tokens, key=lambda token: (token not in own, token))
