"""Which texts are encoded together: as many tokens as fit a budget, texts of similar length side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def token_budget_batches(
    lengths: Sequence[int], budget: int, *, padded: bool = True
) -> list[npt.NDArray[np.int64]]:
    """Indices of ``lengths`` in batches, longest first (what does not fit memory shows up early).

    A batch costs its longest text times its size when ``padded``, else the sum of its lengths, and stays
    within ``budget`` tokens unless one text alone is longer. The batches depend on the arguments alone.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start, tokens = [], 0, 0
    for place, index in enumerate(order):
        longest, size = lengths[order[start]], place - start
        cost = longest * (size + 1) if padded else tokens + lengths[index]
        if size and cost > budget:
            batches.append(order[start:place])
            start, tokens = place, 0
        tokens += lengths[index]
    return [*batches, order[start:]] if len(order) else []
