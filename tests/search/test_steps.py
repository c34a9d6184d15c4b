"""Steps of a trial, run one by one on a tiny model; those that start Ray are tested with whole studies."""

from pathlib import Path

import pytest
from search_examples import small_space

from effir_ray.backbones.registry import load_config
from effir_ray.compression.compress import compress
from effir_ray.compression.importance_scores import ImportanceScores
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import TrialFailure
from effir_ray.search import steps
from effir_ray.search.dry_run import expected_plan
from effir_ray.search.space import Candidate, SearchSpace


def build(space: SearchSpace, folder: Path, **schedule: object) -> Path:
    """The folder of the pruned model; all layers are equally important."""
    config = space.trial(Candidate(**schedule))
    parents = {}
    for name in ("model", "importance", "pruned"):
        parents[name] = folder / name
        parents[name].mkdir()
    steps.backbone(config, "dev", {}, parents["model"])
    equal = (0.5,) * len(steps.read_plan(parents["model"]).layers)
    scores = ImportanceScores(criterion="cosine", attention=equal, mlp=equal, block=equal)
    (parents["importance"] / "importance.json").write_text(scores.model_dump_json())
    steps.pruned(config, "dev", parents, parents["pruned"])
    return parents["pruned"]


def test_a_compressed_checkpoint_is_pruned_further(tmp_path: Path) -> None:
    done = compress("random:llama", Schedule(drop_mlp=(1,)), tmp_path / "small")
    space = small_space(backbone=str(tmp_path / "small"))
    pruned = build(space, tmp_path, drop_attention=[0], drop_mlp=[1])
    plan = steps.read_plan(pruned)
    assert [layer.mlp for layer in plan.layers] == [layer.mlp for layer in done.plan.layers]
    assert [layer.attention for layer in plan.layers] == [False, True, True, True]
    assert steps.load_model(pruned).plan == plan
    config = space.trial(Candidate(drop_attention=[0], drop_mlp=[1]))
    assert expected_plan(config, load_config(space.backbone)) == plan


def test_a_schedule_that_its_measurements_do_not_fit_fails_alone(tmp_path: Path) -> None:
    """Equally important blocks: the last ones go, of which one is named again."""
    with pytest.raises(TrialFailure, match="layer 3, whose whole block is dropped"):
        build(small_space(), tmp_path, drop_block=2, drop_mlp=[3])
