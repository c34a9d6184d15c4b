"""The stages of a trial as data: what each is made of, before anything runs.

    backbone -> base -> importance -> neurons -> pruned -> recovered -> embeddings -> scores
                                                                    \\-> timing

Two trials share a stage exactly when its name and inputs are equal; a parent enters by its own hash. Stages a
schedule does not need are left out: nothing pruned means no importance, no width removed means no neuron
scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from effir_ray.compression.planning import needs_scores
from effir_ray.compression.schedule import Schedule
from effir_ray.search.space import TrialConfig
from effir_ray.stages import StageStore

Split = Literal["dev", "test"]

_KEYS = StageStore(Path())  # only computes names; nothing is written
_DEPTH = {"drop_attention", "drop_mlp", "drop_block", "drop_last_blocks"}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the backbone and the data sets are, by content. A dry run puts their names here instead."""

    backbone: str
    datasets: Mapping[str, str]  # name -> fingerprint


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    own: Mapping[str, Any]
    parents: Mapping[str, Stage] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {**self.own, **{role: parent.key for role, parent in self.parents.items()}}

    @cached_property
    def key(self) -> str:
        return f"{self.name}/{_KEYS.path(self.name, self.inputs).name}"

    def lineage(self) -> Iterator[Stage]:
        """Every stage below this one and itself, parents first, each once."""
        seen: dict[str, Stage] = {}
        for parent in self.parents.values():
            seen |= {stage.key: stage for stage in parent.lineage()}
        yield from seen.values()
        yield self


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The stages of one trial on one split."""

    base: Stage
    model: Stage
    scores: Stage
    timing: Stage

    def stages(self) -> list[Stage]:
        """In an order in which they can run, each once."""
        ordered = {stage.key: stage for last in (self.scores, self.timing) for stage in last.lineage()}
        return list(ordered.values())


def recipe(config: TrialConfig, sources: Sources, split: Split) -> Recipe:
    data = sources.datasets[config.dataset]
    backbone = Stage(name="backbone", own={"backbone": sources.backbone, "first_blocks": config.first_blocks})
    base = _trained("base", backbone, config.base_training, config, sources)
    model = base if config.schedule == Schedule() else _pruned(config, base, data)
    model = _trained("recovered", model, config.recovery, config, sources)
    sample = {
        "data": data,
        "split": split,
        "sample": getattr(config, split).model_dump(),
        "seed": config.seed,
    }
    embeddings = Stage(
        name="embeddings", own={**sample, "max_length": config.document_max_length}, parents={"model": model}
    )
    scores = Stage(
        name="scores",
        own={"max_length": config.query_max_length},
        parents={"model": model, "embeddings": embeddings},
    )
    lengths = {"query": config.query_max_length, "document": config.document_max_length}
    timing = Stage(
        name="timing",
        own={**sample, "split": "dev", "sample": config.dev.model_dump()}
        | {"lengths": lengths, "timing": config.timing.model_dump()},
        parents={"model": model, "reference": base},
    )
    return Recipe(base=base, model=model, scores=scores, timing=timing)


def _trained(name: str, parent: Stage, training: Any, config: TrialConfig, sources: Sources) -> Stage:
    if training is None:
        return parent
    own = {
        "training": training.model_dump(mode="json"),
        "data": sources.datasets[training.dataset],
        "held_out": sources.datasets[config.dataset],
    }
    return Stage(name=name, own=own, parents={"model": parent})


def _pruned(config: TrialConfig, base: Stage, data: str) -> Stage:
    schedule = config.schedule
    parents = {"model": base}
    if needs_scores(schedule):
        calibration = {
            "data": data,
            "texts": config.calibration_texts,
            "max_length": config.document_max_length,
        }
        if schedule.importance == "dev-loss":
            calibration["pairs"] = config.gates.pairs
        own = {**calibration, "criterion": schedule.importance, "seed": config.seed}
        parents["importance"] = Stage(name="importance", own=own, parents={"model": base})
    depth = schedule.model_dump(mode="json", include=_DEPTH)
    if schedule.width_reduction:
        own = {"depth": depth, "method": schedule.width_method, "gates": config.gates.model_dump()}
        own |= {"data": data, "max_length": config.document_max_length, "seed": config.seed}
        parents["neurons"] = Stage(name="neurons", own=own, parents=dict(parents))
    own = {"depth": depth, "width": schedule.width_reduction, "multiple": schedule.width_multiple}
    return Stage(name="pruned", own=own, parents=parents)
