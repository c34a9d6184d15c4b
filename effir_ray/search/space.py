"""A search space: backbones, data sets, one way to train and measure, and the schedules to try.

``SearchSpace`` is the YAML a user writes; together with one ``Candidate`` it becomes a ``TrialConfig``, the
one object that determines everything a trial does and that every result row carries.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from effir_ray.compression.schedule import CALIBRATION, Calibration, GateTraining, Schedule
from effir_ray.config import Config, Length, Place, Prompts, Seed, check_different, parse, says_nothing
from effir_ray.errors import InputError
from effir_ray.hardware import Precision
from effir_ray.readers import parse_json
from effir_ray.results.conditions import Condition, condition
from effir_ray.results.schema import (
    DEFAULT_OBJECTIVES,
    DIRECTIONS,
    OBJECTIVES_ACROSS_BACKBONES,
    RELATIVE,
    Direction,
    TrialRow,
    mean_of,
)
from effir_ray.search.candidates import MOST_VALUES, Axis, Candidate, Parameters
from effir_ray.search.elastic import Elastic, ElasticTraining, removes, smallest
from effir_ray.search.halving import Halving
from effir_ray.training.config import STUDY_TEACHER, TrainConfig

SamplerName = Literal["tpe", "nsga2", "gp", "grid", "random"]
StrategyName = Literal["independent", "halving", "elastic"]

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
        data = _with_first(data, "dataset", "datasets")
        return _with_trainings(data, data)

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


def _with_first(given: Mapping[str, Any], one: str, many: str) -> dict[str, Any]:
    """``one`` is the first of ``many``."""
    several = given.get(many)
    if not isinstance(several, list | tuple) or not several:
        return dict(given)  # what is no list is refused where its type is checked
    if given.get(one, several[0]) != several[0]:
        raise ValueError(f"give '{one}' or '{many}', not both")
    return {**given, one: several[0]}


def _with_trainings(given: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, Any]:
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


class Backbone(Config):
    """One of several backbones of a study, with what it has of its own; the rest is the study's."""

    backbone: Place
    first_blocks: int | None = Field(default=None, ge=1, le=1024)
    prompts: Prompts | None = None
    query_max_length: Length | None = None
    document_max_length: Length | None = None
    base_training: TrainConfig | None = None
    recovery: TrainConfig | None = None


def _backbone(value: Any) -> Any:
    return {"backbone": value} if isinstance(value, str) else value


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


class Budget(Config):
    """When a study stops proposing: what runs ends, and the front is still tested.

    hours: of one run, by the clock; a resumed study begins to count anew
    device_hours: of the whole study, each trial's seconds times the workers they were spent on
    """

    hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    device_hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Resources(Config):
    """``gpus``: the share of a GPU that a stage in one process reserves, so that several trials compute on
    one beside each other; speed is always measured on a whole one. Workers of trainings and of encoding take
    one each."""

    gpus: float = Field(default=1.0, gt=0, le=1)


class SearchSpace(StudySettings):
    """A study. ``schedules`` always run (by halving, they always begin), first and in order, after the full
    model; the ``sampler`` then proposes ``trials`` more from ``parameters`` (grid: all combinations) until
    the ``budget`` is spent.

    priors: folders of earlier results, also of other backbones, and ``published``, the paper's table:
    schedules of their fronts, by relative depth, are the first of ``trials``
    objectives: columns of a dev row that the sampler improves and the front is made of
    constraints: conditions such as ``parameters <= 5e7`` that a model on the front meets. What follows from a
    schedule (sizes, FLOPs) is checked before it runs, what is measured is told to the sampler
    backbones: several in the place of ``backbone``, each by its name or with settings of its own. Schedules
    run on each, or on the ``backbone`` they name; the sampler chooses one for each of its trials
    seeds: several in the place of ``seed``. The search has the first; its front, and the full models, are
    then measured with each of the others too
    strategy: what a trained trial may cost. ``independent``: all steps of ``recovery``, each. ``halving``:
    all begin with few, and only the better ones go on, from their checkpoints (``halving`` says how many).
    ``elastic``: all are cut from one model that was trained as all of them at once (``elastic`` says for how
    long), which is the first rung; the better ones train on from there
    keep: of which trials the models and embeddings are kept once their rows exist
    device: what all stages compute on; ``auto``: GPUs where there are any when the study begins
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    backbones: tuple[Annotated[Backbone, BeforeValidator(_backbone)], ...] = ()
    seeds: tuple[Seed, ...] = Field(default=(), max_length=100)
    schedules: tuple[Candidate, ...] = Field(default=(), max_length=MOST_VALUES)
    parameters: Parameters = Parameters()
    sampler: SamplerName = "tpe"
    strategy: StrategyName = "independent"
    halving: Halving = Halving()
    elastic: ElasticTraining = ElasticTraining()
    trials: int = Field(default=0, ge=0, le=10**6)
    priors: tuple[Place, ...] = Field(default=(), max_length=100)
    budget: Budget = Budget()
    objectives: tuple[str, ...] = Field(default=DEFAULT_OBJECTIVES, min_length=1, max_length=len(DIRECTIONS))
    constraints: tuple[str, ...] = Field(default=(), max_length=len(DIRECTIONS))
    concurrency: int = Field(default=1, ge=1, le=4096)
    keep: Literal["front", "all", "none"] = "front"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _of_several(cls, data: Any) -> Any:
        """``backbone``, ``dataset`` and ``seed`` are the first of several; of backbones no speed-up is an
        objective then, unless asked for."""
        if not isinstance(data, dict):
            return data
        data = _with_first(_with_first(data, "dataset", "datasets"), "seed", "seeds")
        several = data.get("backbones")
        if not isinstance(several, list | tuple) or not several:
            return data
        entries = [
            _with_trainings(entry, data) if isinstance(entry, dict) else entry
            for entry in map(_backbone, several)
        ]
        head, usual = entries[0], data.get("backbone")  # what is neither is refused where its type is checked
        first = head.get("backbone") if isinstance(head, dict) else getattr(head, "backbone", usual)
        if data.get("backbone", first) != first:
            raise ValueError("give 'backbone' or 'backbones', not both")
        objectives = {"objectives": OBJECTIVES_ACROSS_BACKBONES} if len(entries) > 1 else {}
        return {**objectives, **data, "backbone": first, "backbones": entries}

    @field_validator("backbones")
    @classmethod
    def _different(cls, several: tuple[Backbone, ...]) -> tuple[Backbone, ...]:
        names = (entry.backbone for entry in several)
        check_different(names, fix="; give one of them as a folder of another name")
        return several

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, several: tuple[int, ...]) -> tuple[int, ...]:
        check_different(several)
        return several if len(several) > 1 else ()

    @field_validator("objectives")
    @classmethod
    def _measured(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in DIRECTIONS:
                raise ValueError(f"objective '{name}' is not measured; choose from {', '.join(DIRECTIONS)}")
        check_different(names)
        return names

    @field_validator("constraints")
    @classmethod
    def _readable(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for text in texts:
                condition(text)
        except InputError as error:
            raise ValueError(str(error)) from None
        return texts

    @model_validator(mode="after")
    def _halves_steps(self) -> SearchSpace:
        for name in self.backbone_names:
            for field, training in self.of(name).trainings.items():
                if training.stop_after is not None:
                    raise ValueError(f"{field}.stop_after is for the strategy to set: leave it out")
        trainings = [own for name in self.backbone_names if (own := self.of(name).recovery) is not None]
        if self.strategy == "independent":
            return self
        if not trainings:
            raise ValueError(f"strategy {self.strategy} stops trainings early, and there is no 'recovery'")
        for training in trainings:
            if training.steps is None:
                raise ValueError(
                    f"strategy {self.strategy} divides the steps of 'recovery': give 'steps', not 'epochs'"
                )
            if training.dev is not None:
                raise ValueError(
                    f"strategy {self.strategy} compares the trials itself: leave recovery.dev out"
                )
            if not self.halving.steps(training.steps):
                raise ValueError(
                    f"{training.steps} steps of 'recovery' are too few for a rung of {self.halving.factor} "
                    "times fewer"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> SearchSpace:
        axes = self.axes
        if self.sampler == "grid":
            if self.trials or self.priors:
                given = "trials" if self.trials else "priors"
                raise ValueError(f"sampler grid runs every combination: leave '{given}' out")
            endless = [name for name, axis in axes.items() if not axis.values()]
            if endless:
                raise ValueError(f"sampler grid needs choices or a step for {', '.join(endless)}")
            combinations = math.prod(len(axis.values()) for axis in axes.values())
            if combinations > MOST_VALUES:
                raise ValueError(f"sampler grid has {combinations} combinations; at most {MOST_VALUES} run")
        elif self.priors and not self.trials:
            raise ValueError("'priors' are the first of the sampler's trials: set 'trials' and 'parameters'")
        elif self.trials and not self.parameters.axes:
            raise ValueError(f"{self.trials} trials are asked for, but 'parameters' gives nothing to vary")
        elif self.parameters.axes and not self.trials:
            raise ValueError(
                f"'parameters' are given but no trials for sampler {self.sampler}: set 'trials', "
                "or 'sampler: grid'"
            )
        names = self.backbone_names
        for candidate in self.schedules:
            if candidate.backbone not in (None, *names):
                raise ValueError(
                    f"schedule {candidate.name} is of backbone '{candidate.backbone}'; the study's are "
                    f"{', '.join(names)}"
                )
        asked = {
            name
            for candidate in self.schedules
            if candidate.recover
            for name in self._backbones_of(candidate)
        }
        if axes.get("recover") and True in axes["recover"].values():
            asked |= set(names)
        if any(self.of(name).recovery is None for name in asked):
            raise ValueError("a schedule asks to recover, but 'recovery' (training settings) is missing")
        relative = [name for name in self.objectives if name in RELATIVE]
        if relative and len(names) > 1:
            raise ValueError(
                f"objective {relative[0]} compares a model with its own full one, which says nothing between "
                f"backbones; take {', '.join(OBJECTIVES_ACROSS_BACKBONES)}"
            )
        return self

    @model_validator(mode="after")
    def _shares_one_training(self) -> SearchSpace:
        if self.strategy == "elastic" and not removes(self._smallest):
            raise ValueError(
                "strategy elastic trains what is left of a model; no schedule that recovers drops or narrows "
                "anything"
            )
        if self.strategy == "elastic" and self.elastic.shapes and not self._smallest.narrows:
            raise ValueError(
                "elastic.shapes are of other widths, and no schedule that recovers narrows anything"
            )
        return self

    @property
    def backbone_names(self) -> tuple[str, ...]:
        return tuple(entry.backbone for entry in self.backbones) or (self.backbone,)

    def title(self, schedule: str, backbone: str) -> str:
        """How a trial is called beside the study's others."""
        return schedule if len(self.backbones) < 2 else f"{schedule} of {backbone}"

    def of(self, backbone: str | None) -> SearchSpace:
        """With the settings of one of its backbones; None: of its only one."""
        wanted = self.backbone if backbone is None else backbone
        entry = next((entry for entry in self.backbones if entry.backbone == wanted), None)
        if entry is None:
            return self
        own = {name: getattr(entry, name) for name in Backbone.model_fields}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})

    def _backbones_of(self, candidate: Candidate) -> tuple[str | None, ...]:
        one = len(self.backbones) < 2 or candidate.backbone is not None
        return (candidate.backbone,) if one else self.backbone_names

    @property
    def axes(self) -> dict[str, Axis]:
        """What the sampler varies: ``parameters``, and the backbone where there are several."""
        axes = self.parameters.axes
        if axes and len(self.backbones) > 1:
            axes["backbone"] = Axis(choices=self.backbone_names)
        return axes

    @property
    def directions(self) -> dict[str, Direction]:
        """Objective -> which way is better."""
        return {name: DIRECTIONS[name] for name in self.objectives}

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """``constraints``, read."""
        return tuple(condition(text) for text in self.constraints)

    def always(self) -> tuple[Candidate, ...]:
        """The candidates that run whatever the constraints say: the full model and ``schedules``."""
        everything = (
            candidate.model_copy(update={"backbone": name})
            for candidate in (Candidate(), *self.schedules)
            for name in self._backbones_of(candidate)
        )
        return tuple(dict.fromkeys(candidate.canonical() for candidate in everything))

    def listed(self) -> tuple[Candidate, ...]:
        """The candidates known from the start: ``always()``, and the combinations of a grid."""
        grid = self.grid() if self.sampler == "grid" else ()
        everything = itertools.chain(self.always(), (candidate.canonical() for candidate in grid))
        return tuple(dict.fromkeys(everything))

    def grid(self) -> Iterator[Candidate]:
        axes = self.axes
        for values in itertools.product(*(axis.values() for axis in axes.values())):
            yield Candidate(**dict(zip(axes, values, strict=True)))

    def rungs(self, config: TrialConfig) -> tuple[TrialConfig, ...]:
        """What runs of a trial, one after the other, as long as it is among the better ones; at whichever of
        them ``config`` is. The last is the whole trial."""
        whole = config.until(None)
        if self.strategy == "independent" or whole.recovery is None:
            return (whole,)
        assert whole.recovery.steps is not None  # see ``_halves_steps``
        stops = self.halving.steps(whole.recovery.steps)
        if whole.elastic is not None:
            stops = (0, *stops[1:])
        return (*(whole.until(steps) for steps in stops), whole)

    def trial(self, candidate: Candidate) -> TrialConfig:
        """The whole trial of a candidate."""
        candidate = candidate.canonical()
        own = self.of(candidate.backbone)
        shared = {name: getattr(own, name) for name in StudySettings.model_fields if name != "recovery"}
        recovery = own.recovery if candidate.recover else None
        precision = None if candidate.precision == "auto" else candidate.precision
        schedule = candidate.schedule()
        elastic = self.elastic_of(schedule, recovery)
        return TrialConfig(
            **shared, recovery=recovery, schedule=schedule, elastic=elastic, precision=precision
        )

    def elastic_of(self, schedule: Schedule, recovery: TrainConfig | None) -> Elastic | None:
        """What a trial with these is cut from besides its full model; None by another strategy."""
        if self.strategy != "elastic" or recovery is None or not removes(schedule):
            return None
        assert recovery.steps is not None  # see ``_halves_steps``
        return Elastic(
            steps=self.elastic.steps or recovery.steps,
            smallest=self._smallest,
            shapes=self.elastic.shapes > 0,
        )

    @cached_property
    def _smallest(self) -> Schedule:
        """The most that a trained trial removes. Raises ValueError where they do not go along one order."""
        sampled = Parameters() if self.sampler == "grid" else self.parameters
        return smallest(self.listed(), sampled)

    def __copy__(self) -> Self:
        """As for a trial's id."""
        copied = super().__copy__()
        copied.__dict__.pop("_smallest", None)
        return copied
