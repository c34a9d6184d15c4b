"""What a trial may be: a candidate, and the axes along which a sampler finds more of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from effir_ray.compression.schedule import Schedule
from effir_ray.config import Config
from effir_ray.hardware import Precision

MOST_VALUES = 10_000
"""Schedules, values of an axis or combinations of a grid: a study of more would not end."""


class Candidate(Schedule):
    """A schedule, whether the pruned model is fine-tuned again with the study's ``recovery`` settings, the
    ``precision`` it is served in (``auto``: what each machine chooses), and of which of the study's backbones
    it is (None: of its only one, or of each)."""

    recover: bool = False
    precision: Literal["auto", Precision] = Field(default="auto", exclude_if=lambda value: value == "auto")
    backbone: str | None = None

    @property
    def name(self) -> str:
        served = "" if self.precision == "auto" else f"+{self.precision}"
        return super().name + ("+ft" if self.recover else "") + served

    def canonical(self) -> Candidate:
        """Without the settings that change nothing, so that equal trials are recognised as equal."""
        inert: set[str] = set()
        if not self.narrows:
            inert |= {"width_method", "width_multiple"}
        counted = (
            drop for drop in (self.drop_attention, self.drop_mlp, self.drop_block) if isinstance(drop, int)
        )
        if not any(counted):
            inert.add("importance")
        return Candidate(**self.model_dump(exclude=inert))

    def schedule(self) -> Schedule:
        return Schedule(**self.model_dump(exclude={"recover", "precision", "backbone"}))


def _axis(value: Any) -> Any:
    """A plain list in the YAML is a list of choices; lists of layers or widths become ``"3,5"``,
    which Schedule reads."""
    if isinstance(value, list | tuple):
        return {
            "choices": [
                ",".join(map(str, v)) + "," * (len(v) == 1) if isinstance(v, list) else v for v in value
            ]
        }
    return value


class Axis(Config):
    """The values of one parameter: ``choices``, or a range with both ends included."""

    choices: tuple[bool | int | float | str, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        if self.choices is not None:
            if not self.choices or (self.low, self.high, self.step) != (None, None, None):
                raise ValueError("give a list of choices with at least one entry, or low and high")
        elif self.low is None or self.high is None or self.low > self.high:
            raise ValueError("a range needs low and high, low not above high")
        elif (count := self._count()) > MOST_VALUES:
            raise ValueError(f"a range of {count:.3g} values; take a larger step (at most {MOST_VALUES})")
        return self

    @property
    def integral(self) -> bool:
        return all(isinstance(end, int) for end in (self.low, self.high, self.step) if end is not None)

    def _count(self) -> float:
        """How many values a range has; 0 for a continuous one. Infinite where the step is next to nothing."""
        assert self.low is not None and self.high is not None
        step = self.step or (1 if self.integral else None)
        if step is None:
            return 0
        count = (self.high - self.low) / step + 1e-9
        return count if count > MOST_VALUES else int(count) + 1

    def values(self) -> tuple[Any, ...]:
        """Every value, or an empty tuple for a continuous range."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None and self.high is not None
        step = self.step or (1 if self.integral else None)
        if step is None:
            return ()
        return tuple(round(self.low + i * step, 10) for i in range(int(self._count())))

    def contains(self, value: Any) -> bool:
        """Whether the sampler could propose ``value``."""
        if self.values():
            return value in self.values()
        assert self.low is not None and self.high is not None
        return isinstance(value, int | float) and self.low <= value <= self.high


ParameterAxis = Annotated[Axis | None, BeforeValidator(_axis)]


class Parameters(Config):
    """The fields of a candidate that the sampler may vary."""

    drop_attention: ParameterAxis = None
    drop_mlp: ParameterAxis = None
    drop_block: ParameterAxis = None
    drop_last_blocks: ParameterAxis = None
    importance: ParameterAxis = None
    width_reduction: ParameterAxis = None
    layer_widths: ParameterAxis = None
    width_method: ParameterAxis = None
    vocabulary: ParameterAxis = None
    dimension: ParameterAxis = None
    recover: ParameterAxis = None
    precision: ParameterAxis = None

    @model_validator(mode="after")
    def _values_fit(self) -> Parameters:
        if self.width_reduction is not None and self.layer_widths is not None:
            raise ValueError("width_reduction and layer_widths exclude each other: vary one of them")
        for name, axis in self.axes.items():
            if name.startswith("drop_") and axis.choices is None and not axis.integral:
                raise ValueError(f"{name} counts sublayers: give low, high and step as whole numbers")
            if name == "layer_widths" and axis.choices is None:
                raise ValueError('layer_widths is one number a layer: give a list of choices ("": none)')
            for value in axis.values() or (axis.low, axis.high):
                try:
                    Candidate(**{name: value})
                except ValueError as error:
                    raise ValueError(f"{name}: {value!r} is not possible: {_reason(error)}") from None
        return self

    @property
    def axes(self) -> dict[str, Axis]:
        return {name: axis for name in type(self).model_fields if (axis := getattr(self, name)) is not None}


def _reason(error: ValueError) -> str:
    problems = getattr(error, "errors", None)
    return str(problems()[0]["msg"]).removeprefix("Value error, ") if problems else str(error)
