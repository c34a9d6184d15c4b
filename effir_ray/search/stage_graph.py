"""What a stage is, and the stages of a trial as data: keyed before anything runs.

A ``Stage`` is declared once (trial_stages.py). For a trial on a split it becomes a ``KeyedStage``: its own
inputs and those of its parents, by hash. Two trials share a stage exactly when its key is the same. Stages
that a trial does not need are left out, and the parent before them takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from effir_ray.results.query_scores import QueryScores
from effir_ray.search.trial_config import TrialConfig
from effir_ray.stages import StageStore

Split = Literal["dev", "test"]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a trial reads and where it computes. A dry run puts names in place of fingerprints and leaves the
    machine open: enough to see which stages are shared.

    backbone, dataset: fingerprints of the uncompressed model and of the data that is searched
    datasets: name -> fingerprint, where there are several, the first of which is ``dataset``
    calibration: of the texts that importance is measured on
    trainings: ``base_training`` and ``recovery`` -> the identity of each that there is
    device, dtype: what this machine computes on and in; machine: its full name
    """

    backbone: str
    dataset: str
    datasets: Mapping[str, str] = field(default_factory=dict)
    calibration: str = ""
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    machine: str = ""

    @property
    def contents(self) -> dict[str, str]:
        """What is read, by role: ``recovery.distillation.teacher`` -> its fingerprint."""
        trained = {
            f"{name}.{role}": str(content)
            for name, identity in self.trainings.items()
            for role, content in identity["contents"].items()
        }
        own = {"backbone": self.backbone, "dataset": "+".join(self.datasets.values()) or self.dataset}
        apart = {"calibration": self.calibration} if self.calibration != self.dataset else {}
        return {**own, **apart, **trained}

    def on(self, dataset: str) -> Sources:
        """Of what is scored on one of several data sets alone."""
        return replace(self, dataset=self.datasets[dataset], datasets={}) if self.datasets else self


def study_contents(sources: Mapping[str, Sources]) -> dict[str, str]:
    """What a study of one or several backbones reads, by role: of several each begins with its name."""
    if len(sources) == 1:
        return next(iter(sources.values())).contents
    return {
        f"{name}: {role}": content for name, own in sources.items() for role, content in own.contents.items()
    }


@dataclass(frozen=True, kw_only=True)
class StageTask:
    """One stage of one trial, to build in the folder ``out`` or to read there; ``parents``: role -> folder.

    ``config``: of a stage of each data set it names that one alone. ``inputs`` are those of its key.
    ``store`` keeps what the stage shares with other trials besides (mined negatives, teacher embeddings).
    """

    config: TrialConfig
    split: Split
    parents: Mapping[str, Path]
    out: Path
    store: StageStore
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def parent(self, role: str) -> Path:
        """Its folder, on this machine's disk."""
        return self.store.bring(self.parents[role])


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage is expected to take: ``start_seconds``, and ``tokens`` through the trial's model, forward
    (backward counts as two more), or through the full model if ``full_model``."""

    tokens: Callable[[TrialConfig], float] = lambda config: 0.0
    start_seconds: float = 2.0
    full_model: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything there is to know of one kind of stage.

    title: what the display says while it runs
    version: raised when the code changes what the folder holds; part of the key
    build: fills the folder; everything random in it comes from the configuration's seed
    needed: whether a trial has this stage
    inputs: what of the configuration and the sources determines the content, besides the parents
    parents: role -> names of stages, of which the first that the trial needs takes the role
    asked: whether a trial has the parent of a role
    on_device: it computes in one process, on a GPU where there is one; others start workers of their own
    computed_on: what else the bits depend on: the kind of ``device`` and its dtype, or the ``machine``
    columns: what a finished folder adds to the row; a stage that has some is an end of its own
    query_scores: what it knows of single queries, for the table beside the rows
    workers: how many workers it kept busy, on average
    exclusive: no two such stages run at once on one machine
    resumable: it goes on from what an interrupted run left in the folder
    shared: most trials find it built by another one
    each_dataset: of several data sets each has one of its own
    bulk: the folder in it that is large, and can go once every row that it leads to exists
    """

    name: str
    title: str
    build: Callable[[StageTask], None]
    inputs: Callable[[TrialConfig, Sources, Split], Mapping[str, Any]]
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asked: Callable[[TrialConfig, str], bool] = lambda config, role: True
    needed: Callable[[TrialConfig], bool] = lambda config: True
    version: int = 1
    on_device: Callable[[TrialConfig], bool] = lambda config: False
    computed_on: Literal["", "device", "machine"] = ""
    columns: Callable[[StageTask], Mapping[str, Any]] | None = None
    query_scores: Callable[[StageTask], QueryScores] | None = None
    workers: Callable[[StageTask], float] = lambda task: 1
    exclusive: bool = False
    resumable: bool = False
    shared: bool = False
    each_dataset: bool = False
    bulk: str | None = None
    cost: Cost = Cost()


@dataclass(frozen=True, kw_only=True)
class KeyedStage:
    """A stage of a certain trial, with the ``config`` that it is built from."""

    stage: Stage
    config: TrialConfig
    own: Mapping[str, Any]
    parents: Mapping[str, KeyedStage] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.stage.name

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {**self.own, **{role: parent.key for role, parent in self.parents.items()}}

    @cached_property
    def key(self) -> str:
        return self.path(StageStore(Path())).as_posix()

    def path(self, store: StageStore) -> Path:
        """Where it lies or would lie."""
        return store.path(self.name, self.inputs, version=self.stage.version)

    def lineage(self) -> Iterator[KeyedStage]:
        """Every stage below this one and itself, parents first, each once."""
        seen: dict[str, KeyedStage] = {}
        for parent in self.parents.values():
            seen |= {stage.key: stage for stage in parent.lineage()}
        yield from seen.values()
        yield self


def key_stages(
    stages: Sequence[Stage], config: TrialConfig, sources: Sources, split: Split
) -> list[KeyedStage]:
    """The ``stages`` that lead to a row of ``config`` on ``split``, in an order in which they can run.

    ``stages`` name their parents before themselves.
    """
    common: dict[str, KeyedStage] = {}
    apart: dict[str, dict[str, KeyedStage]] = {name: {} for name in config.dataset_names}
    for stage in stages:
        if not stage.needed(config):
            continue
        if stage.each_dataset:
            for name, keyed in apart.items():
                keyed[stage.name] = _keyed(
                    stage, config.on(name), sources.on(name), split, {**common, **keyed}
                )
        else:
            common[stage.name] = _keyed(stage, config, sources, split, common)
    everything = [*(last for keyed in apart.values() for last in keyed.values()), *common.values()]
    ends = [last for last in everything if last.stage.columns is not None]
    return list({stage.key: stage for end in ends for stage in end.lineage()}.values())


def _keyed(
    stage: Stage, config: TrialConfig, sources: Sources, split: Split, earlier: Mapping[str, KeyedStage]
) -> KeyedStage:
    own = dict(stage.inputs(config, sources, split)) | _computed_on(stage, sources)
    return KeyedStage(stage=stage, config=config, own=own, parents=_parents(stage, config, earlier))


def _parents(stage: Stage, config: TrialConfig, keyed: Mapping[str, KeyedStage]) -> dict[str, KeyedStage]:
    asked = {role: names for role, names in stage.parents.items() if stage.asked(config, role)}
    found = {role: next((n for n in names if n in keyed), None) for role, names in asked.items()}
    return {role: keyed[name] for role, name in found.items() if name is not None}


def _computed_on(stage: Stage, sources: Sources) -> dict[str, str]:
    if not stage.computed_on:
        return {}
    kind = {"device": sources.device, "dtype": sources.dtype}
    return kind | ({"machine": sources.machine} if stage.computed_on == "machine" else {})
