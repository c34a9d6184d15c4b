"""Whether a difference between two models is more than the choice of queries: paired, query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def bootstrap_interval(*groups: npt.ArrayLike, seed: int = 0) -> Interval:
    """Percentile bootstrap over queries (Efron and Tibshirani 1993, section 13.3) of the mean of values (n,):
    10,000 resamples from ``seed``. Of differences of two models on the same queries it is the paired
    bootstrap. Of several ``groups``, the queries of as many data sets, it is the mean of their means, and
    each is resampled by itself. Raises InputError without a value.
    """
    given = _filled(groups)
    random, means = np.random.default_rng(seed), np.zeros(_RESAMPLES)
    for values in given:
        for start in range(0, _RESAMPLES, _CHUNK):
            drawn = random.integers(values.size, size=(min(_CHUNK, _RESAMPLES - start), values.size))
            means[start : start + len(drawn)] += values[drawn].mean(axis=1) / len(given)
    low, high = np.quantile(means, [0.025, 0.975])
    errors = [values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0 for values in given]
    return Interval(
        mean=float(np.mean([values.mean() for values in given])),
        standard_error=float(np.linalg.norm(errors) / len(given)),
        low=float(low),
        high=float(high),
        n=sum(values.size for values in given),
    )


def _filled(groups: Sequence[npt.ArrayLike]) -> list[npt.NDArray[np.float64]]:
    given = [np.asarray(values, dtype=np.float64) for values in groups]
    if not given or not all(values.size for values in given):
        raise InputError("there is nothing to tell without a query")
    return given


def differences(first: Mapping[str, float], second: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """``second`` minus ``first``, query by query. Raises InputError where their queries differ."""
    if first.keys() != second.keys():
        odd = len(first.keys() ^ second.keys())
        raise InputError(f"{odd} queries have a score of one model only; compare scores of the same queries")
    return np.array([second[query] - first[query] for query in first], dtype=np.float64)


def permutation_p(*groups: npt.ArrayLike, seed: int = 0) -> float:
    """Two-sided p of the paired randomisation test (Fisher 1935; Smucker, Allan and Carterette 2007 on
    retrieval): how often the mean of differences (n,), their signs drawn anew 10,000 times, is as far from
    zero. Of several ``groups``, the queries of as many data sets, it is the mean of their means. Raises
    InputError without a value.
    """
    parts = _filled(groups)
    queries = sum(values.size for values in parts)
    given = np.concatenate([values * (queries / (len(parts) * values.size)) for values in parts])
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
