"""Strict readers of text, YAML and JSON: what comes from outside is bounded before anything is made of it.

Every complaint is one line that opens with the file. None repeats what the file holds beyond a key or a
short number: the file may be one that its owner did not mean to show.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from effir_ray.errors import InputError

MAX_SETTINGS_BYTES = 256 * 1024
"""A settings file of people; PyYAML reads some 100 kB a second."""

MAX_JSON_BYTES = 64 * 2**20
"""The tensor index of the largest sharded checkpoints is a tenth of that."""

MAX_LINE_BYTES = 10 * 2**20
"""The longest line of any BEIR set is under 2 MB; longer means a file without line ends."""

MAX_DEPTH = 32
MAX_NODES = 50_000
"""Values in a settings file, those that anchors repeat counted each time."""

_LONGEST_NUMBER = 40  # characters; a float64 with sign, point and exponent has at most 24
_LONGEST_QUOTE = 40
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))
_TREE_TAGS = frozenset({"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})
_MERGE_TAG = "tag:yaml.org,2002:merge"
_DATE_TAG = "tag:yaml.org,2002:timestamp"


def quoted(value: Any) -> str:
    """``value`` for an error message: short, on one line, only its kind where it is no plain value."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_QUOTE else f"{value[:_LONGEST_QUOTE]}...")
    if isinstance(value, bool | float | None):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**_LONGEST_NUMBER else "a number of too many digits"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__


def open_regular(path: Path) -> io.BufferedReader:
    """``path`` opened for reading bytes; InputError unless it is an ordinary file.

    A pipe or a device would be waited for, or never end.
    """
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to returns at once.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
    except InputError:
        os.close(descriptor)
        raise
    return io.BufferedReader(io.FileIO(descriptor, "rb", closefd=True))


def check_regular(path: Path) -> None:
    """Raise InputError where ``path`` is something else than an ordinary file, for libraries that open it
    themselves; one that is missing is theirs to miss."""
    with contextlib.suppress(OSError, ValueError):
        _check_mode(path.stat().st_mode, path)


def _check_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise InputError(f"{path}: cannot be read: it is {kind}; expected an ordinary file")


def read_text(path: Path, *, limit: int = MAX_SETTINGS_BYTES) -> str:
    """The whole of a UTF-8 file of at most ``limit`` bytes; InputError for anything else."""
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise InputError(f"{path}: larger than {limit / 2**20:g} MiB; expected a small text file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text: byte 0x{raw[error.start]:02x} at {error.start}"
        ) from None


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, raw line) of every line that is not blank; InputError for one of more
    than ``MAX_LINE_BYTES``, before it is in memory.
    """
    with open_regular(path) as file:
        number = offset = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            check_line(len(raw), f"{path}:{number}")
            if not raw.isspace():
                yield number, offset, raw
            offset += len(raw)


def check_line(size: int, where: str) -> None:
    """Raise InputError for a line of too many bytes."""
    if size > MAX_LINE_BYTES:
        raise InputError(f"{where}: line longer than {MAX_LINE_BYTES >> 20} MiB; are line ends missing?")


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """One JSON document; InputError where it is missing, too large or too deep, or is not JSON.

    NaN, infinity, numbers of many digits and repeated keys are refused: other programs read them otherwise.
    """
    value = parse_json(read_text(path, limit=limit), str(path), unique=True)
    _check_depth(value, str(path))
    return value


def read_json_object(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """``read_json`` of a file that holds an object."""
    return json_object(read_json(path, limit=limit), str(path))


def json_object(value: Any, source: str) -> dict[str, Any]:
    """``value`` itself; InputError unless it is an object."""
    if not isinstance(value, dict):
        raise InputError(f"{source}: found {quoted(value)}; expected a JSON object")
    return value


def parse_json(text: str | bytes, source: str, *, unique: bool = False) -> Any:
    """``text`` as JSON, for documents and lines alike; ``source`` (a file, or file:line) opens the errors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            key = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
            raise InputError(f"{source}: the key {quoted(key)} is given twice; remove one of them")
        return found

    def number(digits: str) -> int:
        if len(digits) > _LONGEST_NUMBER:
            raise InputError(f"{source}: not valid JSON: a number of too many digits ({len(digits)})")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise InputError(f"{source}: a number is too large; numbers end at 1.8e308")
        return value

    def constant(name: str) -> NoReturn:
        raise InputError(f"{source}: {name} is no JSON number; expected a finite one")

    try:
        # json.loads itself would guess at encodings, and let halves of characters through
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(
            text,
            parse_int=number,
            parse_float=real,
            parse_constant=constant,
            object_pairs_hook=pairs if unique else None,
        )
        if "\\ud" in text or "\\uD" in text:
            check_characters(json.dumps(value, ensure_ascii=False), source)
        return value
    except RecursionError:
        raise InputError(f"{source}: not valid JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"{source}:{error.lineno}" if unique and error.lineno > 1 else source
        raise InputError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: not valid JSON: not UTF-8") from None


def check_characters(text: str, source: str) -> None:
    """Raise InputError for half of a surrogate pair, which JSON and YAML can escape ("\\ud83d"): it can be
    neither written nor printed, nor tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{source}: a text holds half of a surrogate pair; write the whole character"
        ) from None


def _check_depth(value: Any, source: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise InputError(f"{source}: nested more than {MAX_DEPTH} levels deep")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_yaml(text: str, source: str) -> tuple[dict[str, Any], yaml.Node]:
    """A YAML mapping of plain values, and the nodes it was made from (they know their lines).

    Raises InputError with file and line for repeated keys, unknown tags, bare dates, anchors that expand to
    more than ``MAX_NODES`` values, more than ``MAX_DEPTH`` levels, and what is not YAML.
    """
    try:
        loader = _Composer(text, source)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}.get(type(node), "nothing")
            raise InputError(f"{source}: expected a mapping of settings, found {kind}")
        _Check(source).size(node)
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise InputError(f"{source}{line}: not valid YAML: {_shortened(error.problem or '')}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {_shortened(getattr(error, 'reason', ''))}") from None


def _shortened(reason: str) -> str:
    """On one line, without the piece of the file that PyYAML adds."""
    return " ".join(reason.split())[:120] or "a character that YAML does not allow"


class _Composer(yaml.SafeLoader):
    """PyYAML's reader with an end to its recursion and one kind of error for values that do not fit."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.source, self.depth = source, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH:
            raise InputError(f"{self.source}:{self.line + 1}: nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            line, kind = node.start_mark.line + 1, node.tag.rpartition(":")[2]
            raise InputError(f"{self.source}:{line}: marked as {kind}, but it is none") from None


class _Check:
    """One walk over composed nodes, before any value is made of them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.known: dict[int, tuple[int, int]] = {}
        self.open: set[int] = set()

    def size(self, node: yaml.Node) -> tuple[int, int]:
        """(values, levels) of ``node`` with every alias written out."""
        if id(node) in self.known:
            return self.known[id(node)]
        if id(node) in self.open:
            raise self.refused(node, "an anchor that holds itself")
        self.open.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            self.scalar(node)
            inner: list[yaml.Node] = []
        elif node.tag not in _TREE_TAGS:
            raise self.refused(node, f"the unknown tag {quoted(node.tag)}; expected plain YAML")
        elif isinstance(node, yaml.MappingNode):
            self.keys(node)
            inner = [value for _, value in node.value]
        else:
            inner = list(node.value)
        sizes = [self.size(child) for child in inner]
        found = 1 + sum(values for values, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        if found[0] > MAX_NODES:
            raise self.refused(node, f"more than {MAX_NODES} values, with all anchors written out")
        if found[1] > MAX_DEPTH:
            raise self.refused(node, f"more than {MAX_DEPTH} levels, with all anchors written out")
        self.open.discard(id(node))
        self.known[id(node)] = found
        return found

    def scalar(self, node: yaml.ScalarNode) -> None:
        if node.tag == _DATE_TAG:
            raise self.refused(node, f"the date {quoted(node.value)}; settings hold none: put text in quotes")
        check_characters(node.value, f"{self.source}:{node.start_mark.line + 1}")
        if node.tag not in _PLAIN_TAGS:
            raise self.refused(node, f"the unknown tag {quoted(node.tag)}; expected plain YAML")
        if node.tag.endswith((":int", ":float")) and len(node.value) > _LONGEST_NUMBER:
            raise self.refused(node, f"a number of {len(node.value)} digits")

    def keys(self, node: yaml.MappingNode) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE_TAG:
                continue
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise self.refused(key, "a key that is not text; put it in quotes")
            line = key.start_mark.line + 1
            check_characters(key.value, f"{self.source}:{line}")
            if key.value in seen:
                first = seen[key.value]
                raise self.refused(key, f"the key {quoted(key.value)} again, after line {first}; remove one")
            seen[key.value] = line

    def refused(self, node: yaml.Node, what: str) -> InputError:
        return InputError(f"{self.source}:{node.start_mark.line + 1}: found {what}")
