"""Running a trial: its stages in order, its row, and what is left of it when it failed."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effir_ray import hardware
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Schedule
from effir_ray.config import Prompts
from effir_ray.encoding.cpu_kernels import build
from effir_ray.errors import InputError, TrialFailure
from effir_ray.evaluation.metrics import Scores
from effir_ray.evaluation.rows import score_columns, size_columns
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_config
from effir_ray.models.retriever import load_retriever
from effir_ray.results import query_scores, store
from effir_ray.results.query_scores import METRICS
from effir_ray.results.schema import TrialRow
from effir_ray.search import measurement_stages, model_stages, trial_stages
from effir_ray.search.activity import Activity
from effir_ray.search.candidates import Candidate
from effir_ray.search.display import _activity_line
from effir_ray.search.dry_run import dry_run, load_backbones, named_sources
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import Cost, Stage, StageTask
from effir_ray.search.time_estimate import TimeEstimate
from effir_ray.search.trial import StageRunner, failed_row, run_trial
from effir_ray.stages import StageStore
from tests.helpers.search_examples import small_space, write_corpus


def footprint(task: StageTask) -> None:
    (task.out / "layers.txt").write_text(str(len(model_stages.read_plan(task.parents["model"]).layers)))


EXTRA = Stage(
    name="footprint",
    title="weighing the model",
    build=footprint,
    inputs=lambda config, sources, split: {"unit": "layers"},
    parents={"model": ("pruned", "backbone")},
    columns=lambda task: {"mfu": float((task.out / "layers.txt").read_text())},
    workers=lambda config: 3,
    cost=Cost(start_seconds=1000.0),
)


def built(folder: Path) -> list[str]:
    """Stages of trials, each as often as it was built; the speed of a shape is a part of ``timing``."""
    log = (folder / "stages" / "runs.log").read_text()
    return [name for line in log.splitlines() if (name := line.split()[0]) != "speed"]


def speeds(folder: Path) -> int:
    """How many shapes were measured."""
    log = (folder / "stages" / "runs.log").read_text()
    return sum(line.split()[0] == "speed" for line in log.splitlines())


def only(monkeypatch: pytest.MonkeyPatch, *stages: Stage) -> None:
    monkeypatch.setattr(trial_stages, "STAGES", stages)


DECLARED = {stage.name: stage for stage in trial_stages.STAGES}
WITHOUT_RAY = tuple(DECLARED[name] for name in ("backbone", "importance", "neurons", "pruned", "timing"))


def fake_scores(task: StageTask) -> None:
    """What has to be in a row, without encoding a corpus on Ray."""
    (task.out / "scores.json").write_text("{}")


SCORES = replace(
    DECLARED["scores"],
    build=fake_scores,
    parents={"model": ("pruned", "backbone")},
    columns=lambda task: {"ndcg_at_10": 0.5},
    query_scores=lambda task: {"q": dict.fromkeys(METRICS.values(), 0.5)},
    workers=lambda task: 1,
)


def test_a_stage_is_one_declaration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one is keyed, shared, previewed, built, named, estimated and written to the row."""
    space = small_space(schedules=[{"drop_mlp": [1]}, {"drop_mlp": [1], "recover": False}])
    config = space.trial(Candidate(drop_mlp=(1,)))
    backbone, sources = load_backbones(space), {space.backbone: named_sources(config)}
    before = TimeEstimate(StageStore(tmp_path / "none"), backbone, sources).seconds_left([config], 0, 0, ())
    only(monkeypatch, *WITHOUT_RAY, SCORES, EXTRA)
    assert dry_run(space).stages["footprint"] == 2
    estimate = TimeEstimate(StageStore(tmp_path / "none"), backbone, sources)
    assert estimate.seconds_left([config], 0, 0, ()) > before + 900
    line = _activity_line(Activity(trial="1M", split="dev", stage="footprint", since=0.0))
    assert "weighing the model" in line

    heard: list[str] = []
    (row,) = run_trial(config, StageStore(tmp_path / "stages"), listener=heard.append)
    assert sorted(heard) == sorted(built(tmp_path)) == ["backbone", "footprint", "pruned", "scores", "timing"]
    assert row.mfu == 4.0
    run_trial(config, StageStore(tmp_path / "stages"), listener=heard.append)
    assert len(heard) == 5

    only(monkeypatch, *WITHOUT_RAY, SCORES, replace(EXTRA, version=2))
    run_trial(config, StageStore(tmp_path / "stages"), listener=heard.append)
    assert heard[5:] == ["footprint"]


def test_prompts_are_those_of_the_study_and_of_each_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put before every text from the backbone on, also of a folder that is used as it is without."""
    only(monkeypatch, *WITHOUT_RAY, SCORES)
    save_checkpoint(load_retriever("random:llama"), tmp_path / "llama")
    folder, stages = str(tmp_path / "llama"), StageStore(tmp_path / "stages")
    plain = small_space(backbone=folder).trial(Candidate())
    prompted = small_space(backbone=folder, prompts={"query": "find: "}).trial(Candidate())
    assert plain.id != prompted.id and "prompts" not in plain.model_dump()
    for config in (plain, prompted):
        run_trial(config, stages)
    prompts = [
        load_retriever(place).spec.query_prompt
        for place in (tmp_path / "stages" / "backbone").glob("*/checkpoint")
    ]
    assert sorted(prompts) == ["", "find: "]
    several = small_space(
        backbones=["random:bert", {"backbone": folder, "prompts": {"document": "text: "}}],
        prompts={"query": "find: "},
    )
    found = [several.trial(Candidate(backbone=name)).prompts for name in several.backbone_names]
    assert found == [Prompts(query="find: "), Prompts(document="text: ")]


def counted_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> tuple[SearchSpace, StageStore]:
    """A study whose trials also have that stage, and whose rows have sizes."""

    def columns(task: StageTask) -> dict[str, Any]:
        plan = model_stages.read_plan(task.parents["model"])
        return {"ndcg_at_10": 0.5, **size_columns(load_config("random:llama"), plan, document_tokens=32)}

    first, *others = WITHOUT_RAY
    only(monkeypatch, first, DECLARED[stage], *others, replace(SCORES, columns=columns))
    data = str(write_corpus(tmp_path / "texts"))
    return small_space(dataset=data), StageStore(tmp_path / "stages")


def test_tokens_are_counted_once_and_rows_know_how_many_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    space, store = counted_in(tmp_path, monkeypatch, "tokens")
    schedules = [{}, {"vocabulary": 300}, {"vocabulary": 280, "drop_block": (1,)}]
    full, fewer, least = (run_trial(space.trial(Candidate(**each)), store)[0] for each in schedules)
    assert (fewer.schedule, least.schedule) == ("v300", "B[1]-v280")
    assert full.parameters and fewer.parameters == full.parameters - 212 * 64
    assert least.parameters and least.parameters < fewer.parameters - 20 * 64
    assert fewer.block_parameters == full.block_parameters and fewer.flops_ratio == 1.0
    assert Counter(built(tmp_path))["tokens"] == 1
    model = load_retriever(next((tmp_path / "stages" / "pruned").glob("*")) / "checkpoint")
    assert len(model.tokenizer) == model.model.config.vocab_size in (280, 300)
    assert dry_run(small_space(schedules=schedules[1:])).trials[1].parameters == fewer.parameters
    with pytest.raises(TrialFailure, match="vocabulary is 20; expected 259"):
        run_trial(space.trial(Candidate(vocabulary=20)), store)
    with pytest.raises(
        InputError, match="v600 of random:llama: vocabulary is 600; the backbone has 512 tokens"
    ):
        dry_run(small_space(schedules=[{"vocabulary": 600}]))


def test_axes_are_fitted_once_and_every_dimension_takes_the_first_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checkpoint as ``compress`` writes; embeddings are as long as it says, and so is the index."""

    space, store = counted_in(tmp_path, monkeypatch, "axes")
    schedules = [{}, {"dimension": 16}, {"dimension": 8, "drop_block": (1,)}]
    full, short, least = (run_trial(space.trial(Candidate(**each)), store)[0] for each in schedules)
    assert (short.schedule, least.schedule) == ("d16", "B[1]-d8")
    assert full.parameters and short.parameters == full.parameters + 16 * 64
    assert [row.index_bytes for row in (full, short, least)] == [4_000_000 * size for size in (64, 16, 8)]
    assert short.block_parameters == full.block_parameters and short.flops_ratio == 1.0
    assert short.document_speedup == 1.0 and speeds(tmp_path) == 2, "one product a text is no other speed"
    assert Counter(built(tmp_path))["axes"] == 1
    models = {
        model.dimension: model
        for place in (tmp_path / "stages" / "pruned").glob("*")
        if (model := load_retriever(place / "checkpoint"))
    }
    assert set(models) == {8, 16}
    weights = [models[size].model.projection.weight for size in (8, 16)]
    assert torch.equal(weights[0], weights[1][:8])
    calibration = space.trial(Candidate()).calibration
    compress("random:llama", Schedule(dimension=16), tmp_path / "alone", calibration=calibration)
    alone = load_retriever(tmp_path / "alone").model.projection.weight
    torch.testing.assert_close(alone, weights[1], atol=1e-5, rtol=0)
    assert dry_run(small_space(schedules=schedules[1:])).trials[1].parameters == short.parameters
    with pytest.raises(InputError, match="d64 of random:llama: dimension is 64; the backbone's embeddings"):
        dry_run(small_space(schedules=[{"dimension": 64}]))


@pytest.mark.skipif(
    build().kernels is None or not build().kernels.multiplies("int8"), reason="needs VNNI and a C++ compiler"
)
def test_a_model_is_also_served_in_bytes(tmp_path: Path) -> None:
    """The same checkpoint, embedded, scored and timed in int8, also where nothing is cut."""
    data, store = str(write_corpus(tmp_path / "data")), StageStore(tmp_path / "stages")
    space = small_space(dataset=data, dev={}, test={}, parameters={"precision": ["auto", "int8"]}, trials=1)
    candidates = [{}, {"precision": "int8"}, {"drop_mlp": (1,)}, {"drop_mlp": (1,), "precision": "int8"}]
    configs = [space.trial(Candidate(**settings)) for settings in candidates]
    rows = [run_trial(config, store)[0] for config in configs]
    assert [row.schedule for row in rows] == ["full", "full+int8", "M[1]", "M[1]+int8"]
    assert len({row.trial_id for row in rows}) == 4 and "precision" not in configs[2].model_dump()
    assert configs[3].full() == configs[0]
    counts = Counter(built(tmp_path))
    assert (counts["backbone"], counts["pruned"], counts["embeddings"], counts["scores"]) == (1, 1, 4, 4)
    shards = [json.loads(file.read_text()) for file in store.root.glob("embeddings/*/shards/shards/*.json")]
    assert Counter(shard["computed_in"] for shard in shards) == {"float32": 2, "int8": 2}
    assert [row.parameters for row in rows] == [rows[0].parameters] * 2 + [rows[2].parameters] * 2
    assert rows[1].bytes and rows[0].bytes and rows[1].bytes < rows[0].bytes
    assert rows[3].bytes and rows[2].bytes and rows[3].bytes < rows[2].bytes
    assert rows[0].document_speedup == 1.0 and rows[1].document_speedup not in (None, 1.0)
    assert speeds(tmp_path) == 4


def test_of_several_data_sets_each_has_a_row_beside_their_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of two queries counts as much as one of one; the model is made and timed once."""
    other = str(write_corpus(tmp_path / "other"))

    def scored(task: StageTask) -> dict[str, dict[str, float]]:
        values = {"stdlib": [0.2], other: [0.4, 0.8]}[task.config.dataset]
        return {f"q{number}": dict.fromkeys(METRICS.values(), value) for number, value in enumerate(values)}

    def columns(task: StageTask) -> dict[str, Any]:
        by_query, names = scored(task), METRICS.values()
        mean = {name: float(np.mean([found[name] for found in by_query.values()])) for name in names}
        return score_columns(Scores(mean, by_query)) | {"isotropy": None}

    inputs = DECLARED["bm25"].inputs  # what of a data set its embeddings depend on
    only(monkeypatch, *WITHOUT_RAY, replace(SCORES, inputs=inputs, columns=columns, query_scores=scored))
    stages = StageStore(tmp_path / "stages")
    config = small_space(datasets=["stdlib", other]).trial(Candidate(drop_mlp=(1,)))
    mean, *apart = run_trial(config, stages, out=tmp_path)
    assert (mean.dataset, *(row.dataset for row in apart)) == (f"mean of stdlib, {other}", "stdlib", other)
    assert [row.ndcg_at_10 for row in (mean, *apart)] == pytest.approx([0.4, 0.2, 0.6])
    assert [row.n_queries for row in (mean, *apart)] == [3, 1, 2]
    contents = [json.loads(row.contents)["dataset"] for row in (mean, *apart)]
    assert contents[0] == "+".join(contents[1:]) and len(set(contents)) == 3
    assert {row.trial_id for row in apart} == {mean.trial_id} == {config.id}
    assert {row.document_ms for row in apart} == {mean.document_ms}
    assert mean.ndcg_at_10_se == pytest.approx((apart[1].ndcg_at_10_se or 0) / 2)
    assert mean.device_seconds and apart[0].device_seconds is apart[1].device_seconds is None
    assert Counter(built(tmp_path)) == {"backbone": 1, "pruned": 1, "scores": 2, "timing": 1}
    kept = query_scores.by_trial(query_scores.read(tmp_path))
    assert {dataset: scores for (_, _, dataset, _), scores in kept.items()} == {
        "stdlib": {"q0": 0.2},
        other: {"q0": 0.4, "q1": 0.8},
    }
    # Each is the data set's own: a study of it alone finds its scores.
    heard: list[str] = []
    run_trial(small_space(dataset=other).trial(Candidate(drop_mlp=(1,))), stages, listener=heard.append)
    assert heard == ["timing"]  # on its own texts


def test_a_row_says_with_how_many_workers_its_model_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(task: StageTask) -> None:
        model = task.parents["model"]
        (task.out / model_stages.CHECKPOINT).symlink_to(model / model_stages.CHECKPOINT)
        model_stages.write_plan(task.out, model_stages.read_plan(model))
        steps = [{"step": step, "workers": workers, "seconds": 1.0} for step, workers in ((1, 4), (2, 2))]
        (task.out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))

    scores = replace(SCORES, parents={"model": ("recovered", "pruned")})
    only(monkeypatch, *WITHOUT_RAY, replace(DECLARED["recovered"], build=train), scores)
    recovery = {"steps": 2, "batch_size": 4, "lora": None, "workers": [2, 4], "zero_stage": 0}
    space, stages = small_space(recovery=recovery), StageStore(tmp_path / "stages")
    rows = [
        row
        for recover in (True, False)
        for row in run_trial(space.trial(Candidate(drop_mlp=(1,), recover=recover)), stages, out=tmp_path)
    ]
    store.append(tmp_path, rows)
    trained, untrained = store.read(tmp_path)["training_workers"].to_pylist()
    assert untrained is None
    assert json.loads(trained) == {"recovery": [[1, 4], [2, 2]]}


def test_a_model_that_was_deleted_is_built_again_only_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, *WITHOUT_RAY, SCORES, EXTRA)
    config, stages = small_space().trial(Candidate(drop_mlp=(1,))), StageStore(tmp_path / "stages")
    (first,) = run_trial(config, stages)
    (pruned,) = (tmp_path / "stages" / "pruned").glob("*")
    stages.free(pruned, model_stages.CHECKPOINT)
    heard: list[str] = []
    (again,) = run_trial(config, stages, listener=heard.append)
    assert (heard, again.ndcg_at_10, again.mfu) == ([], first.ndcg_at_10, first.mfu)
    only(monkeypatch, *WITHOUT_RAY, SCORES, replace(EXTRA, version=2))
    run_trial(config, stages, listener=heard.append)
    assert heard == ["pruned", "footprint"]
    assert (pruned / model_stages.CHECKPOINT / "config.json").exists() and not stages.freed_bytes()


def test_a_row_names_the_machine_that_measured_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever machine puts a later row together; another kind of machine measures for itself."""
    only(monkeypatch, *WITHOUT_RAY, SCORES)
    config, stages = small_space().trial(Candidate()), StageStore(tmp_path / "stages")
    here = hardware.detect()
    (first,) = run_trial(config, stages)
    assert first.hardware == here.name
    (record,) = (tmp_path / "stages" / "timing").glob("*/timing.json")
    timing = json.loads(record.read_text())
    assert (timing["hardware"], timing["dtype"]) == (here.name, here.dtype)
    record.write_text(json.dumps(timing | {"hardware": "1 x Measuring Machine"}))
    assert run_trial(config, stages, split="test")[0].hardware == "1 x Measuring Machine"

    monkeypatch.setattr(hardware, "detect", lambda: replace(here, name="another machine"))
    assert run_trial(config, stages)[0].hardware == "another machine"
    assert built(tmp_path).count("timing") == 2


def test_models_of_one_shape_have_one_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever blocks went; and what is timed in milliseconds agrees with it."""
    only(monkeypatch, *WITHOUT_RAY, SCORES)
    space, stages = small_space(), StageStore(tmp_path / "stages")

    def run(**schedule: Any) -> TrialRow:
        return run_trial(space.trial(Candidate(**schedule)), stages)[0]

    full, first, second = run(), run(drop_block=(1,)), run(drop_block=(2,))
    assert speeds(tmp_path) == 2
    assert full.document_speedup == full.query_speedup == 1
    for column in ("document_speedup", "document_speedup_low", "query_speedup", "query_ms_p95", "mfu"):
        assert getattr(first, column) == getattr(second, column), column
    assert first.trial_id != second.trial_id
    assert first.document_ms and full.document_ms and first.document_speedup
    assert first.document_ms * first.document_speedup == pytest.approx(full.document_ms)
    run(drop_mlp=(1,))
    run(drop_mlp=(1,), drop_attention=(1,))  # the shape of a block less
    assert speeds(tmp_path) == 3
    run(drop_mlp=(1,), width_reduction=0.5, width_method="magnitude")
    assert speeds(tmp_path) == 4


def test_what_bits_depend_on_is_in_the_key_and_nothing_else(tmp_path: Path) -> None:
    space = small_space(base_training={"steps": 2, "batch_size": 4, "lora": None})
    config = space.trial(Candidate(drop_mlp=1, width_reduction=0.5))
    here = replace(named_sources(config), device="cpu", dtype="float32", machine="a")

    def keys(**changes: str) -> dict[str, str]:
        found = trial_stages.trial_stages(config, replace(here, **changes), "dev")
        return {stage.name: stage.key for stage in found}

    def differing(**changes: str) -> set[str]:
        return {name for name, key in keys().items() if keys(**changes)[name] != key}

    assert differing(machine="b") == {"timing"}
    assert differing(dtype="bfloat16") == set(keys()) - {"backbone", "bm25"}
    untrained = [stage for stage in trial_stages.STAGES if not stage.computed_on]
    assert {stage.name for stage in untrained} == {"backbone", "tokens", "sorted", "pruned", "bm25"}


def test_a_failed_trial_keeps_nothing_alive() -> None:
    """A worker that is used again would collect the models of its failed trials."""

    class Model(torch.nn.Module):
        pass

    class Loss(Exception):
        def __init__(self, model: Model) -> None:
            super().__init__("the loss is NaN")
            self.model = model

    def fail() -> weakref.ref[Any]:
        model = Model()
        row = failed_row(small_space().trial(Candidate()), "dev", "tiny", Loss(model))
        assert row.reason == "Loss: the loss is NaN"
        return weakref.ref(model)

    remembered = fail()
    gc.collect()
    assert remembered() is None


def test_exclusive_stages_take_turns(tmp_path: Path) -> None:
    config = small_space().trial(Candidate())
    runner = StageRunner(config, "dev", StageStore(tmp_path), lambda stage: None)
    other = StageRunner(config, "dev", StageStore(tmp_path), lambda stage: None)
    with runner._exclusive(DECLARED["timing"]):
        with other._exclusive(DECLARED["scores"]):
            pass
        assert list(tmp_path.glob("locks/*"))


def test_a_model_that_does_not_fit_memory_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an InputError, which would end the whole study."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("effir_ray.encoding.padded.PaddedForward.__call__", full)
    monkeypatch.setattr("effir_ray.encoding.encoder.packed_forward", lambda *_: None)
    only(monkeypatch, *WITHOUT_RAY, SCORES)
    with pytest.raises(TrialFailure, match="out of memory with a single text"):
        run_trial(small_space().trial(Candidate()), StageStore(tmp_path / "stages"))


def test_queries_are_timed_at_their_own_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int | None]] = {"query": set(), "document": set()}
    encode = measurement_stages.Encoder.encode

    def spy(self: Any, texts: Any, kind: str, *, max_length: int | None = None, **rest: Any) -> Any:
        seen[kind].add(max_length)
        return encode(self, texts, kind, max_length=max_length, **rest)

    monkeypatch.setattr(measurement_stages.Encoder, "encode", spy)
    only(monkeypatch, *WITHOUT_RAY, SCORES)
    space: SearchSpace = small_space(query_max_length=9, document_max_length=21)
    run_trial(space.trial(Candidate()), StageStore(tmp_path / "stages"))
    assert seen == {"query": {9}, "document": {21}}
