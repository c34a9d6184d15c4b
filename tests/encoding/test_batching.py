"""The one batcher: complete, within its budget, deterministic."""

from __future__ import annotations

import pytest

from effir_ray.encoding.batching import token_budget_batches

LENGTHS = [5, 100, 7, 7, 30, 1, 64, 64, 64]


def cost(batch: list[int], padded: bool) -> int:
    lengths = [LENGTHS[index] for index in batch]
    return max(lengths) * len(lengths) if padded else sum(lengths)


@pytest.mark.parametrize("worthwhile", [None, 32])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [1, 64, 128, 10_000])
def test_batches_hold_every_text_once_within_the_budget(
    budget: int, padded: bool, worthwhile: int | None
) -> None:
    batches = token_budget_batches(LENGTHS, budget, padded=padded, worthwhile=worthwhile)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) == 1 or cost(batch, padded) <= budget for batch in batches)
    order = [index for batch in batches for index in batch]
    assert order == [1, 6, 7, 8, 4, 2, 3, 0, 5]  # longest first, of equals the earlier one
    if not padded and budget > 1:
        assert len(batches) < len(LENGTHS)


def test_a_batch_that_is_worth_its_pass_takes_little_padding() -> None:
    batches = token_budget_batches(LENGTHS, 128, worthwhile=32)
    assert batches == [[1], [6, 7], [8], [4], [2, 3, 0, 5]]
    assert sum(cost(batch, True) for batch in batches) <= sum(LENGTHS) / 0.75 + 32
    assert token_budget_batches([10, 9, 8, 7, 1], 1000, worthwhile=20) == [[0, 1, 2], [3, 4]]


def test_nothing_to_batch() -> None:
    assert token_budget_batches([], 8) == []
