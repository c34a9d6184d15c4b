"""Bad inputs that are no small text: damaged weights, tables and archives, a pipe, one of each idea."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = Callable[[Path], None]
"""Writes one bad file at the path it is given."""


def _bytes(content: bytes) -> Case:
    def write(file: Path) -> None:
        file.write_bytes(content)

    return write


def _safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> Case:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, Case] = {
    "empty": _bytes(b""),
    "short": _bytes(b"\x01\x00"),
    "garbage": _bytes(bytes(range(256)) * 40),
    "pickle": _bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94."),
    "header-empty": _safetensors(b"", length=0),
    "header-oversized": _safetensors({}, length=2**40),
    "header-maximal": _safetensors({}, length=2**64 - 1),
    "header-truncated": _safetensors({"a": _tensor([1], [0, 4])}, length=500),
    "header-no-json": _safetensors(b"not json at all"),
    "header-list": _safetensors([]),
    "header-deep": _safetensors(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "header-latin": _safetensors(b'{"\xff": 1}'),
    "entry-list": _safetensors({"a": []}),
    "entry-empty": _safetensors({"a": {}}),
    "shape-text": _safetensors({"a": _tensor("x", [0, 4])}, b"\0" * 4),
    "shape-negative": _safetensors({"a": _tensor([-1], [0, 4])}, b"\0" * 4),
    "shape-overflow": _safetensors({"a": _tensor([2**62, 2**62], [0, 4])}, b"\0" * 4),
    "shape-wraps": _safetensors({"a": _tensor([2**32, 2**32, 1], [0, 0])}),
    "shape-huge": _safetensors({"a": _tensor([10**12], [0, 4 * 10**12])}, b"\0" * 4),
    "dtype-unknown": _safetensors({"a": _tensor([1], [0, 4], "F31")}, b"\0" * 4),
    "dtype-number": _safetensors({"a": _tensor([1], [0, 4], 3)}, b"\0" * 4),
    "offsets-three": _safetensors({"a": _tensor([1], [0, 4, 8])}, b"\0" * 4),
    "offsets-backwards": _safetensors({"a": _tensor([1], [4, 0])}, b"\0" * 4),
    "overlap": _safetensors({"a": _tensor([2], [0, 8]), "b": _tensor([2], [4, 12])}, b"\0" * 12),
    "gap": _safetensors({"a": _tensor([1], [0, 4]), "b": _tensor([1], [8, 12])}, b"\0" * 12),
    "data-truncated": _safetensors({"a": _tensor([4], [0, 16])}, b"\0" * 7),
    "data-left-over": _safetensors({"a": _tensor([1], [0, 4])}, b"\0" * 99),
    "of-another-model": _safetensors({"other.weight": _tensor([1], [0, 4])}, b"\0" * 4),
}


def _gguf(
    tensors: int = 0,
    pairs: int = 0,
    body: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> Case:
    return _bytes(magic + struct.pack("<IQQ", version, tensors, pairs) + body)


def _text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def _integer(name: bytes, value: int) -> bytes:
    return _text(name) + struct.pack("<IQ", 10, value)


_LLAMA = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama")

GGUF: dict[str, Case] = {
    "empty": _bytes(b""),
    "magic": _gguf(magic=b"FUGG"),
    "version": _gguf(version=99),
    "truncated": _bytes(b"GGUF\x03\x00\x00\x00"),
    "tensors-huge": _gguf(tensors=2**62),
    "pairs-huge": _gguf(pairs=2**63),
    "pairs-more-than-there-are": _gguf(pairs=3, body=_LLAMA + b"\0" * 9),
    "nothing-in-it": _gguf(),
    "name-huge": _gguf(pairs=1, body=_text(b"a", 2**60) + b"\0" * 20),
    "text-huge": _gguf(pairs=1, body=_text(b"a") + struct.pack("<I", 8) + _text(b"b", 2**62) + b"\0" * 20),
    "list-huge": _gguf(pairs=1, body=_text(b"a") + struct.pack("<IIQ", 9, 4, 2**61) + b"\0" * 9),
    "list-of-texts-huge": _gguf(pairs=1, body=_text(b"a") + struct.pack("<IIQ", 9, 8, 2**40) + b"\0" * 9),
    "list-in-list": _gguf(pairs=1, body=_text(b"a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 30),
    "type-unknown": _gguf(pairs=1, body=_text(b"a") + struct.pack("<I", 77) + b"\0" * 20),
    "tensor-of-99-dimensions": _gguf(tensors=1, body=_text(b"w") + struct.pack("<I", 99) + b"\0" * 900),
    "tensor-huge": _gguf(
        tensors=1, body=_text(b"w") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + b"\0" * 64
    ),
    "tensor-outside": _gguf(tensors=1, body=_text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 2**50) + b"\0" * 64),
    "blocks-1e9": _gguf(pairs=2, body=_LLAMA + _integer(b"llama.block_count", 10**9)),
    "width-1e7": _gguf(pairs=2, body=_LLAMA + _integer(b"llama.embedding_length", 10**7)),
    "no-sizes": _gguf(pairs=1, body=_LLAMA),
    "no-tensors": _gguf(
        pairs=4,
        body=_LLAMA
        + _integer(b"llama.block_count", 32)
        + _integer(b"llama.embedding_length", 4096)
        + _integer(b"llama.feed_forward_length", 14336),
    ),
    "architecture-unknown": _gguf(
        pairs=1, body=_text(b"general.architecture") + struct.pack("<I", 8) + _text(b"nothing")
    ),
}


def _table(file: Path, metadata: dict[str, str] | None, **columns: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), file)


def _rows(metadata: dict[str, str] | None, **columns: Any) -> Case:
    return lambda file: _table(file, metadata, **columns)


def _pointing(rows: int, size: int) -> Any:
    """Rows that all have the same long text, which a file holds once."""
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int32()).fill_null(0), ["a" * size])


def _in_lists(rows: int, values: Any) -> Any:
    import pyarrow as pa

    step = len(values) // rows
    return pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, step), pa.int32()), values)


def _bomb(
    make: Callable[[], dict[str, Any]],
    metadata: dict[str, str] | None = None,
    *,
    times: int = 1,
    groups: int = 1,
) -> Case:
    """A small file that unpacks to gigabytes: what ``make`` gives, ``times`` over."""

    def write(file: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table(make()).replace_schema_metadata(metadata)
        once = times == 1  # a text that many rows have is in one dictionary; others are written out
        options: dict[str, Any] = {"dictionary_pagesize_limit": 2**30, "use_dictionary": once}
        options["row_group_size"] = len(table) * times // groups
        parquet.write_table(pa.concat_tables([table] * times), file, compression="zstd", **options)

    return write


def _empty(size: int) -> Case:
    """A file that takes no room on the disk, and would fill memory or time."""

    def write(file: Path) -> None:
        with file.open("wb") as out:
            out.truncate(size)

    return write


_SECOND = {"effir_ray_schema": "2"}
_RAW: dict[str, Case] = {
    "empty": _bytes(b""),
    "garbage": _bytes(bytes(range(256)) * 10),
    "magic-alone": _bytes(b"PAR1PAR1"),
    "footer-huge": _bytes(b"PAR1" + b"\0" * 50 + struct.pack("<I", 2**31 - 1) + b"PAR1"),
    "footer-garbage": _bytes(b"PAR1" + b"\xff" * 100 + struct.pack("<I", 80) + b"PAR1"),
}

_STATISTICS = (
    b"c-l>mF^j@L5QX0ky6AC86lTf77HM285;+B}uDRYK_zyxZpv7t2HH!Y4`>8h`78Wzbdyn_clwaEg_xO!R8z#mC=qCz5WblMdE@Hx("
    b"wOeDRVyfbJEbcHP*`ySKdp2Jo)v?|+KNX9BDW&~*?!IqRY@Fl_S!bPx<9EA)PVCcWGGv0e`=uYe_S;-8!he;(37=A+t;d5YdGZ5u"
    b"$1H2BaO#?KQMYYTg>bxPmnOvh@sKUo^N;z$x(EDMrj#fD0864HJp"
)
"""A table of one row in whose footer a byte is wrong: asked for its statistics, pyarrow ends the process."""

ROWS: dict[str, Case] = {
    **_RAW,
    "statistics-damaged": _bytes(zlib.decompress(base64.b85decode(_STATISTICS))),
    "no-version": _rows(None, study=["s"]),
    "version-text": _rows({"effir_ray_schema": "two"}, study=["s"]),
    "version-negative": _rows({"effir_ray_schema": "-1"}, study=["s"]),
    "version-huge": _rows({"effir_ray_schema": "9" * 5000}, study=["s"]),
    "version-newer": _rows({"effir_ray_schema": "99"}, study=["s"]),
    "score-text": _rows(_SECOND, study=["s"], ndcg_at_10=["good"]),
    "score-nan": _rows(_SECOND, study=["s"], ndcg_at_10=[float("nan")]),
    "score-infinite": _rows(_SECOND, study=["s"], query_ms=[float("inf")]),
    "study-list": _rows(_SECOND, study=[["s"]]),
    "parameters-text": _rows(_SECOND, study=["s"], parameters=["many"]),
    "time-text": _rows(_SECOND, study=["s"], created_at=["yesterday"]),
    "trial-broken": _rows(_SECOND, study=["s"], trial=["{"]),
    "trial-list": _rows(_SECOND, study=["s"], trial=["[]"]),
    "trial-deep": _rows(_SECOND, study=["s"], trial=["[" * 5000 + "]" * 5000]),
    "versions-broken": _rows(_SECOND, study=["s"], versions=["nope"]),
    "long-once": _bomb(lambda: {"study": _pointing(3000, 2 * 10**6)}, _SECOND),
    "long-everywhere": _bomb(lambda: {"study": ["a" * 2 * 10**6] * 10}, _SECOND, times=30),
}

PAIR_TABLES: dict[str, Case] = {
    **_RAW,
    "no-query": _rows(None, text=["a"]),
    "query-number": _rows(None, query=[1], positive=["b"]),
    "positive-null": _rows(None, query=["a"], positive=[None]),
    "score-nan": _rows(None, query=["a"], positive=["b"], scores=[[float("nan")]]),
    "compressed": _bomb(lambda: {"query": ["a" * 2 * 10**6] * 10, "positive": ["b"] * 10}, times=30),
    "compressed-in-parts": _bomb(
        lambda: {"query": ["a" * 2 * 10**6] * 10, "positive": ["b"] * 10}, times=150, groups=15
    ),
    "long-once": _bomb(lambda: {"query": _pointing(3000, 10**6), "positive": ["b"] * 3000}),
    "very-long-once": _bomb(lambda: {"query": _pointing(3000, 10**8), "positive": ["b"] * 3000}),
    "long-once-in-lists": _bomb(
        lambda: {"query": ["a"] * 10, "positives": _in_lists(10, _pointing(10**6, 10**6))}
    ),
}

PAIR_LINES: dict[str, Case] = {
    "one-line-of-5-gib": _empty(5 * 2**30),
    "one-line-of-500-mib": _empty(500 * 2**20),
    "one-line-of-11-mib": _bytes(b'{"query": "a", "positive": "' + b"b" * (11 * 2**20) + b'"}\n'),
}

CORPUS_TABLES: dict[str, Case] = {
    **_RAW,
    "no-text": _rows(None, _id=["a"]),
    "id-number": _rows(None, _id=[1], text=["b"]),
    "text-number": _rows(None, _id=["a"], text=[1]),
    "no-rows": lambda file: _table(file, None, _id=[], text=[]),
    "40-gib-of-nothing": _empty(40 * 2**30),
    "long-once": _bomb(lambda: {"_id": [str(n) for n in range(3000)], "text": _pointing(3000, 10**6)}),
}


def pipe(file: Path) -> None:
    os.mkfifo(file)


Bytes = Callable[[bytes], bytes]


def _zip(write: Callable[[zipfile.ZipFile], None], change: Bytes = bytes) -> Case:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        write(archive)
    return _bytes(change(buffer.getvalue()))


def _with_method(number: int) -> Bytes:
    """The same archive, said to be compressed in another way (in both of a zip's headers)."""

    def change(raw: bytes) -> bytes:
        data = bytearray(raw)
        central = data.index(b"PK\x01\x02")
        data[8:10] = data[central + 10 : central + 12] = struct.pack("<H", number)
        return bytes(data)

    return change


def _encrypted(raw: bytes) -> bytes:
    data = bytearray(raw)
    central = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[central + 8] |= 1
    return bytes(data)


def _elsewhere(raw: bytes) -> bytes:
    """The central directory says that the member begins before the file does."""
    data = bytearray(raw)
    central = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    data[end + 16 : end + 20] = struct.pack("<I", central + 40)
    return bytes(data)


def _member(archive: zipfile.ZipFile) -> None:
    archive.writestr("scifact/corpus.jsonl", "x" * 100)


ARCHIVES: dict[str, Case] = {
    "empty": _bytes(b""),
    "garbage": _bytes(b"PK\x03\x04" + bytes(range(256))),
    "truncated": _zip(_member, lambda raw: raw[:60]),
    "encrypted": _zip(_member, _encrypted),
    "method-unknown": _zip(_member, _with_method(77)),
    "damaged": _zip(_member, lambda raw: raw.replace(b"xxxx", b"yyyy", 1)),
    "member-before-the-file": _zip(_member, _elsewhere),
    "outside": _zip(lambda archive: archive.writestr("../scifact/x", "x")),
    "absolute": _zip(lambda archive: archive.writestr("/scifact/x", "x")),
    "another-folder": _zip(lambda archive: archive.writestr("other/corpus.jsonl", "x")),
}
