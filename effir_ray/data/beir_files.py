"""Reading the three files of a BEIR folder, distrustfully: every complaint names file and line.

    corpus.jsonl     {"_id": "31715818", "title": "...", "text": "..."}    title may be missing or empty
    corpus.parquet   the same as columns, instead of corpus.jsonl
    queries.jsonl    {"_id": "1", "text": "..."}
    qrels/test.tsv   header, then query-id <tab> corpus-id <tab> score

Text files are read once, as a stream of bytes: a line that is too long is refused before it is in memory.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effir_ray.data.parquet_corpus import ParquetRows, part_files
from effir_ray.errors import InputError
from effir_ray.readers import open_regular, parse_json, quoted, read_lines

if TYPE_CHECKING:
    import pyarrow as pa

# Published collections carry a few blemishes that BEIR users score as they are: Cranfield has 2 empty
# documents in 1,400 (one of them judged relevant), ArguAna's qrels name 1 missing document in 1,406. Within
# these shares they are kept and reported as warnings; above, the folder is taken for broken.
MAX_EMPTY_SHARE = 0.002
MAX_UNMATCHED_SHARE = 0.001

_SCORE = re.compile(r" *[+-]?[0-9]{1,9} *")  # int() reads 1_0 as 10, and not what \s matches

_CHUNK = 65536  # ids that are Python objects at once


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus."""

    id: str
    title: str
    text: str

    @property
    def document_text(self) -> str:
        """What is encoded: title and text joined by one space (as BEIR and the paper do)."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True, slots=True)
class CorpusScan:
    """What one validating pass over a corpus learns: enough to stream any part of it later."""

    ids: pa.ChunkedArray  # of strings; as Python objects they would take five times the memory
    offsets: array[int]  # byte offset of every document's line; in Parquet, its row
    sha256: str
    warnings: tuple[str, ...]


def scan_corpus(path: Path) -> CorpusScan:
    """Validate ``corpus.jsonl`` or ``corpus.parquet``; memory grows by an id and an offset a document, never
    by its text.

    Raises InputError for a missing or empty file, a line that is too long, not UTF-8, not a JSON object,
    lacks ``_id`` or ``text``, repeats an id, and for more than ``MAX_EMPTY_SHARE`` documents without any
    text.
    """
    import pyarrow as pa

    chunks: list[pa.Array] = []
    ids: list[str] = []
    hashes, offsets, empty_lines = array("q"), array("q"), []
    digest = hashlib.sha256()
    for number, offset, document in _documents(path, digest):
        ids.append(document.id)
        hashes.append(hash(document.id))
        offsets.append(offset)
        if not document.document_text:
            empty_lines.append(number)
        if len(ids) == _CHUNK:
            chunks.append(pa.array(ids, pa.string()))
            ids = []
    if not offsets:
        raise InputError(
            f"{path}: holds no documents; expected one JSON object a line with _id, title and text"
        )
    _check_unique(path, hashes)
    warnings: tuple[str, ...] = ()
    if empty_lines:
        found = f"{path}:{empty_lines[0]}: document without title and text"
        if len(empty_lines) > max(1, len(offsets)) * MAX_EMPTY_SHARE:
            raise InputError(
                f"{found} ({len(empty_lines)} of {len(offsets)} documents are empty; at most "
                f"{MAX_EMPTY_SHARE:.1%} may be); fill in or remove these lines"
            )
        warnings = (f"{found} ({len(empty_lines)} of {len(offsets)}); kept, as BEIR does",)
    chunks.append(pa.array(ids, pa.string()))
    return CorpusScan(pa.chunked_array(chunks), offsets, digest.hexdigest(), warnings)


def _check_unique(path: Path, hashes: array[int]) -> None:
    """No id twice. Equal hashes, almost always of equal ids, are looked up in a second pass; sorts them."""
    ordered = np.frombuffer(hashes, dtype=np.int64)
    ordered.sort()
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    first_line: dict[str, int] = {}
    for number, _, document in _documents(path, hashlib.sha256()):
        if hash(document.id) in repeated:
            _check_new(document.id, first_line, path, number)


def read_documents(path: Path, offsets: Sequence[int]) -> Iterator[Document]:
    """The documents at ``offsets`` (see ``CorpusScan``) of a corpus that was scanned before."""
    if path.suffix == ".parquet":
        for row, record in zip(offsets, ParquetRows(path).read(offsets), strict=True):
            yield _document(record, path, row + 1)
        return
    with path.open("rb") as file:
        for offset in offsets:
            if file.tell() != offset:
                file.seek(offset)
            raw = file.readline()
            try:
                yield _document(_json_object(raw, path, 1 if offset == 0 else 0), path, 0)
            except InputError:  # it was valid when it was scanned
                raise InputError(f"{path}: changed while it was in use; load the data set again") from None


def changed_meanwhile(path: Path) -> InputError:
    """What to raise where ``read_documents`` finds other ids than the scan found."""
    return InputError(f"{path}: changed while it was in use; load the data set again")


def _documents(path: Path, digest: hashlib._Hash) -> Iterator[tuple[int, int, Document]]:
    """(line or row from 1, offset, document) of a whole corpus; ``digest`` takes in all that was read."""
    if path.suffix != ".parquet":
        for number, offset, raw in _lines(path):
            digest.update(raw)
            yield number, offset, _document(_json_object(raw, path, number), path, number)
        return
    rows = ParquetRows(path)  # first: what is no Parquet may be too large to be hashed
    for part in part_files(path):
        with open_regular(part) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for row, record in enumerate(rows.read(range(len(rows)))):
        yield row + 1, row, _document(record, path, row + 1)


def _document(record: dict[str, Any], path: Path, number: int) -> Document:
    return Document(
        id=_identifier(record, path, number),
        title=_text(record, "title", path, number, default=""),
        text=_text(record, "text", path, number),
    )


def read_queries(path: Path) -> dict[str, str]:
    """``queries.jsonl`` as id -> text, in file order.

    Raises InputError where ``scan_corpus`` does, and for any query without text.
    """
    queries: dict[str, str] = {}
    first_line: dict[str, int] = {}
    for number, _, raw in _lines(path):
        record = _json_object(raw, path, number)
        query_id = _identifier(record, path, number)
        _check_new(query_id, first_line, path, number)
        text = _text(record, "text", path, number).strip()
        if not text:
            raise InputError(
                f"{path}:{number}: query '{query_id}' has no text; fill it in or remove the line"
            )
        queries[query_id] = text
    if not queries:
        raise InputError(f"{path}: holds no queries; expected one JSON object a line with _id and text")
    return queries


@dataclass(frozen=True, slots=True)
class Judgements:
    """A qrels file and what is odd about it."""

    qrels: dict[str, dict[str, int]]
    warnings: tuple[str, ...]


def read_qrels(path: Path, queries: dict[str, str], documents: set[str]) -> Judgements:
    """``qrels/<split>.tsv`` as query id -> document id -> score, rows of unknown queries left out.

    A row of an unknown document is kept: it counts against recall, as in BEIR. Raises InputError for a
    missing header, rows of another shape, and for more than ``MAX_UNMATCHED_SHARE`` rows that name an unknown
    query or document.
    """
    qrels: dict[str, dict[str, int]] = {}
    rows, unmatched = 0, []
    for number, _, raw in _lines(path):
        fields = _decode(raw, path, number).rstrip("\r\n").split("\t")
        if number == 1:
            _check_header(fields, path)
            continue
        query_id, document_id, score = _judgement(fields, path, number)
        rows += 1
        if query_id not in queries:
            unmatched.append((number, f"query '{query_id}' is not in queries.jsonl"))
            continue
        if document_id not in documents:
            unmatched.append((number, f"document '{document_id}' is not in the corpus"))
        qrels.setdefault(query_id, {})[document_id] = score
    if not rows:
        raise InputError(
            f"{path}: holds no judgements; expected a header and rows query-id<tab>corpus-id<tab>score"
        )
    if not unmatched:
        return Judgements(qrels, ())
    found = f"{path}:{unmatched[0][0]}: {unmatched[0][1]}"
    if len(unmatched) > rows * MAX_UNMATCHED_SHARE:
        raise InputError(
            f"{found} ({len(unmatched)} of {rows} judgements have no match); "
            "use the corpus, queries and qrels of one data set"
        )
    return Judgements(qrels, (f"{found} ({len(unmatched)} of {rows} judgements); scored as BEIR does",))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, raw line) of every line that is not blank."""
    if not path.exists():
        raise InputError(
            f"{path}: no such file; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
        )
    return read_lines(path)


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
            "convert the file to UTF-8"
        ) from None


def _json_object(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = parse_json(_decode(raw, path, number), f"{path}:{number}")
    except InputError as error:
        raise InputError(f"{error}; expected one object a line") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{path}:{number}: found a JSON {type(record).__name__}; expected an object with _id and text"
        )
    return record


def _identifier(record: dict[str, Any], path: Path, number: int) -> str:
    identifier = record.get("_id")
    if not isinstance(identifier, str) or not identifier or any(c in identifier for c in "\t\r\n"):
        raise InputError(
            f"{path}:{number}: _id is {identifier!r}; expected a string that is not empty and has no tabs"
        )
    return identifier


def _text(record: dict[str, Any], field: str, path: Path, number: int, *, default: str | None = None) -> str:
    value = record.get(field, default)
    if value is None and default is not None:
        return default  # "title": null is common in exports
    if not isinstance(value, str):
        found = "is missing" if field not in record else f"is a JSON {type(value).__name__}"
        raise InputError(f"{path}:{number}: field '{field}' {found}; expected a string")
    return value


def _check_new(identifier: str, first_line: dict[str, int], path: Path, number: int) -> None:
    if identifier in first_line:
        raise InputError(
            f"{path}:{number}: _id '{identifier}' was already used on line {first_line[identifier]}; "
            "ids must be unique"
        )
    first_line[identifier] = number


def _check_header(fields: list[str], path: Path) -> None:
    if len(fields) != 3 or fields[2].strip().lstrip("-").isdigit():
        raise InputError(
            f"{path}:1: found {' '.join(fields)!r}; expected the header query-id<tab>corpus-id<tab>score"
        )


def _judgement(fields: list[str], path: Path, number: int) -> tuple[str, str, int]:
    if len(fields) != 3:
        raise InputError(
            f"{path}:{number}: {len(fields)} tab-separated fields; expected 3: query-id, corpus-id, score"
        )
    query_id, document_id, score = fields
    if not _SCORE.fullmatch(score):
        raise InputError(f"{path}:{number}: score is {quoted(score)}; expected a whole number")
    return query_id, document_id, int(score)
