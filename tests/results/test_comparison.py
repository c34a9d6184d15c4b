"""Models compared query by query."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from effir_ray.errors import InputError
from effir_ray.results import query_scores, significance, store
from effir_ray.results.comparison import compare
from effir_ray.results.schema import mean_of
from effir_ray.results.selection import pareto
from effir_ray.results.significance import holm, permutation_p
from tests.helpers.search_examples import row, small_space

SPACE = small_space()
HARD = np.random.default_rng(0).beta(0.6, 0.6, size=200)
"""What the full model scores on 200 queries."""


def keep(folder: Path, trial_id: str, by_query: np.ndarray, *, split: str = "test", **values: object) -> None:
    scores = {
        f"q{i}": {**dict.fromkeys(query_scores.METRICS.values(), 0.0), "ndcg@10": float(score)}
        for i, score in enumerate(by_query)
    }
    made = row(SPACE.trial(SPACE.listed()[0]), float(by_query.mean()), split=split)
    made = made.model_copy(update={"trial_id": trial_id, "document_speedup": 1.0, **values})
    query_scores.append(folder, made, scores)
    store.append(folder, [made])


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """``b2`` differs from the full model by chance alone, ``c3`` is worse on most queries."""
    chance = np.random.default_rng(1).normal(0, 0.05, size=200)
    keep(tmp_path, "a1", HARD, schedule="full", parameters=100)
    keep(tmp_path, "b2", np.clip(HARD + chance, 0, 1), schedule="2B", parameters=60)
    keep(tmp_path, "c3", HARD * 0.9, schedule="4B", parameters=30)
    return tmp_path


def test_of_several_seeds_each_model_is_compared_with_the_full_one_of_its_seed(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.2)):
        keep(tmp_path, f"a{seed}", HARD * 0.5 + shift, schedule="full", parameters=100, seed=seed)
        keep(tmp_path, f"b{seed}", HARD * 0.5 + shift - 0.1, schedule="2B", parameters=60, seed=seed)
    found = compare(tmp_path).to_pylist()
    assert [(record["trial_id"], record["seed"]) for record in found] == [
        ("a0", 0),
        ("b0", 0),
        ("a1", 1),
        ("b1", 1),
    ]
    assert [record["difference"] for record in found] == [
        None,
        pytest.approx(-0.1),
        None,
        pytest.approx(-0.1),
    ]


def test_of_means_over_data_sets_the_difference_is_the_mean_of_those_on_each(tmp_path: Path) -> None:
    """However many queries each has: better on the few of one, a little worse on the many of the other."""
    few, many = HARD[:20] * 0.5, HARD * 0.5
    for trial, better, worse, size in (("a1", 0.0, 0.0, 100), ("b2", 0.1, 0.02, 60)):
        schedule = {"schedule": "full" if trial == "a1" else "2B", "parameters": size}
        parts = {"x": few + better, "y": many - worse}
        for name, scores in parts.items():
            keep(tmp_path, trial, scores, dataset=name, **schedule)
        mean = float(np.mean([scores.mean() for scores in parts.values()]))
        (made,) = store.trial_rows(store.read([tmp_path]))[-1:]
        store.append(tmp_path, [made.model_copy(update={"dataset": mean_of("xy"), "ndcg_at_10": mean})])
    found = by_trial(tmp_path)["b2"]
    assert found["queries"] == 220 and found["dataset"] == "mean of x, y"
    assert found["difference"] == pytest.approx((0.1 - 0.02) / 2)
    assert found["difference_low"] == pytest.approx(0.04) and found["p"] < 0.001
    assert found["score"] == pytest.approx(np.mean([(few + 0.1).mean(), (many - 0.02).mean()]))
    front = pareto(tmp_path, split="test")
    assert front["trial_id"].to_pylist() == ["b2"]


def by_trial(folder: Path, *arguments: object, **options: object) -> Mapping[str, Mapping[str, object]]:
    return {record["trial_id"]: record for record in compare(folder, *arguments, **options).to_pylist()}  # type: ignore[arg-type]


def test_everything_is_compared_with_the_full_model(study: Path) -> None:
    found = by_trial(study)
    assert list(found) == ["a1", *sorted(["b2", "c3"], key=lambda trial: -found[trial]["score"])]
    assert found["a1"]["difference"] is None and found["a1"]["p"] is None
    assert found["b2"]["p_holm"] > 0.05 and found["c3"]["p_holm"] < 0.01
    assert found["b2"]["difference_low"] < 0 < found["b2"]["difference_high"]
    assert found["c3"]["difference_high"] < 0
    assert found["c3"]["difference"] == pytest.approx(-0.1 * HARD.mean())
    assert {record["queries"] for record in found.values()} == {200}
    assert {record["split"] for record in found.values()} == {"test"}


def test_of_two_backbones_each_model_is_compared_with_its_own_full_one(study: Path) -> None:
    alone = by_trial(study)
    keep(study, "x1", HARD * 0.5, schedule="full", parameters=50, backbone="random:bert")
    keep(study, "x2", HARD * 0.6, schedule="1B", parameters=40, backbone="random:bert")
    found = by_trial(study)
    assert list(found) == [*alone, "x1", "x2"]
    assert found["x2"]["difference"] == pytest.approx(0.1 * HARD.mean())
    assert found["c3"]["difference"] == alone["c3"]["difference"]
    assert found["c3"]["p_holm"] >= alone["c3"]["p_holm"]  # one more difference in the table


def test_the_first_trial_named_is_the_baseline(study: Path) -> None:
    found = by_trial(study, ["c", "b2"])
    assert list(found) == ["c3", "b2"]
    assert found["b2"]["difference"] > 0


def test_a_front_says_what_is_no_better_than_something_smaller(study: Path) -> None:
    front = {record["trial_id"]: record for record in pareto(study).to_pylist()}
    assert front["a1"]["ndcg_at_10"] > front["b2"]["ndcg_at_10"]
    assert {trial: record["not_better_than"] for trial, record in front.items()} == {
        "a1": "b2",
        "b2": None,
        "c3": None,
    }


def test_other_splits_and_metrics_can_be_asked_for(study: Path) -> None:
    keep(study, "a1", HARD, split="dev", schedule="full", parameters=100)
    keep(study, "c3", HARD, split="dev", schedule="4B", parameters=30)
    found = by_trial(study, split="dev", metric="map_at_100")
    assert list(found) == ["a1", "c3"]
    assert (found["c3"]["difference"], found["c3"]["p"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (["a1"], {}, "two different trials"),
        (["a1", "zz"], {}, "--trial zz: there is no such trial; effir-ray pareto"),
        (["", "c3"], {}, "it fits 3; give more digits"),
        ([], {"metric": "bleu"}, "--metric bleu: expected one of ndcg_at_10, "),
        ([], {"split": "dev"}, "no rows of split 'dev'"),
    ],
)
def test_what_cannot_be_compared_is_named(study: Path, arguments: list, options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare(study, arguments, **options)


def test_rows_without_scores_of_single_queries_are_named(study: Path) -> None:
    for file in (study / "query_scores").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"single queries on split test are missing \(a1, b2, c3\)"):
        compare(study)
    assert pareto(study)["not_better_than"].to_pylist() == [None] * len(pareto(study))


def test_without_one_full_model_a_baseline_must_be_named(study: Path) -> None:
    keep(study, "d4", HARD, schedule="full", parameters=100, study="other")
    with pytest.raises(
        InputError, match="2 of these rows are the full model of random:llama: name the baseline"
    ):
        compare(study)


def test_a_permutation_is_scipys() -> None:
    differences = np.random.default_rng(5).normal(0.02, 0.1, size=80)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=20_000, rng=1
    )
    assert permutation_p(differences) == pytest.approx(theirs.pvalue, abs=0.012)


def test_the_test_finds_no_more_than_its_level_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 pairs of equal models, 5 % give or take three deviations; and nearly all real differences."""
    monkeypatch.setattr(significance, "_RESAMPLES", 1000)
    random = np.random.default_rng(2)
    equal = [permutation_p(random.normal(0, 0.1, size=60), seed=seed) for seed in range(400)]
    assert abs(np.mean(np.array(equal) <= 0.05) - 0.05) < 3 * (0.05 * 0.95 / 400) ** 0.5
    real = [permutation_p(random.normal(0.06, 0.1, size=60), seed=seed) for seed in range(50)]
    assert np.mean(np.array(real) <= 0.05) > 0.95


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0
