"""One way to train and measure, and what one trial does of it: ``TrialConfig``, the one object that
determines everything a trial does and that every result row carries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from effir_ray.compression.schedule import CALIBRATION, Calibration, GateTraining, Schedule
from effir_ray.config import Config, Length, Place, Prompts, Seed, check_different, parse, says_nothing
from effir_ray.hardware import Precision
from effir_ray.readers import parse_json
from effir_ray.results.schema import TrialRow, mean_of
from effir_ray.search.elastic import Elastic
from effir_ray.training.config import STUDY_TEACHER, TrainConfig

_ID_LENGTH = 12  # hex digits of a trial id


class Sample(Config):
    """How much of a split is used. Without numbers: every query over every document."""

    queries: int | None = Field(default=None, ge=1, le=10**9)
    documents: int | None = Field(default=None, ge=1, le=10**9)

    @model_validator(mode="after")
    def _both_or_none(self) -> Sample:
        if (self.queries is None) != (self.documents is None):
            raise ValueError("queries and documents are given together, or neither")
        return self


class Timing(Config):
    """Speed is measured on dev texts, once for all trials of a shape: the full model and the trial's take
    turns ``rounds`` times, or fewer (six at least) once the speed-up is known to 3 %."""

    queries: int = Field(default=64, ge=1, le=10**6)
    documents: int = Field(default=64, ge=1, le=10**6)
    rounds: int = Field(default=15, ge=1, le=1000)


class StudySettings(Config):
    """What all trials of a study have in common.

    prompts: before queries and documents, in the place of the backbone's own
    dataset: what models are scored on, are timed with, and learn from where a training names nothing else
    datasets: several in its place. Scores are means over them, which the rows of each stand beside; the first
    is what models learn from and are timed with
    seed: everything random in a trial (calibration, gates, training); sample_seed: which queries and
    documents ``dev`` and ``test`` draw, apart from it, so that trials of several seeds share them.
    """

    backbone: Place
    first_blocks: int | None = Field(default=None, ge=1, le=1024)
    prompts: Prompts | None = Field(default=None, exclude_if=says_nothing)
    dataset: Place
    datasets: tuple[Place, ...] = Field(default=(), exclude_if=says_nothing)
    dev: Sample = Sample()
    test: Sample = Sample()
    query_max_length: Length = 64
    document_max_length: Length = CALIBRATION.max_length
    encoding_workers: int = Field(default=1, ge=1, le=4096)
    calibration_texts: int = Field(default=CALIBRATION.texts, ge=1, le=10**7)
    calibration_from: Place | None = None
    gates: GateTraining = CALIBRATION.gates
    base_training: TrainConfig | None = None
    recovery: TrainConfig | None = None
    timing: Timing = Timing()
    threads: int = Field(default=0, ge=0, le=4096)
    seed: Seed = 0
    sample_seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _training_inherits(cls, data: Any) -> Any:
        """Training uses the study's data set and seed unless it names its own, and never what the study
        chooses by and reports: the dev and test queries of the study's data sets are held out."""
        if not isinstance(data, dict):
            return data
        data = with_first(data, "dataset", "datasets")
        return with_trainings(data, data)

    @field_validator("datasets")
    @classmethod
    def _different_data(cls, several: tuple[str, ...]) -> tuple[str, ...]:
        check_different(several)
        if odd := [name for name in several if ", " in name]:
            raise ValueError(f"'{odd[0]}': a name in a list of data sets has no comma; rename the folder")
        return several if len(several) > 1 else ()

    @model_validator(mode="after")
    def _training_is_the_studys(self) -> StudySettings:
        for name, training in self.trainings.items():
            if training.model is not None:
                raise ValueError(f"{name} trains the study's own models: leave 'model' out")
            if training.prompts is not None:
                raise ValueError(f"{name} trains with the study's prompts: leave 'prompts' out")
            if training.held_out_names != self.dataset_names:
                raise ValueError(f"{name} holds out the study's data: leave 'held_out' out")
        if self.base_training is not None and self.base_training.distillation.teacher == STUDY_TEACHER:
            raise ValueError(
                f"base_training makes the study's full model, which is '{STUDY_TEACHER}': name another"
            )
        return self

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Field -> the training that stands there."""
        named = {"base_training": self.base_training, "recovery": self.recovery}
        return {name: training for name, training in named.items() if training is not None}

    @property
    def dataset_names(self) -> tuple[str, ...]:
        return self.datasets or (self.dataset,)

    @property
    def measured_on(self) -> str:
        """What the rows that decide have as their data set."""
        return mean_of(self.datasets) if self.datasets else self.dataset

    def on(self, dataset: str) -> Self:
        """The same, scored on one of its data sets alone."""
        return self.model_copy(update={"dataset": dataset, "datasets": ()}) if self.datasets else self

    @property
    def calibration(self) -> Calibration:
        """What importance and neuron scores are measured on."""
        return Calibration(
            dataset=self.dataset,
            texts=self.calibration_texts,
            texts_from=self.calibration_from,
            gates=self.gates,
            max_length=self.document_max_length,
            seed=self.seed,
        )


def with_first(given: Mapping[str, Any], one: str, many: str) -> dict[str, Any]:
    """``one`` is the first of ``many``."""
    several = given.get(many)
    if not isinstance(several, list | tuple) or not several:
        return dict(given)  # what is no list is refused where its type is checked
    if given.get(one, several[0]) != several[0]:
        raise ValueError(f"give '{one}' or '{many}', not both")
    return {**given, one: several[0]}


def with_trainings(given: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` settings, whose trainings take what they leave out from the ``study``."""
    shared = {name: study[name] for name in ("dataset", "seed") if name in study}
    several = study.get("datasets")
    held_out: dict[str, Any] = {"held_out": study.get("dataset")}
    if isinstance(several, list | tuple) and len(several) > 1:
        held_out = {"held_out": tuple(several)}
    training: dict[str, Any] = {}
    for name in ("base_training", "recovery"):
        settings = given.get(name)
        if isinstance(settings, dict):
            training[name] = {**shared, **held_out, **settings}
        elif isinstance(settings, TrainConfig) and settings.held_out is None:
            training[name] = settings.model_copy(update=held_out)
    return {**given, **training}


class TrialConfig(StudySettings):
    """Everything that determines a trial. ``recovery`` is set only if this trial is trained after pruning;
    ``elastic`` only if it is cut from a model that was trained for all trials together; ``threads`` is the
    number of compute threads the study resolved; ``precision`` is what texts are embedded in, where the
    machine does not choose it."""

    schedule: Schedule
    elastic: Elastic | None = Field(default=None, exclude_if=says_nothing)
    precision: Precision | None = Field(default=None, exclude_if=says_nothing)

    @classmethod
    def of(cls, row: TrialRow) -> TrialConfig:
        """That of a row. Raises InputError for one that another version wrote, or nobody."""
        return _of_row(row.trial, row.trial_id)

    @classmethod
    def read(cls, text: str, source: str) -> TrialConfig:
        """From JSON that lies in ``source``, which InputError names."""
        return parse(parse_json(text, source), cls, source=source)

    def __copy__(self) -> Self:
        """``model_copy`` changes what it copies: the id of the original is not its own."""
        copied = super().__copy__()
        copied.__dict__.pop("id", None)
        return copied

    @cached_property
    def id(self) -> str:
        """The same on every machine for configurations that come to the same: how many workers encode makes
        no difference to a bit."""
        settings = self.model_dump(mode="json") | {"encoding_workers": 1}
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:_ID_LENGTH]

    @property
    def name(self) -> str:
        served = f"+{self.precision}" if self.precision else ""
        begun = "" if self.elastic is None else "+el"
        if self.recovery is None or self.recovery.stop_after == 0:
            return self.schedule.name + begun + served
        stopped = self.recovery.stop_after
        return f"{self.schedule.name}{begun}+ft" + (f"@{stopped}" if stopped else "") + served

    @property
    def ordered_by(self) -> Schedule:
        """What sublayers and neurons are put in order for: the schedule, or the one training of them all."""
        return self.schedule if self.elastic is None else self.elastic.smallest

    def until(self, steps: int | None) -> TrialConfig:
        """The same trial, its recovery ended after so many steps, 0: before it; None: after all."""
        if self.recovery is None or self.recovery.stop_after == steps:
            return self
        return self.model_copy(update={"recovery": self.recovery.model_copy(update={"stop_after": steps})})

    def with_seed(self, seed: int) -> TrialConfig:
        """The same trial with another seed; a training with a seed of its own keeps it."""
        changes: dict[str, Any] = {"seed": seed}
        for name, training in self.trainings.items():
            if training.seed == self.seed:
                changes[name] = training.model_copy(update={"seed": seed})
        return self.model_copy(update=changes)

    def full(self) -> TrialConfig:
        """The uncompressed model of the same study: the reference for sizes and speeds."""
        none = dict.fromkeys(("recovery", "elastic", "precision"))
        return self.model_copy(update={"schedule": Schedule(), **none})


@lru_cache(maxsize=8192)
def _of_row(trial: str, identifier: str) -> TrialConfig:
    """A driver asks for those of the front at every row."""
    return TrialConfig.read(trial, f"the row of trial {identifier}")
