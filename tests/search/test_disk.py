"""What a study deletes on the way, and what it keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from effir_ray.errors import InputError
from effir_ray.mirrors import Mirror
from effir_ray.results import store
from effir_ray.search.disk import Collector
from effir_ray.search.dry_run import load_backbones, named_sources
from effir_ray.search.folder import claim, exclusive
from effir_ray.search.model_stages import CHECKPOINT
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.stage_graph import Split
from effir_ray.search.study import clean
from effir_ray.search.trial import sources_of
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore
from effir_ray.training.config import STATE
from tests.helpers.search_examples import row, small_space

TRAINING = {"steps": 2, "batch_size": 4, "lora": None}


class Study:
    """A study whose stages are built by hand: 100 bytes of bulk each."""

    def __init__(self, folder: Path, *, real: bool = False, **settings: Any) -> None:
        """``real``: with the fingerprints, the record and the rows that a search has."""
        space = small_space(**({"recovery": TRAINING} | settings))
        self.out = folder if real else None
        self.sources = sources_of(space) if real else named_sources(space)
        if real:
            claim(folder, space, self.sources.contents, resume=False)
        self.proposals = Proposals(space, folder, [], load_backbones(space))
        self.store = StageStore(folder / "stages")
        self.collector = Collector(self.proposals, self.store, {space.backbone: self.sources})

    def run(self, ndcg: Mapping[str, float], *, until: str = "") -> None:
        """Requests in order, with the score that each schedule has; stops before the trial ``until``."""
        while (request := self.proposals.next()) is not None:
            if request.config.name == until:
                return
            self._build(request)
            size = 50 if request.config.schedule.drop_mlp else 100
            found = row(request.config, ndcg[request.config.name], split=request.split, parameters=size)
            if self.out is not None:
                store.append(self.out, [found])
            self.proposals.finished(found)
            self.collector.collect()

    def _build(self, request: TrialRequest) -> None:
        for stage in trial_stages(request.config, self.sources, request.split):
            place = stage.path(self.store)
            if not self.store.has(place):
                if stage.name == "recovered" and request.config.name.partition("@")[2]:
                    (place / STATE).mkdir(parents=True)
                (place / (stage.stage.bulk or CHECKPOINT)).mkdir(parents=True)
                (place / (stage.stage.bulk or CHECKPOINT) / "weights").write_bytes(bytes(100))
                (place / "stage.json").write_text(json.dumps({"inputs": stage.inputs, "seconds": 1.0}))

    def whole(self, config: TrialConfig, split: Split = "dev") -> set[str]:
        """The stages of a trial that are there with their bulk."""
        stages = trial_stages(config, self.sources, split)
        return {stage.name for stage in stages if self.store.has(stage.path(self.store))}


EVERYTHING = {"backbone", "importance", "pruned", "embeddings", "scores", "timing", "bm25"}


def test_models_and_embeddings_of_beaten_trials_go_and_those_of_the_front_stay(tmp_path: Path) -> None:
    study = Study(tmp_path, schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}])
    study.run({"1M": 0.4, "2M": 0.3, "full": 0.5})  # as small as 1M, and worse
    first, second = (study.proposals.space.trial(candidate) for candidate in study.proposals.space.schedules)
    assert study.whole(first) == study.whole(first, "test") == EVERYTHING
    assert study.whole(second) == EVERYTHING - {"pruned", "embeddings"}
    assert study.store.freed_bytes() == 200
    assert study.collector.kept_bytes() == 100 * (1 + 2 * 2)  # one pruned model; two splits of two trials
    study.collector.collect()
    assert study.store.freed_bytes() == 200


def test_models_of_the_front_stay_with_every_seed(tmp_path: Path) -> None:
    """Keys of the driver are those of the trials: a training with another seed is another one."""
    schedules = [{"drop_mlp": 1, "recover": True}, {"drop_mlp": 2, "recover": True}]
    study = Study(tmp_path, schedules=schedules, seeds=[0, 1])
    study.run({"1M+ft": 0.4, "2M+ft": 0.3, "full": 0.5})
    first, second = (study.proposals.space.trial(candidate) for candidate in study.proposals.space.schedules)
    again = first.with_seed(1)
    assert study.whole(first) == study.whole(again) == EVERYTHING - {"pruned"} | {"recovered"}
    assert not study.whole(second) & {"recovered", "embeddings"}
    keys = [
        {stage.name: stage.key for stage in trial_stages(config, sources, "dev")}["recovered"]
        for config in (first, again)
        for sources in (study.sources, named_sources(config))
    ]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize(("keep", "freed"), [("all", 0), ("none", 100 * (2 + 2 * 2 + 1))])
def test_all_or_none_may_be_kept(tmp_path: Path, keep: str, freed: int) -> None:
    study = Study(tmp_path, schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}], keep=keep)
    study.run({"1M": 0.4, "2M": 0.3, "full": 0.5})
    assert study.store.freed_bytes() == freed
    assert study.whole(study.proposals.space.trial(study.proposals.space.listed()[0])) >= {"backbone"}


def test_what_an_unfinished_trial_needs_stays_until_it_has_its_row(tmp_path: Path) -> None:
    """The pruned model of a beaten trial is trained by the next."""
    study = Study(tmp_path, schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}, {"drop_mlp": 2, "recover": True}])
    scores = {"full": 0.5, "1M": 0.4, "2M": 0.3, "2M+ft": 0.45}
    study.run(ndcg=scores, until="2M+ft")
    pruned = study.proposals.space.trial(study.proposals.space.schedules[1])
    assert study.whole(pruned) == EVERYTHING - {"embeddings"}
    study.proposals.take_back()
    study.run(ndcg=scores)
    trained = study.proposals.space.trial(study.proposals.space.schedules[2])
    assert study.whole(pruned) == EVERYTHING - {"embeddings", "pruned"}
    assert study.whole(trained) == EVERYTHING - {"pruned"} | {"recovered"}


def test_what_a_stopped_training_goes_on_from_stays_while_it_may(tmp_path: Path) -> None:
    drops = [{"drop_mlp": [layer], "recover": True} for layer in range(3)]
    training = TRAINING | {"steps": 8}
    halving = {"factor": 2, "rungs": 3}
    study = Study(tmp_path, schedules=drops, recovery=training, strategy="halving", halving=halving)
    scores = {"full": 0.5} | {
        f"M[{layer}]+ft{at}": 0.1 * layer for layer in range(3) for at in ("@2", "@4", "")
    }

    def states() -> list[str]:
        space = study.proposals.space
        parts = [part for drop in space.schedules for part in space.rungs(space.trial(drop))]
        stages = {part.name: trial_stages(part, study.sources, "dev") for part in parts}
        return sorted(
            name
            for name, own in stages.items()
            if any((stage.path(study.store) / STATE).exists() for stage in own)
        )

    study.run(scores, until="M[2]+ft@4")
    assert states() == ["M[0]+ft@2", "M[1]+ft@2", "M[2]+ft@2"], "nothing is decided before all are there"
    study.proposals.take_back()
    study.run(scores, until="M[2]+ft")
    study.collector.collect()
    assert states() == ["M[2]+ft@2", "M[2]+ft@4"]
    study.proposals.take_back()
    study.run(scores)
    assert states() == []


def test_a_killed_deletion_is_finished_by_the_next(tmp_path: Path) -> None:
    stages, place = StageStore(tmp_path), tmp_path / "pruned" / "abc"
    (place / "checkpoint").mkdir(parents=True)
    (place / "checkpoint" / "weights").write_bytes(bytes(100))
    stages.free(place, "checkpoint")
    assert (place / "checkpoint").exists()  # not complete: it is not touched
    (place / "stage.json").write_text("{}")
    stages.free(place, "checkpoint")
    assert not (place / "checkpoint").exists() and not stages.has(place)
    (place / "checkpoint").mkdir()
    (place / "checkpoint" / "weights").write_bytes(bytes(10))
    stages.free(place, "checkpoint")
    assert not (place / "checkpoint").exists()
    assert stages.freed_bytes() == 100


def test_a_study_that_kept_everything_is_cleaned_later(tmp_path: Path) -> None:
    out = tmp_path / "study"
    study = Study(out, schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}], keep="all", real=True)
    study.run({"1M": 0.4, "2M": 0.3, "full": 0.5})
    first, second = (study.proposals.space.trial(candidate) for candidate in study.proposals.space.schedules)
    assert study.whole(second) == EVERYTHING
    kept = study.collector.kept_bytes()
    done = clean(out)
    assert done.freed_bytes == 200 and done.kept_bytes == kept - 200
    assert study.whole(second) == EVERYTHING - {"pruned", "embeddings"}
    assert study.whole(first) == study.whole(first, "test") == EVERYTHING
    assert not (out / "stages" / "locks").exists()
    assert clean(out).freed_bytes == 0
    assert clean(out, keep="none").kept_bytes == 0
    record = (out / "study.json").read_text()
    (out / "study.json").write_text(record.replace(study.sources.dataset, "0" * 64))
    with pytest.raises(InputError, match="what the study reads has changed since it began"):
        clean(out)
    (out / "study.json").write_text(record)
    with pytest.raises(InputError, match=r"holds no study \(no study\.json\)"):
        clean(tmp_path)
    with exclusive(Mirror(out)), pytest.raises(InputError, match="another search is running"):
        clean(out)
