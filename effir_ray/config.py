"""What every YAML and JSON configuration shares: frozen, typed, and precise about mistakes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from effir_ray.errors import InputError
from effir_ray.readers import parse_yaml, quoted, read_text
from effir_ray.storage import check_no_credentials, redacted

_LARGEST = 2**53
"""Above it floats, and so JSON of others, no longer tell whole numbers apart."""

_PROBLEMS_SHOWN = 3


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What every random generator takes: NumPy's ends there."""

Length = Annotated[int, Field(ge=2, le=2**20)]
"""Tokens of one text."""


def _without_credentials(place: str) -> str:
    try:
        check_no_credentials(place, "it")
    except InputError as error:
        raise ValueError(str(error)) from None
    return place


Place = Annotated[str, AfterValidator(_without_credentials)]
"""A name, path or URI of data or of a model: it is written to rows and configurations."""


class Config(BaseModel):
    """Base of all configuration objects: immutable, unknown keys are errors, and numbers are finite.

    Errors say no values: what was refused may be somebody's key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


def says_nothing(value: Any) -> bool:
    """``exclude_if`` of a field that came later: where it says nothing, configurations keep their ids."""
    return value is None or value in ((), 0)


def check_different(names: Iterable[Any], *, fix: str = "") -> None:
    """Raise ValueError where one of ``names`` is there twice."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"'{twice}' is named twice{fix}")


class Prompts(Config):
    """What is put before every query and every document, as it is: ``"Instruct: ...\\nQuery: "``."""

    query: str = Field(default="", max_length=10_000)
    document: str = Field(default="", max_length=10_000)


C = TypeVar("C", bound=Config)


def load_yaml(path: Path, model: type[C]) -> C:
    """Read ``path`` into ``model``.

    Raises InputError naming file, line and field; for an unknown key also the nearest key that exists.
    """
    data, node = parse_yaml(read_text(path), str(path))
    return parse(data, model, source=str(path), node=node)


def parse(data: Any, model: type[C], *, source: str, node: yaml.Node | None = None) -> C:
    """Validate ``data``; ``source`` (a file or a command-line option) opens every error message."""
    if not isinstance(data, dict):
        raise InputError(f"{source}: found {quoted(data)}; expected a mapping of settings")
    strict = model.model_config.get("extra") == "forbid"
    if strict and data and not model.model_fields.keys() & data.keys():
        known = ", ".join(sorted(model.model_fields))
        nearest = difflib.get_close_matches(str(next(iter(data))), model.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {known}"
        raise InputError(f"{source}: none of its keys is a setting; {hint}")
    _check_numbers(data, source, node, ())
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, model, source, node) for problem in error.errors()]
        more = len(problems) - _PROBLEMS_SHOWN
        shown = "; ".join(problems[:_PROBLEMS_SHOWN])
        raise InputError(f"{shown}; and {more} more" if more > 0 else shown) from None


def _check_numbers(value: Any, source: str, node: yaml.Node | None, location: tuple[int | str, ...]) -> None:
    if isinstance(value, dict | list | tuple):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            _check_numbers(inner, source, node, (*location, key))
    elif isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:  # NaN too
        raise InputError(
            f"{_place(source, node, location)}: {_field(location)} is {quoted(value)}; expected a finite "
            "number of at most 9e15"
        )


def _place(source: str, node: yaml.Node | None, location: tuple[int | str, ...]) -> str:
    line = _line_of(node, location)
    return source if line is None else f"{source}:{line}"


def _field(location: tuple[int | str, ...]) -> str:
    """The dotted name of a setting, without what a stranger's file could make long."""
    return ".".join(quoted(part)[1:-1] if isinstance(part, str) else str(part) for part in location)


def _describe(problem: Any, model: type[BaseModel], source: str, node: yaml.Node | None) -> str:
    location: tuple[int | str, ...] = problem["loc"]
    where, field = _place(source, node, location), _field(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1])[:100], known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key '{field}'; {hint}"
    message = " ".join(str(problem["msg"]).removeprefix("Value error, ").split())
    value = problem["input"]
    shown = quoted(redacted(value) if isinstance(value, str) else value)
    given = "" if problem["type"] == "missing" else f" (found {shown})"
    return f"{where}: {field or 'settings'}: {message}{given}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the (nested) model at ``location``; list indices and union tags are passed over."""
    current = model
    for part in location:
        info = current.model_fields.get(str(part))
        if info is not None:
            current = _model_in(info.annotation) or current
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _line_of(node: yaml.Node | None, location: tuple[int | str, ...]) -> int | None:
    """1-based line of the deepest node on the way to ``location``."""
    line: int | None = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
