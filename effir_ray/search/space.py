"""A search space: backbones, data sets, one way to train and measure, and the schedules to try.

``SearchSpace`` is the YAML a user writes; together with one ``Candidate`` it becomes a ``TrialConfig``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from effir_ray.compression.schedule import Schedule
from effir_ray.config import Config, Length, Place, Prompts, Seed, check_different
from effir_ray.errors import InputError
from effir_ray.results.conditions import Condition, condition
from effir_ray.results.schema import (
    DEFAULT_OBJECTIVES,
    DIRECTIONS,
    OBJECTIVES_ACROSS_BACKBONES,
    RELATIVE,
    Direction,
)
from effir_ray.search.candidates import MOST_VALUES, Axis, Candidate, Parameters
from effir_ray.search.elastic import Elastic, ElasticTraining, removes, smallest
from effir_ray.search.halving import Halving
from effir_ray.search.trial_config import StudySettings, TrialConfig, with_first, with_trainings
from effir_ray.training.config import TrainConfig

SamplerName = Literal["tpe", "nsga2", "gp", "grid", "random"]
StrategyName = Literal["independent", "halving", "elastic"]


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
        data = with_first(with_first(data, "dataset", "datasets"), "seed", "seeds")
        several = data.get("backbones")
        if not isinstance(several, list | tuple) or not several:
            return data
        entries = [
            with_trainings(entry, data) if isinstance(entry, dict) else entry
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
        if self.strategy == "elastic" and not removes(self.least):
            raise ValueError(
                "strategy elastic trains what is left of a model; no schedule that recovers drops or narrows "
                "anything"
            )
        if self.strategy == "elastic" and self.elastic.shapes and not self.least.narrows:
            raise ValueError(
                "elastic.shapes are of other widths, and no schedule that recovers narrows anything"
            )
        return self

    @property
    def added(self) -> int:
        """The most trials that are not listed from the start: the sampler's, and what a solver finds."""
        return self.trials + (self.elastic.shapes if self.strategy == "elastic" else 0)

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
            smallest=self.least,
            shapes=self.elastic.shapes > 0,
        )

    @cached_property
    def least(self) -> Schedule:
        """The most that a trained trial removes. Raises ValueError where they do not go along one order."""
        sampled = Parameters() if self.sampler == "grid" else self.parameters
        return smallest(self.listed(), sampled)

    def __copy__(self) -> Self:
        """As for a trial's id."""
        copied = super().__copy__()
        copied.__dict__.pop("least", None)
        return copied
