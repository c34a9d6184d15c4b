"""Whether a difference between two models is more than the choice of queries: paired, query by query."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from effir_ray.config import Config
from effir_ray.errors import InputError

_RESAMPLES = 10_000
_CHUNK = 256  # resamples whose drawn queries are in memory at once


class Interval(Config):
    """A mean over ``n`` queries, its standard error, and its 95 % interval."""

    mean: float
    standard_error: float
    low: float
    high: float
    n: int


def bootstrap_interval(values: npt.ArrayLike, *, seed: int = 0) -> Interval:
    """Percentile bootstrap over queries (Efron and Tibshirani 1993, section 13.3) of the mean of ``values``
    (n,): 10,000 resamples from ``seed``. Of differences of two models on the same queries it is the paired
    bootstrap. Raises InputError without a value.
    """
    given = np.asarray(values, dtype=np.float64)
    if not given.size:
        raise InputError("an interval needs at least one query")
    random, means = np.random.default_rng(seed), np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, _CHUNK):
        drawn = random.integers(given.size, size=(min(_CHUNK, _RESAMPLES - start), given.size))
        means[start : start + len(drawn)] = given[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    error = given.std(ddof=1) / np.sqrt(given.size) if given.size > 1 else 0.0
    return Interval(
        mean=float(given.mean()), standard_error=float(error), low=float(low), high=float(high), n=given.size
    )


def paired_difference(first: Mapping[str, float], second: Mapping[str, float], *, seed: int = 0) -> Interval:
    """``second`` minus ``first`` over the queries of both. Raises InputError where they are not the same."""
    if first.keys() != second.keys():
        odd = len(first.keys() ^ second.keys())
        raise InputError(f"{odd} queries have a score of one model only; compare scores of the same queries")
    return bootstrap_interval([second[query] - first[query] for query in first], seed=seed)


def permutation_p(differences: npt.ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p of the paired randomisation test (Fisher 1935; Smucker, Allan and Carterette 2007 on
    retrieval): how often the mean of ``differences`` (n,), their signs drawn anew 10,000 times, is as far
    from zero. Raises InputError without a value.
    """
    given = np.asarray(differences, dtype=np.float64)
    if not given.size:
        raise InputError("a test needs at least one query")
    # Sums of the same numbers in another order differ in the last bit.
    random, bar, extreme = np.random.default_rng(seed), abs(given.sum()) * (1 - 1e-9), 0
    for start in range(0, _RESAMPLES, _CHUNK):
        signs = 2.0 * random.integers(0, 2, size=(min(_CHUNK, _RESAMPLES - start), given.size)) - 1.0
        extreme += int((np.abs(signs @ given) >= bar).sum())
    return (1 + extreme) / (1 + _RESAMPLES)


def holm(p_values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """``p_values`` (n,) of n tests made together, adjusted (Holm 1979): below 0.05, no more than 5 % of such
    groups of tests find a difference that is not there.
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(given.size, 0, -1)), 1.0)
    return adjusted
