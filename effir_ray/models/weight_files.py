"""Headers of safetensors and GGUF files, checked against the files' sizes before anything is allocated.

The libraries that read the tensors trust a header's counts: a few bytes can ask them for terabytes.

safetensors (https://huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON
``{name: {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}}``, then the data without gaps.
GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, key-value pairs,
tensor descriptions, data.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from effir_ray.errors import InputError
from effir_ray.readers import json_object, open_regular, parse_json, quoted, read_json_object

INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER = 100 * 10**6  # bytes, the library's own limit
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_GGUF_MAGIC = b"GGUF"
_GGUF_VERSIONS = (2, 3)
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of fixed-size types
_GGUF_INTEGERS = {4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_GGUF_DIMENSIONS = 4
_GGUF_NAME = 65535  # bytes, the format's limit of a key; names of tensors are shorter


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a header says of one tensor, in safetensors' names of types."""

    dtype: str
    shape: tuple[int, ...]


def safetensors_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one file, by name; InputError for a header that its file cannot hold."""
    with open_regular(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise _damaged(file, f"its header would be {length} bytes long, the file has {size}")
        raw = stream.read(length)
    header = json_object(parse_json(raw, str(file), unique=True), str(file))
    header.pop("__metadata__", None)
    spans, tensors = [], {}
    for name, entry in header.items():
        tensors[name], span = _tensor(file, name, entry)
        spans.append(span)
    _check_spans(file, sorted(spans), size - 8 - length)
    return tensors


def _tensor(file: Path, name: str, entry: Any) -> tuple[TensorHeader, tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or shape is None or span is None or len(span) != 2:
        raise _damaged(file, f"tensor {quoted(name)} lacks a known dtype, a shape or its data_offsets")
    needed = math.prod(shape) * bits
    if span[1] - span[0] != -(-needed // 8):
        raise _damaged(file, f"tensor {quoted(name)} needs {-(-needed // 8)} bytes, its offsets give others")
    return TensorHeader(str(dtype), shape), (span[0], span[1])


def _sizes(values: Any) -> tuple[int, ...] | None:
    """``values`` where they are a list of whole numbers that 8 bytes can hold."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        return None
    return tuple(values) if all(0 <= value < 2**63 for value in values) else None


def _check_spans(file: Path, spans: list[tuple[int, int]], size: int) -> None:
    reached = 0
    for begin, end in spans:
        if begin != reached:
            raise _damaged(file, "its tensors overlap or leave gaps")
        reached = end
    if reached != size:
        raise _damaged(file, f"its tensors need {reached} bytes, the file has {size}")


def model_tensors(folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a model folder (one file, or the shards of an index), without reading their data.

    Raises InputError for an index that names no files of the folder, or tensors that their file has not got.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / "model.safetensors").exists():
            raise InputError(f"{folder}: cannot load weights (safetensors only): no model.safetensors")
        return safetensors_header(folder / "model.safetensors")
    weights = json_object(read_json_object(index).get("weight_map"), f"{index}: weight_map")
    names = sorted({name for name in weights.values() if isinstance(name, str)})
    if not weights or any(not isinstance(name, str) or Path(name).name != name for name in weights.values()):
        raise InputError(f"{index}: weight_map names no files of this folder; expected tensor: file name")
    shards = {name: safetensors_header(folder / name) for name in names}
    for tensor, name in weights.items():
        if tensor not in shards[name]:
            raise InputError(
                f"{index}: {quoted(tensor)} is not in {name}; the index is that of another model"
            )
    return {tensor: header for shard in shards.values() for tensor, header in shard.items()}


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file}: not a safetensors file, or damaged: {reason}; fetch it again")


def gguf_settings(file: Path) -> tuple[dict[str, int], int]:
    """The settings of a GGUF file that are one whole number, for example {"llama.block_count": 30}, and how
    many elements its tensors have together.

    Raises InputError unless all counts, lengths and offsets of the header stay within the file.
    """
    with open_regular(file) as stream:
        return _GgufHeader(file, stream).check()


class _GgufHeader:
    """Reads forward, and knows at every place how much of the file is left."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.size = stream.seek(0, 2)
        stream.seek(0)

    def check(self) -> tuple[dict[str, int], int]:
        if self.take(4) != _GGUF_MAGIC:
            raise self.refused("it does not begin with GGUF")
        version = self.number("<I")
        if version not in _GGUF_VERSIONS:
            raise self.refused(f"version {version}; this effir-ray reads {_GGUF_VERSIONS}")
        tensors, pairs = self.number("<Q"), self.number("<Q")
        # The shortest pair is a length, a type and a byte; the shortest tensor a length and four numbers.
        if pairs * 13 + tensors * 24 > self.left():
            raise self.refused(f"{tensors} tensors and {pairs} settings do not fit into {self.size} bytes")
        settings: dict[str, int] = {}
        for _ in range(pairs):
            name, kind = self.text(_GGUF_NAME), self.number("<I")
            if kind in _GGUF_INTEGERS:
                settings[name] = self.number(_GGUF_INTEGERS[kind])
            else:
                self.skip_value(kind)
        spans = [self.tensor() for _ in range(tensors)]
        for elements, offset in spans:
            if offset > self.left() or elements > 8 * self.left():  # no type has less than a bit an element
                raise self.refused("a tensor does not fit into the file")
        total = sum(elements for elements, _ in spans)
        if total > 8 * self.left():
            raise self.refused("its tensors do not fit into the file")
        return settings, total

    def tensor(self) -> tuple[int, int]:
        """(elements, offset of the data)."""
        self.text(_GGUF_NAME)
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _GGUF_DIMENSIONS:
            raise self.refused(f"a tensor of {dimensions} dimensions")
        elements = math.prod(self.number("<Q") for _ in range(dimensions))
        self.number("<I")  # its type
        return elements, self.number("<Q")

    def skip_value(self, kind: int, *, nested: bool = False) -> None:
        if kind == _GGUF_STRING:
            self.skip(self.number("<Q"))
        elif kind == _GGUF_ARRAY and not nested:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _GGUF_BYTES:
                self.skip(count * _GGUF_BYTES[inner])
                return
            if count * 8 > self.left():
                raise self.refused(f"a list of {count} entries does not fit into the file")
            for _ in range(count):
                self.skip_value(inner, nested=True)
        elif kind in _GGUF_BYTES:
            self.skip(_GGUF_BYTES[kind])
        else:
            raise self.refused(f"a setting of the unknown type {kind}")

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.refused(f"a name of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > self.left():
            raise self.refused(f"it ends within its header ({count} more bytes are announced)")
        self.stream.seek(count, 1)

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def take(self, count: int) -> bytes:
        found = self.stream.read(count)
        if len(found) < count:
            raise self.refused("it ends within its header")
        return found

    def left(self) -> int:
        return self.size - self.stream.tell()

    def refused(self, reason: str) -> InputError:
        return InputError(f"{self.file}: not a GGUF file, or damaged: {reason}; fetch it again")
