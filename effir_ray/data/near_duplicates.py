"""Finding near-duplicate texts by MinHash and locality-sensitive hashing."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_SHINGLE_WORDS = 3
_HASHES, _BANDS = 128, 32  # 4 rows a band: pairs at Jaccard 0.7 meet in some band with probability 0.9999
_PRIME = (1 << 31) - 1


def near_duplicates(texts: Sequence[str], *, threshold: float = 0.7) -> list[bool]:
    """True for every text that is nearly an earlier one: Jaccard of word 3-shingles at ``threshold`` or more.

    Candidates come from MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive
    Datasets, section 3.4); the similarity itself is exact. Deterministic: no use of Python's salted ``hash``.
    """
    random = np.random.RandomState(0)  # its stream is frozen across numpy versions
    a = random.randint(1, _PRIME, size=_HASHES).astype(np.uint64)  # (hashes,)
    b = random.randint(0, _PRIME, size=_HASHES).astype(np.uint64)
    shingles = [_shingles(text) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    duplicate = []
    for index, own in enumerate(shingles):
        values = np.fromiter(own, dtype=np.uint64, count=len(own))  # (shingles,)
        signature = ((values[:, None] * a + b) % _PRIME).min(axis=0)  # (hashes,)
        keys = [(band, rows.tobytes()) for band, rows in enumerate(signature.reshape(_BANDS, -1))]
        candidates = {earlier for key in keys for earlier in buckets[key]}
        duplicate.append(any(_jaccard(own, shingles[earlier]) >= threshold for earlier in candidates))
        if not duplicate[-1]:
            for key in keys:
                buckets[key].append(index)
    return duplicate


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower())
    windows = range(max(1, len(words) - _SHINGLE_WORDS + 1))
    return frozenset(zlib.crc32(" ".join(words[i : i + _SHINGLE_WORDS]).encode()) % _PRIME for i in windows)


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)
