"""Stages of a trial, built one by one on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from effir_ray.cluster.connection import connect
from effir_ray.compression.pipeline import compress
from effir_ray.compression.planning import ImportanceScores
from effir_ray.compression.schedule import Schedule
from effir_ray.data.datasets import load_dataset
from effir_ray.data.pairs import Pair, write_pairs
from effir_ray.errors import TrialFailure
from effir_ray.models.accounting import count_parameters
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_config
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.search import measurement_stages, model_stages, trial_stages
from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import expected_plan, load_backbones, named_sources
from effir_ray.search.model_stages import CHECKPOINT, read_plan
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import KeyedStage, StageTask
from effir_ray.search.trial import StageRunner, sources_of
from effir_ray.stages import StageStore
from effir_ray.training.config import STATE, TrainConfig
from effir_ray.training.supervision.training_data import held_out_by, training_pairs
from tests.helpers.search_examples import small_space, write_corpus

STAGES = {stage.name: stage for stage in trial_stages.STAGES}
TRAINING = {"steps": 2, "batch_size": 4, "lora": None}


def task(space: SearchSpace, out: Path, parents: dict[str, Path], **schedule: object) -> StageTask:
    config = space.trial(Candidate(**schedule))
    out.mkdir(parents=True, exist_ok=True)
    return StageTask(
        config=config, split="dev", parents=parents, out=out, store=StageStore(out.parent / "stages")
    )


def build(space: SearchSpace, folder: Path, **schedule: object) -> Path:
    """The folder of the pruned model; all layers are equally important."""
    model, importance, pruned = (folder / name for name in ("model", "importance", "pruned"))
    STAGES["backbone"].build(task(space, model, {}))
    equal = (0.5,) * len(read_plan(model).layers)
    scores = ImportanceScores(criterion="cosine", attention=equal, mlp=equal, block=equal)
    importance.mkdir()
    (importance / "importance.json").write_text(scores.model_dump_json())
    STAGES["pruned"].build(task(space, pruned, {"model": model, "importance": importance}, **schedule))
    return pruned


def test_a_compressed_checkpoint_is_pruned_further(tmp_path: Path) -> None:
    done = compress("random:llama", Schedule(drop_mlp=(1,)), tmp_path / "small")
    space = small_space(backbone=str(tmp_path / "small"))
    pruned = build(space, tmp_path, drop_attention=[0], drop_mlp=[1])
    plan = read_plan(pruned)
    assert [layer.mlp for layer in plan.layers] == [layer.mlp for layer in done.plan.layers]
    assert [layer.attention for layer in plan.layers] == [False, True, True, True]
    assert load_retriever(pruned / CHECKPOINT).plan == plan
    config = space.trial(Candidate(drop_attention=[0], drop_mlp=[1]))
    assert expected_plan(config, load_backbones(space)) == plan


def test_a_schedule_that_its_measurements_do_not_fit_fails_alone(tmp_path: Path) -> None:
    """Equally important blocks: the last ones go, of which one is named again."""
    with pytest.raises(TrialFailure, match="layer 3, whose whole block is dropped"):
        build(small_space(), tmp_path, drop_block=2, drop_mlp=[3])


def test_trials_share_mined_negatives_and_teacher_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    monkeypatch.setattr(
        "effir_ray.training.run.launcher.train", lambda model, config, out, **options: given.update(options)
    )
    model, out, stages = tmp_path / "model", tmp_path / "out", StageStore(tmp_path / "stages")
    model.mkdir()
    out.mkdir()
    (model / "plan.json").write_text(Plan.full(4).model_dump_json())
    space = small_space(base_training=TRAINING)
    STAGES["base"].build(task(space, out, {"model": model}))
    assert given["stages"].root == stages.root


def test_the_studys_full_model_teaches_and_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another base model is another teacher, though the trial's own settings are the same."""
    recovery = TRAINING | {"info_nce": 0, "distillation": {"teacher": "base", "embedding": 1.0}}

    def stages(**changes: Any) -> dict[str, KeyedStage]:
        config = small_space(recovery=recovery, **changes).trial(Candidate(drop_mlp=(1,), recover=True))
        return {
            stage.name: stage for stage in trial_stages.trial_stages(config, named_sources(config), "dev")
        }

    own, tuned = stages(), stages(base_training=TRAINING)
    assert own["recovered"].parents["teacher"] is own["backbone"]
    assert tuned["recovered"].parents["teacher"] is tuned["base"]
    again = stages(base_training=TRAINING | {"steps": 3})
    assert tuned["recovered"].inputs["teacher"] != again["recovered"].inputs["teacher"]
    without = small_space(recovery=TRAINING).trial(Candidate(drop_mlp=(1,), recover=True))
    keyed = trial_stages.trial_stages(without, named_sources(without), "dev")
    assert list(next(stage for stage in keyed if stage.name == "recovered").parents) == ["model"]

    given: list[TrainConfig] = []
    monkeypatch.setattr(
        "effir_ray.training.run.launcher.train", lambda model, config, out, **options: given.append(config)
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "plan.json").write_text(Plan.full(4).model_dump_json())
    space = small_space(recovery=recovery)
    parents = {"model": model, "teacher": tmp_path / "full"}
    STAGES["recovered"].build(task(space, tmp_path / "out", parents, drop_mlp=(1,), recover=True))
    assert given[0].distillation.teacher == str(tmp_path / "full" / "checkpoint")


def test_what_a_study_scores_is_never_trained_on(tmp_path: Path) -> None:
    """Pairs from elsewhere may ask dev and test queries; what reaches the trainer does not."""
    data = load_dataset(write_corpus(tmp_path / "data"))
    pairs = [Pair(name, query, ("a text",), positive_ids=("d0",)) for name, query in data.all_queries.items()]
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    recovery = TRAINING | {"dataset": str(tmp_path / "pairs.jsonl")}
    space = small_space(dataset=str(data.folder), recovery=recovery)
    config = space.trial(Candidate(drop_mlp=1, recover=True)).recovery
    assert config is not None
    kept, left_out = training_pairs(config.dataset, config.split, held_out_by(config))
    assert {pair.query_id for pair in kept} == set(data.queries("train"))
    assert left_out == len(data.queries("dev")) + len(data.queries("test")) == 16


def test_calibration_texts_of_ones_own_are_told_apart() -> None:
    def stages(**changes: Any) -> dict[str, KeyedStage]:
        config = small_space(**changes).trial(Candidate(drop_mlp=1))
        return {
            stage.name: stage for stage in trial_stages.trial_stages(config, named_sources(config), "dev")
        }

    given, own = stages(), stages(calibration_from="texts/corpus.jsonl")
    assert given["importance"].key != own["importance"].key
    assert stages(calibration_from="stdlib")["importance"].key == given["importance"].key
    config = small_space(calibration_from="texts/corpus.jsonl").trial(Candidate(drop_mlp=1))
    assert config.calibration.texts_from == "texts/corpus.jsonl"
    assert named_sources(config).contents["calibration"] == "texts/corpus.jsonl"


def test_seeds_share_their_queries_unless_another_sample_is_asked_for() -> None:
    def keys(**changes: Any) -> dict[str, str]:
        config = small_space(**changes).trial(Candidate(drop_mlp=1))
        stages = trial_stages.trial_stages(config, named_sources(config), "dev")
        return {stage.name: stage.key for stage in stages if stage.name in ("importance", "timing", "scores")}

    def sampled(**changes: Any) -> list[str]:
        config = small_space(**changes).trial(Candidate())
        return sorted(measurement_stages.sampled(config, "dev").queries("dev"))

    assert sampled(seed=5) == sampled() != sampled(sample_seed=1)
    assert keys(seed=5)["importance"] != keys()["importance"] == keys(sample_seed=1)["importance"]
    assert keys(sample_seed=1)["scores"] != keys()["scores"]


def test_seconds_count_once_a_worker(tmp_path: Path) -> None:
    """Where their number changed, once for each that there was at a step."""
    base, recovery = TRAINING | {"workers": 2}, TRAINING | {"workers": [1, 4], "zero_stage": 0}
    space = small_space(base_training=base, recovery=recovery, encoding_workers=3)
    built = task(space, tmp_path, {}, drop_mlp=1, recover=True)
    write_history(tmp_path, [(1, 1, 6.0), (2, 4, 3.0)])
    counted = {name: STAGES[name].workers(built) for name in ("base", "recovered", "embeddings")}
    assert counted == {"base": 2, "recovered": 2, "embeddings": 3}


def test_large_embeddings_are_searched_by_as_many_workers_as_they_are_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most by as many as encode."""
    monkeypatch.setattr(measurement_stages, "SEARCHED_A_WORKER", 1000)
    for workers, size, expected in ((8, 999, 1), (8, 2500, 3), (2, 2500, 2), (1, 2500, 1)):
        shards = tmp_path / f"{workers}-{size}" / measurement_stages.SHARDS
        shards.mkdir(parents=True)
        (shards / "000000.parquet").write_bytes(bytes(size))
        asked = task(small_space(encoding_workers=workers), tmp_path, {"embeddings": shards.parent})
        assert measurement_stages.searchers(asked) == expected


def write_history(folder: Path, steps: list[tuple[int, int, float]]) -> None:
    """Of a training: step, workers and seconds of each."""
    rows = [{"step": step, "workers": workers, "seconds": seconds} for step, workers, seconds in steps]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_trial_knows_with_how_many_workers_each_part_of_it_was_trained(tmp_path: Path) -> None:
    space = small_space(base_training=TRAINING, recovery=TRAINING | {"workers": [1, 4], "zero_stage": 0})
    store, config = StageStore(tmp_path), space.trial(Candidate(drop_mlp=1, recover=True))
    stages = trial_stages.trial_stages(config, named_sources(config), "dev")
    assert model_stages.training_workers(stages, store) == {}
    for stage in stages:
        if stage.name == "recovered":
            steps = [(1, 4, 1.0), (2, 4, 1.0), (3, 1, 1.0), (3, 2, 1.0), (4, 2, 1.0)]  # step 3 was done again
            store.run(stage.name, stage.inputs, partial(write_history, steps=steps))
        elif stage.name == "base":  # of a version that did not say it
            store.run(
                stage.name, stage.inputs, lambda out: (out / "history.jsonl").write_text('{"step": 1}\n')
            )
    assert model_stages.training_workers(stages, store) == {"recovery": [(1, 4), (3, 2)]}


def test_a_training_begins_with_the_longest_part_that_is_whole_and_its_own(tmp_path: Path) -> None:
    """Not with one that another trial is just writing, nor with one of other settings."""
    space = small_space(recovery={"steps": 27, "batch_size": 4}, strategy="halving")
    store = StageStore(tmp_path)

    def stage(candidate: Candidate, rung: int) -> KeyedStage:
        part = space.rungs(space.trial(candidate))[rung]
        stages = trial_stages.trial_stages(part, named_sources(part), "dev")
        return next(stage for stage in stages if stage.name == "recovered")

    def built(of: KeyedStage) -> Path:
        return store.run(of.name, of.inputs, lambda out: (out / STATE).mkdir())

    def begun(of: KeyedStage) -> Path | None:
        return model_stages._begun(replace(task(space, tmp_path, {}), store=store, inputs=of.inputs))

    one, other = Candidate(drop_mlp=(1,), recover=True), Candidate(drop_mlp=(2,), recover=True)
    first, second, whole = (stage(one, rung) for rung in range(3))
    being_written = second.path(store)
    (being_written.with_name(f"{being_written.name}.tmp") / STATE).mkdir(parents=True)
    built(stage(other, 1))
    assert begun(whole) is None
    place = built(first)
    assert begun(whole) == begun(second) == place and begun(first) is None
    being_written.with_name(f"{being_written.name}.tmp").joinpath(STATE).rmdir()
    further = built(second)
    assert begun(whole) == further and begun(second) == place
    (further / STATE).rmdir()  # nothing is to go on from there any more
    assert begun(whole) == place


@pytest.mark.integration
def test_training_and_encoding_go_on_in_the_folder_an_interrupted_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the last moment, before the stage was renamed: nothing is computed again."""
    data = write_corpus(tmp_path / "data")
    training = TRAINING | {"negatives": "bm25", "hard_negatives": 1, "query_max_length": 16}
    space = small_space(dataset=str(data), dev={}, test={}, base_training=training)
    stages = StageStore(tmp_path / "stages")
    model = tmp_path / "model"
    STAGES["backbone"].build(task(space, model, {}))

    def step(name: str, *, killed: bool) -> Callable[[Path], None]:
        def build(out: Path) -> None:
            STAGES[name].build(replace(task(space, out, {"model": model}), store=stages))
            if killed:
                raise KeyboardInterrupt

        return build

    connect(num_cpus=2)
    try:
        for name in ("base", "embeddings"):
            with pytest.raises(KeyboardInterrupt):
                stages.run(name, {}, step(name, killed=True), resumable=True)
    finally:
        ray.shutdown()
    monkeypatch.setattr("ray.init", None)
    for name in ("base", "embeddings"):
        place = stages.run(name, {}, step(name, killed=False), resumable=True)
        assert not any(".tmp" in path.name for path in place.rglob("*"))
    assert list((tmp_path / "stages" / "negatives").glob("*/stage.json"))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [
        {"drop_mlp": 1, "drop_attention": 1, "width_reduction": 0.25},
        {"drop_attention": 1, "drop_mlp": (2,), "layer_widths": (64, 128, 0, 8)},
        {"drop_block": 1},
    ],
    ids=["parts", "widths", "blocks"],
)
def test_a_trial_prunes_as_compress_does(
    tmp_path: Path, schedule: dict[str, Any], from_folder: bool, stored: str
) -> None:
    """The same schedule, data and seed: the same plan and the same bits, in the type they are stored in."""
    backbone = "random:llama"
    if from_folder:
        backbone = str(tmp_path / "backbone")
        save_checkpoint(load_retriever("random:llama", dtype=stored), tmp_path / "backbone")
    elif stored != "float32":
        pytest.skip("random models are float32")
    data = write_corpus(tmp_path / "data")
    config = small_space(backbone=backbone, dataset=str(data)).trial(Candidate(**schedule))
    keyed = {stage.name: stage for stage in trial_stages.trial_stages(config, sources_of(config), "dev")}
    runner = StageRunner(config, "dev", StageStore(tmp_path / "stages"), lambda stage: None)
    pruned = runner.make(keyed["pruned"])
    made = compress(backbone, config.schedule, tmp_path / "small", calibration=config.calibration)
    assert read_plan(pruned) == made.plan
    full = load_config(backbone)
    size = count_parameters(full, expected_plan(config, {backbone: full}))
    assert made.parameters == size, "what a dry run says"
    weights = [
        (place / "model.safetensors").read_bytes() for place in (pruned / CHECKPOINT, tmp_path / "small")
    ]
    assert weights[0] == weights[1]
    kept = load_retriever(pruned / CHECKPOINT, dtype="auto").model
    assert str(kept.dtype) == f"torch.{stored}"


def test_the_backbone_is_linked_without_reading_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compress("random:llama", Schedule(drop_mlp=(1,)), tmp_path / "small")
    monkeypatch.setattr(model_stages, "load_retriever", None)
    STAGES["backbone"].build(task(small_space(backbone=str(tmp_path / "small")), tmp_path / "out", {}))
    assert (tmp_path / "out" / CHECKPOINT).resolve() == tmp_path / "small"
    assert read_plan(tmp_path / "out") == done.plan
