"""From rows to a front, and from a front to one model."""

import json
from pathlib import Path

import pytest

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.query import query
from effir_ray.results.report import report
from effir_ray.results.schema import TrialRow, mean_of
from effir_ray.results.selection import FAILED, TEST_COLUMN, pareto


def row(name: str, score: float | None, size: int, **changes: object) -> TrialRow:
    values = {
        "study": "s",
        "trial": "{}",
        "backbone": "random:llama",
        "dataset": "stdlib",
        "split": "dev",
        "trial_id": name,
        "schedule": name,
        "ndcg_at_10": score,
        "parameters": size,
    }
    return TrialRow.model_validate(values | changes)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rows = [
        row("full", 0.60, 100),
        row("small", 0.55, 60),
        row("tiny", 0.20, 40),
        row("bad", 0.30, 90),
        row("broken", None, 10, status="failed", reason="NaN"),
        row("small", 0.52, 60, split="test"),
        row("bad", 0.99, 90, split="test"),
    ]
    store.append(tmp_path, rows)
    return tmp_path


def names(folder: Path, **options: object) -> list[str]:
    found: list[str] = pareto([folder], **options)["schedule"].to_pylist()  # type: ignore[arg-type]  # kwargs
    return found


def test_the_front_is_chosen_on_dev_and_carries_test_scores(study: Path) -> None:
    front = pareto([study])
    assert front["schedule"].to_pylist() == ["full", "small", "tiny"]
    assert front[TEST_COLUMN].to_pylist() == [None, 0.52, None]
    assert front.schema.metadata[FAILED] == b"1"


@pytest.mark.parametrize(
    ("pick", "name"),
    [
        ("knee", "small"),
        ("ndcg_at_10>=0.5", "small"),
        ("ndcg_at_10 >= 0.56", "full"),
        ("parameters<=6e1", "small"),
        ("parameters<60", "tiny"),
        ("ndcg_at_10>=0.1,parameters<=60", "small"),
    ],
)
def test_pick_leaves_the_row_that_was_asked_for(study: Path, pick: str, name: str) -> None:
    assert names(study, pick=pick) == [name]


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("ndcg_at_10>=0.9", "no row of the front"),
        ("best", "cannot read 'best'"),
        ("ndcg_at_10>=.e", "cannot read"),
        ("speed>1", "'speed' is not measured"),
        ("schedule>1", "'schedule' is not measured"),
    ],
)
def test_a_pick_that_fits_nothing_says_so(study: Path, pick: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pareto([study], pick=pick)


def test_objectives_and_split_can_be_chosen(study: Path) -> None:
    assert names(study, objectives=["parameters"]) == ["tiny"]
    assert names(study, split="test") == ["bad", "small"]
    with pytest.raises(InputError, match="no rows of split 'train'; there are dev, test"):
        pareto([study], split="train")


def test_data_sets_are_not_mixed(study: Path) -> None:
    store.append(study, [row("other", 0.9, 50, dataset="scifact")])
    with pytest.raises(InputError, match=r"2 data sets"):
        pareto([study])
    assert names(study, where="dataset = 'scifact'") == ["other"]


def test_a_study_over_several_data_sets_is_judged_by_its_means(tmp_path: Path) -> None:
    """The best on one of them is not; what each scored stands beside the mean."""
    scores = {"a": (0.9, 0.1), "b": (0.6, 0.7), "c": (0.2, 0.2)}
    sizes = {"a": 50, "b": 60, "c": 70}
    for split in ("dev", "test"):
        for name, pair in scores.items():
            parts = [
                row(name, score, sizes[name], dataset=d, split=split)
                for d, score in zip("xy", pair, strict=True)
            ]
            mean = row(name, sum(pair) / 2, sizes[name], dataset=mean_of("xy"), split=split)
            store.append(tmp_path, [mean, *parts])
    front = pareto(tmp_path)
    assert front["schedule"].to_pylist() == ["b", "a"]
    assert front["ndcg_at_10"].to_pylist() == pytest.approx([0.65, 0.5])
    assert front[TEST_COLUMN].to_pylist() == pytest.approx([0.65, 0.5])
    assert [json.loads(each) for each in front["datasets"].to_pylist()] == [
        {"x": 0.6, "y": 0.7},
        {"x": 0.9, "y": 0.1},
    ]
    assert names(tmp_path, where="dataset = 'x'") == ["a"]
    assert pareto(tmp_path, where="dataset = 'x'")[TEST_COLUMN].to_pylist() == [0.9]
    assert names(tmp_path, mean_datasets=True) == ["b", "a"]
    for other in ("x", "z"):  # a trial on one of them alone is no part of that mean
        store.append(tmp_path / other, [row("d", 0.9, 50, dataset=other)])
        with pytest.raises(InputError, match=rf"2 data sets \(mean of x, y, {other}\)"):
            pareto([tmp_path, tmp_path / other])


def test_without_a_successful_trial_there_is_no_front(study: Path) -> None:
    with pytest.raises(InputError, match="no successful trial among the 1 rows"):
        pareto([study], where="status = 'failed'")


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"study": "t"}, "study = 's'"),
        ({"seed": 1}, "seed = 0"),
        ({}, "the folder of one study"),
    ],
)
def test_samples_of_a_data_set_are_not_mixed(tmp_path: Path, changes: dict[str, object], fix: str) -> None:
    """The same number on fewer documents is another number."""
    trials = [json.dumps({"dev": {"queries": 8, "documents": count}, "seed": 0}) for count in (24, 50)]
    rows = [row("a", 0.5, 10, trial=trials[0]), row("b", 0.6, 10, trial=trials[1], **changes)]
    store.append(tmp_path, rows)
    samples = "8 queries, 24 documents, seed 0; 8 queries, 50 documents, seed 0"
    with pytest.raises(InputError, match=f"2 samples of stdlib \\({samples}\\)") as refused:
        pareto([tmp_path])
    assert fix in str(refused.value)
    if changes:
        assert names(tmp_path, where=fix) == ["a"]
    assert names(tmp_path, where="trial LIKE '%: 50%'") == ["b"]


def test_versions_of_a_data_set_are_not_mixed(tmp_path: Path) -> None:
    for study, version in (("a", "1"), ("b", "1"), ("c", "2")):
        contents = json.dumps({"backbone": study, "dataset": version})
        store.append(tmp_path / study, [row("full", 0.6, 100, study=study, contents=contents)])
    assert len(pareto([tmp_path / "a", tmp_path / "b"])) == 2
    with pytest.raises(InputError, match="2 versions of stdlib, which changed in between"):
        pareto([tmp_path / "a", tmp_path / "c"])


def test_another_seed_draws_another_sample_but_only_of_samples(tmp_path: Path) -> None:
    def trial(seed: int, queries: int | None) -> str:
        return json.dumps({"dev": {"queries": queries, "documents": queries}, "seed": seed})

    for queries in (None, 8):
        rows = [row(f"{seed}", 0.5, 10, trial=trial(seed, queries), seed=seed) for seed in (0, 1)]
        store.append(tmp_path / str(queries), rows)
    assert names(tmp_path / "None") == ["0", "1"]
    with pytest.raises(InputError, match="seed = 0"):
        pareto([tmp_path / "8"])


def test_one_folder_need_not_be_a_list(study: Path, tmp_path: Path) -> None:
    """A string is a path, not a list of letters."""
    for place in (study, str(study)):
        assert pareto(place).equals(pareto([study]))
        assert query(place, "SELECT count(*) AS n FROM trials")["n"].to_pylist() == [7]
        assert report(place, tmp_path / "report.html").is_file()


def seeded(name: str, seed: int, score: float, size: int, **changes: object) -> TrialRow:
    trial = json.dumps({"seed": seed, "recovery": {"seed": seed, "steps": 3}, "n": name, "dataset": "stdlib"})
    values = {"schedule": name, "seed": seed, "trial": trial} | changes
    return row(f"{name}-{seed}-{values.get('dataset', '')}", score, size, **values)


def test_the_best_of_three_seeds_does_not_stand_for_the_mean(tmp_path: Path) -> None:
    """The best seed of ``lucky`` beats ``steady``, its mean does not; means are shown and picked."""
    rows = [seeded("steady", seed, 0.5, 60) for seed in range(3)]
    rows += [seeded("lucky", seed, score, 60) for seed, score in enumerate((0.6, 0.3, 0.42))]
    rows += [seeded("small", 0, 0.2, 20)]
    rows += [seeded("steady", seed, 0.4 + seed / 10, 60, split="test") for seed in range(3)]
    store.append(tmp_path, rows)
    front = pareto([tmp_path])
    assert front["schedule"].to_pylist() == ["steady", "small"]
    assert front["seeds"].to_pylist() == [3, 1]
    assert front["ndcg_at_10"].to_pylist() == pytest.approx([0.5, 0.2])
    assert front["ndcg_at_10_sd"].to_pylist() == [pytest.approx(0), None]
    assert front[TEST_COLUMN].to_pylist() == [pytest.approx(0.5), None]
    every = pareto([tmp_path], where="schedule = 'lucky'")
    assert every["trial_id"].to_pylist() == ["lucky-2-"]  # the one in the middle
    assert every["ndcg_at_10"].to_pylist() == pytest.approx([0.44])
    assert every["ndcg_at_10_sd"].to_pylist() == pytest.approx([0.151], abs=1e-3)
    assert every["created_at"].to_pylist()[0] is not None


def test_other_settings_are_no_other_seed(tmp_path: Path) -> None:
    longer = seeded("2M", 1, 0.6, 60)
    longer = longer.model_copy(update={"trial": longer.trial.replace('"steps": 3', '"steps": 9')})
    store.append(tmp_path, [seeded("2M", 0, 0.5, 60), longer])
    assert pareto([tmp_path])["seeds"].to_pylist() == [1]


def test_means_over_data_sets_are_of_what_was_measured_on_all(tmp_path: Path) -> None:
    rows = []
    for dataset, scores in {"a": (0.5, 0.45, 0.9), "b": (0.3, 0.40, None)}.items():
        for name, score, size in zip(("full", "small", "partial"), scores, (100, 60, 10), strict=True):
            if score is not None:
                trial = json.dumps({"dataset": dataset, "n": name, "recovery": {"held_out": dataset}})
                rows.append(
                    row(f"{name}-{dataset}", score, size, schedule=name, dataset=dataset, trial=trial)
                )
    store.append(tmp_path, rows)
    with pytest.raises(InputError, match=r"2 data sets .*--mean-datasets"):
        pareto([tmp_path])
    front = pareto([tmp_path], mean_datasets=True)
    assert front["schedule"].to_pylist() == ["small"]
    assert front["ndcg_at_10"].to_pylist() == pytest.approx([0.425])
    assert json.loads(front["datasets"][0].as_py()) == {"a": 0.45, "b": 0.4}


def test_means_carry_no_interval_of_one_of_their_members(tmp_path: Path) -> None:
    speeds = {"document_speedup": 1.0, "document_speedup_low": 0.98, "document_speedup_high": 1.02}
    faster = {"document_speedup": 2.0, "document_speedup_low": 1.98, "document_speedup_high": 2.02}
    store.append(tmp_path, [seeded("2M", 0, 0.5, 60, **speeds), seeded("2M", 1, 0.5, 60, **faster)])
    (found,) = pareto([tmp_path]).to_pylist()
    assert found["document_speedup"] == 1.5
    assert found["document_speedup_low"] is found["document_speedup_high"] is None


def test_nothing_measured_on_all_data_sets_is_said(tmp_path: Path) -> None:
    store.append(tmp_path, [row("1M", 0.5, 60, dataset="a"), row("2M", 0.5, 60, dataset="b")])
    with pytest.raises(InputError, match="no configuration was measured on all of a, b"):
        pareto([tmp_path], mean_datasets=True, objectives=["ndcg_at_10", "parameters"])


def test_a_condition_on_dev_scores_hides_no_test_score(tmp_path: Path) -> None:
    store.append(tmp_path, [row("1M", 0.46, 60), row("1M", 0.44, 60, split="test")])
    front = pareto([tmp_path], where="ndcg_at_10 >= 0.45")
    assert front[TEST_COLUMN].to_pylist() == [0.44]


def test_a_front_is_the_same_with_and_without_a_condition_that_all_meet(tmp_path: Path) -> None:
    """The one reads few columns, the other all."""
    bounds = {"ndcg_at_10_low": 0.4, "ndcg_at_10_high": 0.7}
    rows = [
        row(f"{number}M", 0.6 - number / 50, 100 - number, document_speedup=1 + number / 5, **bounds)
        for number in range(4)
    ]
    store.append(tmp_path, rows)
    assert names(tmp_path) == names(tmp_path, where="parameters < 1000") == ["0M", "1M", "2M", "3M"]
