"""Fewer tokens: what stays says the same, and every text can still be said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.vocabulary import choose_tokens, cut_vocabulary, token_counts
from effir_ray.data.datasets import load_dataset
from effir_ray.data.pairs import Pair
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_parameters
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.folder import RetrieverSpec
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.models.tokenizers import keep_tokens, needed_tokens
from tests.helpers.search_examples import write_corpus

FAMILIES = [f"random:{kind}" for kind in ("llama", "gemma3", "bert", "modernbert")]
ODD = ["", "Ünïcödé 日本語 🎉", "antidisestablishmentarianism\tof\nmitochondria", "x" * 300, "a\u0301 \u200b"]


def sentences(count: int) -> list[str]:
    corpus = load_dataset("stdlib").corpus
    return corpus.texts(corpus.ids[:: max(1, len(corpus) // count)])


@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m", *FAMILIES])
def test_texts_whose_tokens_stay_are_embedded_to_the_same_vectors(name: str, tmp_path: Path) -> None:
    """Read from the folder that was written, with every other text spelt in tokens that stay."""
    blocks = 1 if name.startswith("smollm2") else None
    size = {"minilm-l6": 3000, "smollm2-135m": 6000}.get(name, 300)
    if name.startswith("random"):  # as real models come
        save_checkpoint(load_retriever(name), tmp_path / "full")
        name = str(tmp_path / "full")
    full, small = (load_retriever(name, first_blocks=blocks) for _ in range(2))
    counts = token_counts(full.tokenizer, full.spec, draw_examples("stdlib", 300, 0), max_length=128)
    kept = choose_tokens(full.tokenizer, counts, size)
    assert len(set(kept)) == len(kept) == size
    cut_vocabulary(small, kept)
    assert save_checkpoint(small, tmp_path / "small").ordinary
    small = load_retriever(tmp_path / "small")
    expected = Plan.full(len(full.plan.layers)).model_copy(update={"vocabulary": size})
    parameters = sum(parameter.numel() for parameter in small.model.parameters())
    assert parameters == count_parameters(full.model.config, expected)
    assert parameters == count_parameters(small.model.config, small.plan)

    place = {old: new for new, old in enumerate(kept)}
    texts = [*sentences(400), *ODD]
    before, after = (each.tokenize(texts, "document", 64) for each in (full, small))
    same = [number for number, ids in enumerate(before) if all(token in place for token in ids)]
    other = [number for number in range(len(texts)) if number not in set(same)]
    assert len(same) > 20 and len(other) > 20
    for number in same:
        assert after[number] == [place[token] for token in before[number]], texts[number]
    unknown = [ids.count(full.tokenizer.unk_token_id) for ids in before]
    for number in other:
        assert after[number].count(small.tokenizer.unk_token_id) == unknown[number], texts[number]
        assert len(after[number]) >= min(len(before[number]), 64)
    chosen = [texts[number] for number in same]
    vectors = [Encoder(each).encode(chosen, "document", max_length=64) for each in (full, small)]
    np.testing.assert_allclose(*vectors, atol=2e-6)


def test_every_byte_can_still_be_said() -> None:
    """A byte-level tokenizer with nothing but its bytes spells any text back."""
    full = load_retriever("smollm2-135m", first_blocks=1)
    least = needed_tokens(full.tokenizer)
    kept = choose_tokens(full.tokenizer, np.zeros(len(full.tokenizer), np.int64), len(least))
    assert set(kept) == least
    small = keep_tokens(full.tokenizer, kept)
    for text in (*ODD, *sentences(20)):
        ids = small(text, add_special_tokens=False)["input_ids"]
        assert small.decode(ids) == full.tokenizer.decode(
            full.tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def fast(model: models.Model, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: characters that are merged, bytes for all others."""
    pieces = ["<unk>", "<pad>", *BYTES, *"▁abcd", "ab", "▁ab", "cd", "abcd", "▁abcd", "bc"]
    merges = [("a", "b"), ("▁", "ab"), ("c", "d"), ("ab", "cd"), ("▁ab", "cd"), ("b", "c")]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    return fast(model, unk_token="<unk>", pad_token="<pad>")


def unigram() -> PreTrainedTokenizerFast:
    scored = [("<unk>", 0.0), ("<pad>", 0.0), *((piece, -5.0) for piece in "▁abcd"), ("▁ab", -1.0)]
    scored += [("cd", -2.0), ("▁abcd", -2.5), ("bc", -1.5)]
    return fast(models.Unigram(scored, unk_id=0), unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
def test_other_kinds_of_tokenizers_keep_their_ways(make: object) -> None:
    full = make()  # type: ignore[operator]
    names = full.convert_ids_to_tokens(range(len(full)))
    wanted = [number for number, name in enumerate(names) if name not in ("▁abcd", "bc")]
    small = keep_tokens(full, wanted)
    assert small.convert_ids_to_tokens(range(len(small))) == [names[number] for number in wanted]
    assert small.unk_token_id == wanted.index(full.unk_token_id)
    for text, changed in (("ab cd", False), ("abcd", True), ("ab ab", False), ("dab", False)):
        before, after = (each.tokenize(text) for each in (full, small))
        assert (before != after) == changed, (before, after)
        assert "".join(after) == "".join(before)
    if make is sentencepiece_bpe:
        counts = np.zeros(len(full), np.int64)
        counts[full.convert_tokens_to_ids("▁abcd")] = 5
        kept = choose_tokens(full, counts, 258 + 9)  # with all that it is merged from
        pieces = {"▁abcd", "▁ab", "ab", "cd", *"▁abcd"}
        assert {names[token] for token in kept} == {"<unk>", "<pad>", *BYTES} | pieces


def test_a_token_stays_with_what_it_is_really_merged_from() -> None:
    """There may be several merges to one token: which one texts take is decided by those before it."""
    pieces = ["<pad>", *"abc", "bc", "ab", "abc"]
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]  # "abc" is a + bc, though ab + c comes first
    full = fast(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges), pad_token="<pad>")
    full.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    counts = np.zeros(len(full), np.int64)
    counts[full.convert_tokens_to_ids("abc")] = 1
    small = keep_tokens(full, choose_tokens(full, counts, 6))
    assert full.tokenize("abc") == small.tokenize("abc") == ["abc"]
    assert set(small.get_vocab()) == {"<pad>", *"abc", "bc", "abc"}


def test_ids_may_have_holes() -> None:
    pieces = {"<pad>": 0, "a": 1, "b": 2, "c": 7, "ab": 9}
    full = fast(models.BPE(pieces, [("a", "b")]), pad_token="<pad>")
    spec = RetrieverSpec(pooling="mean", append_eos=False)
    counts = token_counts(full, spec, [Pair("1", "ab", ("c ab",))], max_length=8)
    assert len(counts) == 10 and counts[9] == 2
    small = keep_tokens(full, choose_tokens(full, counts, 5))
    assert small.convert_ids_to_tokens(range(5)) == ["<pad>", "a", "b", "c", "ab"]
    with pytest.raises(InputError, match=r"expected 4 .* to 5"):
        choose_tokens(full, counts, 6)


def test_a_vocabulary_of_an_impossible_size_says_what_is_possible(tmp_path: Path) -> None:
    full = load_retriever("random:llama")
    counts = np.ones(len(full.tokenizer), np.int64)
    least = len(needed_tokens(full.tokenizer))
    for size in (least - 1, len(full.tokenizer) + 1):
        with pytest.raises(InputError, match=f"vocabulary is {size}; expected {least} .* to 444"):
            choose_tokens(full.tokenizer, counts, size)
    with pytest.raises(InputError, match="vocabulary is 600; the backbone has 512 tokens"):
        compress("random:llama", Schedule(vocabulary=600), tmp_path / "small")


def test_compressing_takes_tokens_as_it_takes_sublayers(tmp_path: Path) -> None:
    """Counted before anything is measured, and loaded by transformers as it is."""
    schedule = Schedule(drop_block=(1,), vocabulary=300)
    assert schedule.name == "B[1]-v300" and "vocabulary" not in Schedule(drop_mlp=1).model_dump()
    calibration = Calibration(dataset=str(write_corpus(tmp_path / "texts")), max_length=64)
    preview = compress("random:qwen3", schedule, None, calibration=calibration)
    made = compress("random:qwen3", schedule, tmp_path / "small", calibration=calibration)
    assert made.plan is not None and made.plan.vocabulary == 300
    assert made.layout is not None and made.layout.ordinary
    model = AutoModel.from_pretrained(tmp_path / "small")
    assert made.parameters == preview.parameters == sum(each.numel() for each in model.parameters())
    assert (
        made.parameters == made.full_parameters - 212 * 64 - 1 * (made.full_parameters - 512 * 64 - 64) // 4
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(tokenizer) == 300 == json.loads((tmp_path / "small" / "config.json").read_text())["vocab_size"]
    ids = tokenizer(["the function returns a value", *ODD])["input_ids"]
    assert max(map(max, ids)) < 300 and all(each[-1] == tokenizer.eos_token_id for each in ids)
    with torch.no_grad():
        assert model(torch.tensor([ids[0]])).last_hidden_state.isfinite().all()
    again = compress(
        str(tmp_path / "small"), Schedule(vocabulary=280), tmp_path / "again", calibration=calibration
    )
    assert again.parameters == made.parameters - 20 * 64
