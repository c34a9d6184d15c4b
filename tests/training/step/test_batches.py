"""Which texts a step sees: fixed by seed and epoch, whatever the number of ranks, from any step on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from effir_ray.data.pairs import Pair
from effir_ray.errors import InputError
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import Batch, Batches, hash64, text_hash


def pairs(count: int = 10, negatives: int = 3) -> list[Pair]:
    return [
        Pair(
            query_id=str(i),
            query=f"q{i}",
            positives=(f"p{i}a", f"p{i}b"),
            negatives=tuple(f"n{i}{j}" for j in range(negatives)),
            teacher_scores=tuple(float(10 * i + j) for j in range(2 + negatives)),
            positive_ids=(f"id-p{i}a", f"id-p{i}b"),
            negative_ids=tuple(f"id-n{i}{j}" for j in range(negatives)),
        )
        for i in range(count)
    ]


def tokenize(texts: Sequence[str], kind: str) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


def config(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"dataset": "d", "batch_size": 4, "hard_negatives": 2, **settings})


def both(*texts: str) -> list[int]:
    """The hashes of id and text of each."""
    return [number for text in texts for number in (hash64(f"id-{text}"), text_hash(text))]


def texts(batches: Sequence[Batch]) -> list[list[str]]:
    return [batch.texts for batch in batches]


def test_two_ranks_together_see_what_one_sees() -> None:
    settings = config(epochs=2, workers=2)
    whole = list(Batches(pairs(), settings, tokenize).run())
    halves = [list(Batches(pairs(), settings, tokenize, rank=r, world=2).run()) for r in range(2)]
    assert len(whole) == 4
    for step, batch in enumerate(whole):
        shares = [half[step] for half in halves]
        assert sorted(batch.texts) == sorted(shares[0].texts + shares[1].texts)
        assert all(share.document_ids.shape == (2, 3, 2) for share in shares)


def test_a_run_goes_on_in_the_middle_as_if_it_had_never_stopped() -> None:
    batches = Batches(pairs(), config(steps=6), tokenize)
    assert texts(list(batches.run(3))) == texts(list(batches.run()))[3:]


def test_epochs_are_shuffled_differently_and_seeds_matter() -> None:
    batches = Batches(pairs(8), config(epochs=2), tokenize)
    run = texts(list(batches.run()))
    queries = [text for step in run for text in step if text.startswith("q")]
    assert sorted(queries[:8]) == sorted(queries[8:]) and queries[:8] != queries[8:]
    assert texts(list(Batches(pairs(8), config(epochs=2, seed=1), tokenize).run())) != run


def test_ids_and_scores_stay_with_their_texts() -> None:
    for batch in Batches(pairs(), config(epochs=3), tokenize).run():
        documents = batch.texts[batch.n_queries :]
        assert batch.document_ids.flatten().tolist() == both(*documents)
        columns = {"a": 0, "b": 1} | {str(j): 2 + j for j in range(3)}
        expected = [10 * int(text[1]) + columns[text[2]] for text in documents]
        assert batch.teacher_scores.flatten().tolist() == expected
        assert batch.tokens == tokenize(batch.texts, "")
        for i, query in enumerate(batch.texts[: batch.n_queries]):
            number = query[1]
            assert batch.positive_ids[i].tolist() == both(f"p{number}a", f"p{number}b")
            own = documents[3 * i : 3 * i + 3]
            assert own[0][:2] == f"p{number}" and all(text[:2] == f"n{number}" for text in own[1:])


def test_lacking_negatives_are_other_queries_positives_without_scores() -> None:
    mixed = pairs(4, negatives=2)[:3] + pairs(4, negatives=0)[3:]
    (batch,) = Batches(mixed, config(), tokenize).run()
    row = batch.texts[:4].index("q3")
    assert all(text.startswith("p") for text in batch.texts[4:][3 * row : 3 * row + 3])
    assert math.isnan(batch.teacher_scores[row, 2])
    assert not torch.isnan(batch.teacher_scores[[i for i in range(4) if i != row]]).any()


def test_no_more_negatives_are_asked_than_there_are() -> None:
    assert Batches(pairs(negatives=1), config(hard_negatives=7), tokenize).negatives == 1


def test_positives_of_every_row_of_a_query_are_known_to_each_of_them() -> None:
    """Also those whose row is in another batch: another query may bring the same document."""
    rows = [replace(pair, query="Same  one" if i % 2 else "same one") for i, pair in enumerate(pairs(6))]
    every = set(both(*(text for pair in rows for text in pair.positives)))
    others = [replace(pair, query=f"other {i}") for i, pair in enumerate(pairs(6))]
    seen = set()
    for batch in Batches([*rows, *others], config(), tokenize).run():
        for query, positives in zip(batch.texts, batch.positive_ids, strict=False):
            seen.add(query)
            assert len(positives) == (4 if query.startswith("other") else 24)
            assert query.startswith("other") or set(positives.tolist()) == every
    assert {"Same  one", "same one"} <= seen


@pytest.mark.parametrize(
    ("settings", "advice"),
    [({}, "negatives: bm25 finds some"), ({"negatives": "bm25"}, "negatives: bm25 found none")],
)
def test_data_without_negatives_is_said(settings: dict[str, object], advice: str) -> None:
    lacking = Batches(pairs(negatives=0), config(**settings), tokenize)
    assert lacking.note == f"no negatives in the data: in-batch negatives alone; {advice}"
    assert Batches(pairs(negatives=1), config(**settings), tokenize).note == ""
    assert Batches(pairs(negatives=0), config(**settings | {"hard_negatives": 0}), tokenize).note == ""


def test_too_few_pairs_are_an_error() -> None:
    with pytest.raises(InputError, match="3 training pairs are fewer than batch_size 4"):
        Batches(pairs(3), config(), tokenize)
