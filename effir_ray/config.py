"""What every YAML and JSON configuration shares: frozen, typed, and precise about mistakes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from effir_ray.errors import InputError


class Config(BaseModel):
    """Base of all configuration objects: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


def load_yaml(path: Path, model: type[C]) -> C:
    """Read ``path`` into ``model``.

    Raises InputError naming file, line and field; for an unknown key also the nearest key that exists.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    return parse(data, model, source=str(path), node=node)


def parse(data: dict[str, Any], model: type[C], *, source: str, node: yaml.Node | None = None) -> C:
    """Validate ``data``; ``source`` (a file or a command-line option) opens every error message."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_describe(problem, model, source, node) for problem in error.errors()]
        raise InputError("\n".join(lines)) from None


def _describe(problem: Any, model: type[BaseModel], source: str, node: yaml.Node | None) -> str:
    location: tuple[int | str, ...] = problem["loc"]
    line = _line_of(node, location)
    where = source if line is None else f"{source}:{line}"
    field = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key '{field}'; {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = "" if problem["type"] == "missing" else f" (found {problem['input']!r})"
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
