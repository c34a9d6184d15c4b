"""Which texts are computed together: as many tokens as fit a budget, texts of similar length side by side."""

from __future__ import annotations

from collections.abc import Sequence


def token_budget_batches(
    lengths: Sequence[int], budget: int, *, padded: bool = True, worthwhile: int | None = None
) -> list[list[int]]:
    """Indices of ``lengths`` in batches, longest first (what does not fit memory shows up early), of equal
    lengths the earlier index first.

    A batch costs its longest text times its size when ``padded``, else the sum of its lengths, and stays
    within ``budget`` tokens unless one text alone is longer. A padded batch that is ``worthwhile`` tokens
    large takes no text that would be more than a quarter padding. The batches depend on the arguments alone.
    """
    batches: list[list[int]] = []
    longest = tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches:
            cost = longest * (len(batches[-1]) + 1) if padded else tokens + lengths[index]
            enough = padded and worthwhile is not None and cost > worthwhile
            if cost <= budget and not (enough and lengths[index] < 0.75 * longest):
                batches[-1].append(index)
                tokens += lengths[index]
                continue
        batches.append([index])
        longest = tokens = lengths[index]
    return batches
