"""Sizes of a Parquet file's columns, from its footer (Thrift's compact protocol, parquet.thrift).

pyarrow's own view of a column chunk ends the whole process where statistics and schema disagree (a C++
exception that nothing catches). What is read here of a footer that anybody may
have written is five fields, and every length in it is checked against the bytes that are there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

MAX_FOOTER_BYTES = 64 * 2**20
"""Of files with 10,000 row groups of 50 columns; usual ones have some kB."""

_MAGIC = b"PAR1"
_DEEPEST = 32  # Thrift's structures in structures

# Types of the compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY = 0, 1, 2, 3, 7, 8
_LIST, _SET, _MAP, _STRUCT, _UUID = 9, 10, 11, 12, 13
_WHOLE = range(4, 7)  # 16, 32 and 64 bits, as varints
_SIZES = {_DOUBLE: 8, _UUID: 16, _BYTE: 1}

# Fields of parquet.thrift: FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data, ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _META_DATA = 4, 1, 3
_VALUES, _UNPACKED, _PACKED = 5, 6, 7


class BadFooter(ValueError):
    """What is damaged, or no footer at all."""


@dataclass(frozen=True)
class Chunk:
    """One column of one row group: how many values, and the bytes of its pages as stored and unpacked."""

    values: int
    packed: int
    unpacked: int


def read_footer(stream: Any) -> list[list[Chunk]]:
    """The columns of every row group, in the order of the schema's leaves. ``stream`` is open for reading,
    and can seek. Raises BadFooter.
    """
    size = stream.seek(0, io.SEEK_END)
    if size < 12:
        raise BadFooter("too short for Parquet")
    stream.seek(size - 8)
    ending = stream.read(8)
    length = int.from_bytes(ending[:4], "little")
    if ending[4:] != _MAGIC or not 0 < length <= min(size - 12, MAX_FOOTER_BYTES):
        raise BadFooter("it does not end as Parquet does")
    stream.seek(size - 8 - length)
    return _Reader(stream.read(length)).row_groups()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def row_groups(self) -> list[list[Chunk]]:
        return self._structures(_ROW_GROUPS, lambda: self._structures(_COLUMNS, self._chunk))

    def _structures(self, wanted: int, read: Callable[[], T]) -> list[T]:
        """What ``read`` makes of the list in the field ``wanted`` of a structure."""
        found: list[T] = []
        for field, kind in self._fields():
            if field == wanted:
                found = [read() for _ in range(self._list_of(kind, _STRUCT))]
            else:
                self._skip(kind, 0)
        return found

    def _chunk(self) -> Chunk:
        found: Chunk | None = None
        for field, kind in self._fields():
            if field == _META_DATA and kind == _STRUCT:
                found = self._sizes()
            else:
                self._skip(kind, 0)
        if found is None:
            raise _bad("a column without its description, or an encrypted one")
        return found

    def _sizes(self) -> Chunk:
        sizes: dict[int, int] = {}
        for field, kind in self._fields():
            if field in (_VALUES, _UNPACKED, _PACKED) and kind in _WHOLE:
                sizes[field] = self._whole()
            else:
                self._skip(kind, 0)
        if len(sizes) < 3 or min(sizes.values()) < 0:
            raise _bad("a column without sizes")
        return Chunk(values=sizes[_VALUES], packed=sizes[_PACKED], unpacked=sizes[_UNPACKED])

    def _fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of every field of a structure, whose value is to be read before the next."""
        number = 0
        while (head := self._byte()) != _STOP:
            kind, step = head & 15, head >> 4
            number = number + step if step else self._whole()
            yield number, kind

    def _list_of(self, kind: int, wanted: int) -> int:
        """How many elements follow."""
        count, found = self._list() if kind == _LIST else (0, -1)
        if kind != _LIST or (count and found != wanted):
            raise _bad("a list of something else")
        return count

    def _list(self) -> tuple[int, int]:
        """(length, type) of a list, of which every element takes a byte at least."""
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if count > len(self._data) - self._at:
            raise _bad("a list longer than the footer")
        return count, head & 15

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise _bad("structures in structures without end")
        if kind in _WHOLE:
            self._varint()
        elif kind in _SIZES:
            self._take(_SIZES[kind])
        elif kind == _BINARY:
            self._take(self._varint())
        elif kind == _STRUCT:
            for _, inner in self._fields():
                self._skip(inner, depth + 1)
        elif kind in (_LIST, _SET):
            count, inner = self._list()
            for _ in range(count):
                self._element(inner, depth)
        elif kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            if count > len(self._data) - self._at:
                raise _bad("a map longer than the footer")
            for _ in range(count):
                self._element(kinds >> 4, depth)
                self._element(kinds & 15, depth)
        elif kind not in (_TRUE, _FALSE):  # whose value is in the type
            raise _bad("a type that Thrift has not")

    def _element(self, kind: int, depth: int) -> None:
        """Of a list or a map, where also true and false take a byte."""
        self._skip(_BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)

    def _byte(self) -> int:
        return self._take(1)[0]

    def _whole(self) -> int:
        """A whole number with its sign (zigzag)."""
        found = self._varint()
        return found >> 1 if found % 2 == 0 else -(found >> 1) - 1

    def _varint(self) -> int:
        value = 0
        for place in range(0, 70, 7):
            part = self._byte()
            value |= (part & 127) << place
            if part < 128:
                return value
        raise _bad("a number of more than 64 bits")

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise _bad("it ends in the middle")
        self._at += count
        return self._data[self._at - count : self._at]


def _bad(what: str) -> BadFooter:
    return BadFooter(f"damaged footer: {what}")
