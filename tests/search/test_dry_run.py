"""Previews and recipes: what would run, what is shared, how large everything comes out."""

from pathlib import Path

import pytest

from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Schedule
from effir_ray.config import load_yaml
from effir_ray.errors import InputError
from effir_ray.results.published import published
from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import dry_run, named_sources
from effir_ray.search.space import SearchSpace
from effir_ray.search.trial_stages import trial_stages
from tests.helpers.search_examples import small_space

SPACES = Path(__file__).parents[2] / "search_spaces"
TRAINING = {"steps": 2, "batch_size": 4, "lora": None}


def stages(space: SearchSpace, split: str = "dev", **schedule: object) -> dict[str, str]:
    """Stage name -> key."""
    config = space.trial(Candidate(**schedule))
    return {stage.name: stage.key for stage in trial_stages(config, named_sources(config), split)}


def test_the_papers_grid_has_the_papers_sizes() -> None:
    preview = dry_run(load_yaml(SPACES / "mistral-7b.yaml", SearchSpace))
    ratio = {trial.schedule: trial.parameter_ratio for trial in preview.trials}
    assert ratio["16M-w30+ft"] == pytest.approx(0.48, abs=0.01)
    assert ratio["full"] == 1.0
    assert preview.stages["importance"] == 1
    assert preview.stages["neurons"] == 2  # one for every depth: 16M and 16M8A


PAPER = {
    "e5-mistral-7b": "E5-Mistral-7B",
    "llama-2-7b": "Llama-2-7B",
    "llama-3-8b": "Llama-3-8B",
    "mistral-7b": "Mistral-7B-v0.1",
    "modernbert-base": "ModernBERT-base",
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen2.5-3B",
    "qwen2.5-7b": "Qwen2.5-7B",
}


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_every_model_that_the_paper_has_of_its_backbone(name: str) -> None:
    space = load_yaml(SPACES / f"{name}.yaml", SearchSpace)
    asked = {
        row["schedule"]
        for row in published().to_pylist()
        if row["backbone"] == PAPER[name] and row["schedule"] is not None
    }
    assert len(asked) >= 3
    listed = {candidate.schedule().name for candidate in space.listed()}
    assert asked <= listed
    trained = {candidate.schedule().name for candidate in space.listed() if candidate.recover}
    assert trained == set() if name == "e5-mistral-7b" else asked <= trained


def test_combinations_that_cannot_meet_the_constraints_are_left_out() -> None:
    grid = {"sampler": "grid", "parameters": {"drop_mlp": [1, 2, 3], "width_reduction": [0.0, 0.5]}}
    everything = dry_run(small_space(**grid, schedules=[{"drop_attention": 1}]))
    assert everything.excluded == 0
    sizes = {trial.schedule: trial.parameters for trial in everything.trials}
    bound = sizes["2M"]
    preview = dry_run(
        small_space(**grid, schedules=[{"drop_attention": 1}], constraints=[f"parameters <= {bound}"])
    )
    small = {name for name, size in sizes.items() if size <= bound}
    assert {trial.schedule for trial in preview.trials} == small | {"full", "1A"}
    assert preview.excluded == len(sizes) - len(preview.trials) > 0


def test_what_has_to_be_measured_excludes_nothing_before_it_is() -> None:
    grid = {"sampler": "grid", "parameters": {"drop_mlp": [1, 2]}}
    assert dry_run(small_space(**grid, constraints=["document_speedup >= 100"])).excluded == 0


def test_trials_share_every_stage_they_have_in_common() -> None:
    space = small_space(
        base_training=TRAINING,
        recovery=TRAINING,
        schedules=[
            {"drop_mlp": 1},
            {"drop_mlp": 1, "width_reduction": 0.25},
            {"drop_mlp": 1, "width_reduction": 0.5},
            {"drop_mlp": 1, "width_reduction": 0.5, "recover": True},
        ],
    )
    preview = dry_run(space)
    assert preview.stages == {
        "backbone": 1,
        "base": 1,
        "embeddings": 5,
        "scores": 5,
        "timing": 4,
        "importance": 1,
        "pruned": 3,
        "neurons": 1,
        "recovered": 1,
        "bm25": 1,
    }
    assert preview.trials[-1].new_stages == ("recovered", "embeddings", "scores")  # speed: as untrained


def test_a_test_score_only_adds_the_test_split() -> None:
    space = small_space()
    dev, test = stages(space, "dev", drop_mlp=1), stages(space, "test", drop_mlp=1)
    assert {name for name in dev if dev[name] != test[name]} == {"embeddings", "scores", "bm25"}


def test_whatever_changes_a_result_changes_its_stage() -> None:
    before = stages(small_space(), drop_mlp=1, width_reduction=0.5)
    changed = stages(small_space(calibration_texts=9), drop_mlp=1, width_reduction=0.5)
    assert changed["backbone"] == before["backbone"]
    assert all(
        changed[name] != before[name] for name in ("importance", "neurons", "pruned", "scores", "timing")
    )


@pytest.mark.parametrize(
    "schedule",
    [
        {"drop_mlp": 5},
        {"drop_attention": [4]},
        {"drop_last_blocks": 3, "drop_block": 2},
        {"drop_mlp": 4, "width_reduction": 0.5},
        {"layer_widths": [64, 64]},
        {"layer_widths": [64, 64, 64, 60]},
        {"drop_mlp": 1, "layer_widths": [64, 64, 64, 0]},
    ],
)
def test_schedules_that_cannot_be_built_are_named(schedule: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"schedule .* of random:llama: "):
        dry_run(small_space(schedules=[schedule]))


def test_widths_of_layers_are_counted_and_constrained_before_anything_runs() -> None:
    schedules = [
        {"layer_widths": "128,64,8,32", "width_method": method} for method in ("magnitude", "random")
    ]
    preview = dry_run(small_space(schedules=[*schedules, {"width_reduction": 0.5, "width_method": "random"}]))
    full, first, second, even = preview.trials
    assert (first.schedule, second.schedule) == ("w[128,64,8,32]",) * 2
    assert full.parameters - first.parameters == 3 * 64 * (512 - 128 - 64 - 8 - 32)
    assert first.parameters == second.parameters < even.parameters
    assert first.flops_per_document < even.flops_per_document
    assert "neurons" in second.shared_stages + second.new_stages
    grid = {"sampler": "grid", "parameters": {"layer_widths": [[], [128, 64, 8, 32], [128, 128, 128, 8]]}}
    bound = f"parameters <= {first.parameters}"
    kept = dry_run(small_space(**grid, constraints=[bound]))
    assert [trial.schedule for trial in kept.trials] == ["full", "w[128,64,8,32]"] and kept.excluded == 1


def test_widths_of_layers_change_the_pruned_model_alone() -> None:
    """Neurons are ranked once for all widths; schedules without widths keep their stages."""
    space = small_space()
    share = stages(space, width_reduction=0.5)
    first, second = (stages(space, layer_widths=each) for each in ("128,64,8,32", "128,64,32,8"))
    assert first["neurons"] == second["neurons"] == share["neurons"]
    assert len({first["pruned"], second["pruned"], share["pruned"]}) == 3
    assert share["pruned"].endswith("a2d3f336e72226c7")


def test_what_a_compressed_backbone_lost_already_is_not_lost_again(tmp_path: Path) -> None:
    """Sizes of schedules on a checkpoint are those that its own plan leaves."""
    small = str(tmp_path / "small")
    done = compress("random:llama", Schedule(drop_mlp=(1,), drop_attention=(2,)), tmp_path / "small")
    schedules = [{"drop_mlp": [1]}, {"drop_mlp": 1}, {"drop_mlp": [3]}, {"width_reduction": 0.5}]
    preview = dry_run(small_space(backbone=small, schedules=schedules))
    sizes = {trial.schedule: trial.parameters for trial in preview.trials}
    assert sizes["full"] == sizes["M[1]"] == sizes["1M"] == done.parameters < done.full_parameters
    for schedule, name in ((Schedule(drop_mlp=(3,)), "M[3]"), (Schedule(width_reduction=0.5), "w50")):
        assert sizes[name] == compress(small, schedule, None).parameters < done.parameters


def test_a_narrowed_backbone_has_no_single_width(tmp_path: Path) -> None:
    small = tmp_path / "small"
    schedule = Schedule(width_reduction=0.5, width_method="magnitude", width_multiple=8)
    done = compress("random:llama", schedule, small)
    assert dry_run(small_space(backbone=str(small))).trials[0].parameters == done.parameters


def test_the_number_of_pairs_belongs_to_the_importance_that_is_measured_on_pairs() -> None:
    few, many = (small_space(gates={"steps": 2, "pairs": pairs, "batch_size": 4}) for pairs in (16, 32))
    for criterion, same in (("cosine", True), ("dev-loss", False)):
        keys = {stages(space, drop_mlp=1, importance=criterion)["importance"] for space in (few, many)}
        assert (len(keys) == 1) is same


@pytest.mark.parametrize("name", ["drop_attention", "drop_mlp"])
def test_counted_blocks_beside_named_layers_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"drop_block is a count \(2\) beside layers named in {name}"):
        dry_run(small_space(schedules=[{"drop_block": 2, name: [0]}]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "base"}, r"^base: no such folder or .gguf file; known without files: smollm2-135m"),
        ({"dataset": "scifcat"}, "^data set 'scifcat': .* did you mean 'scifact'"),
        (
            {"recovery": TRAINING | {"distillation": {"teacher": "bsae", "similarity": 1.0}}},
            r"^recovery.distillation.teacher: bsae: no such folder",
        ),
        ({"base_training": TRAINING | {"negatives": "bm52"}}, "^base_training.negatives: bm52: no such"),
        ({"base_training": TRAINING | {"dataset": "msmacro"}}, "^base_training.dataset: .*'msmarco'"),
    ],
)
def test_names_that_lead_nowhere_are_told_before_anything_runs(
    settings: dict[str, object], message: str
) -> None:
    """Not taken for hub ids, which would be found out after hours of training."""
    with pytest.raises(InputError, match=message) as refused:
        dry_run(small_space(**settings))
    assert "\n" not in str(refused.value)


def test_a_schedule_that_does_not_fit_every_backbone_has_to_name_its_own() -> None:
    backbones = ["random:llama", {"backbone": "random:bert", "first_blocks": 2}]
    with pytest.raises(InputError, match=r"3M of random:bert: .*; a schedule is of every backbone unless"):
        dry_run(small_space(backbones=backbones, schedules=[{"drop_mlp": 3}]))
    own = small_space(backbones=backbones, schedules=[{"drop_mlp": 3, "backbone": "random:llama"}])
    assert [trial.schedule for trial in dry_run(own).trials] == ["full", "full", "3M"]
