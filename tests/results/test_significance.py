"""Intervals cover what they say, and pairs are pairs."""

import numpy as np
import pytest
from scipy import stats

from effir_ray.errors import InputError
from effir_ray.results.significance import bootstrap_interval, differences, holm, permutation_p


def test_an_interval_is_scipys() -> None:
    values = np.random.default_rng(3).beta(0.5, 0.7, size=200)
    found = bootstrap_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    expected = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)
    assert found.standard_error == pytest.approx(theirs.standard_error, rel=0.05)
    assert (found.n, found.mean) == (200, pytest.approx(values.mean()))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Scores such as nDCG has: many zeros, many ones. 95 % of 300 intervals, give or take 3 deviations."""
    random, truth, covered = np.random.default_rng(0), 0.5, 0
    for seed in range(300):
        scores = random.choice([0.0, 0.0, 0.5, 1.0, 1.0], size=120)
        interval = bootstrap_interval(scores, seed=seed)
        covered += interval.low <= truth <= interval.high
    assert abs(covered / 300 - 0.95) < 3 * (0.95 * 0.05 / 300) ** 0.5


def test_a_difference_is_paired() -> None:
    """Queries differ far more from each other than the two models do on any of them."""
    hard = np.random.default_rng(1).random(100)
    first = {f"q{i}": float(value) for i, value in enumerate(hard)}
    second = {query: value + 0.01 for query, value in reversed(first.items())}
    found = bootstrap_interval(differences(first, second))
    assert found.low == pytest.approx(0.01) and found.high == pytest.approx(0.01)
    assert bootstrap_interval(list(first.values())).high - hard.mean() > 0.03


def test_data_sets_count_alike_however_many_queries_they_have() -> None:
    """Of the mean of their means, against a bootstrap that draws each by itself."""
    random = np.random.default_rng(5)
    small, large = random.beta(0.5, 0.7, size=25), random.beta(2.0, 0.7, size=900)
    found = bootstrap_interval(small, large)
    assert (found.n, found.mean) == (925, pytest.approx((small.mean() + large.mean()) / 2))

    def means(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return (one.mean(axis=axis) + other.mean(axis=axis)) / 2

    theirs = stats.bootstrap((small, large), means, method="percentile", n_resamples=10_000, rng=1)
    expected = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert found.standard_error == pytest.approx(theirs.standard_error, rel=0.05)

    # The small set is better, the many queries of the large one a little worse: together surely better.
    better, worse = random.normal(0.2, 0.05, size=25), random.normal(-0.02, 0.05, size=900)
    assert permutation_p(better, worse) < 0.001 and np.concatenate([better, worse]).mean() < 0
    assert permutation_p(random.normal(0, 1, size=25), random.normal(0, 1, size=900)) > 0.05


def test_other_queries_and_none_are_refused() -> None:
    with pytest.raises(InputError, match="2 queries have a score of one model only"):
        differences({"a": 1.0}, {"b": 1.0})
    with pytest.raises(InputError, match="without a query"):
        bootstrap_interval([])


def test_tests_find_a_difference_that_is_not_there_as_seldom_as_they_say() -> None:
    """240 comparisons of models that differ by chance alone, the differences skewed and full of zeros as
    those of nDCG@10 are; Holm's five at a time find one in no more than about 5 % of the fives."""
    random = np.random.default_rng(3)
    p_values = []
    for seed in range(240):
        first, second = (random.beta(0.4, 0.3, 60) * (random.random(60) < 0.6) for _ in range(2))
        p_values.append(permutation_p(second - first, seed=seed))
    # Binomial: 240 tests of level 0.05 lie in this range in 99 of 100 simulations.
    assert 0.016 <= np.mean(np.array(p_values) < 0.05) <= 0.092
    fives = np.array(p_values).reshape(-1, 5)
    assert np.mean([holm(five).min() < 0.05 for five in fives]) <= 0.15
