"""Training pairs larger than memory, read by Ray Data: JSONL and Parquet files in folders, local or S3.

Files are cut into chunks (line ranges, Parquet row groups). An epoch is a permutation of the chunks, each
shuffled inside and all mixed through a window, so the order depends on (seed, epoch) alone. Ray tasks read,
check and shuffle chunks ahead of the training; memory holds the window and a few chunks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from effir_ray import storage
from effir_ray.caches import file_hash
from effir_ray.cluster.connection import connect
from effir_ray.data.datasets import dataset_files, load_dataset
from effir_ray.data.pair_layouts import Pair, normalised, parse_line, parse_pair, to_json
from effir_ray.errors import InputError
from effir_ray.parquet_files import ParquetGroups
from effir_ray.readers import check_line

CHUNK_BYTES = 4 << 20  # of JSONL: a few thousand pairs
WINDOW = 20_000  # pairs mixed at once
IN_MEMORY_BYTES = 1 << 30  # a single JSONL file up to this size is simply loaded


@dataclass(frozen=True)
class Chunk:
    """``rows`` pairs: ``size`` bytes from ``start`` of a JSONL file, the first one line ``line``; or the
    row group ``line`` of a Parquet file."""

    path: str
    start: int
    size: int
    line: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What all pairs say together. ``left_out``: how many ask a held-out question; the others have up to
    ``negatives`` hard negatives, and reranker scores somewhere if ``scored``; if ``texts``, some are texts
    without queries."""

    left_out: int = 0
    negatives: int = 0
    scored: bool = False
    texts: bool = False

    def __add__(self, other: Survey) -> Survey:
        return Survey(
            left_out=self.left_out + other.left_out,
            negatives=max(self.negatives, other.negatives),
            scored=self.scored or other.scored,
            texts=self.texts or other.texts,
        )


def take_survey(pairs: Iterable[Pair], held_out: frozenset[str] = frozenset()) -> Survey:
    """``held_out``: questions as ``normalised`` writes them."""
    left_out, negatives, scored, texts = 0, 0, False, False
    for pair in pairs:
        if held_out and normalised(pair.query) in held_out:
            left_out += 1
            continue
        negatives = max(negatives, len(pair.negatives))
        scored = scored or pair.teacher_scores is not None
        texts = texts or not pair.labelled
    return Survey(left_out=left_out, negatives=negatives, scored=scored, texts=texts)


def is_stream(source: str) -> bool:
    """Whether ``source`` is read as a stream: Parquet, pair files at a URI or in a folder, a huge JSONL."""
    if storage.is_uri(source):
        return bool(_suffix(source)) or not storage.exists(storage.join(source, "queries.jsonl"))
    if source.endswith(".parquet"):
        return True
    path = Path(source)
    if path.suffix == ".jsonl":
        return path.is_file() and path.stat().st_size > IN_MEMORY_BYTES
    return path.is_dir() and not (path / "queries.jsonl").exists()


def source_fingerprint(source: str) -> str:
    """Changes whenever the data at ``source`` does. Of a stream: names, sizes and times of change."""
    if is_stream(source):
        found = [(file.place, file.size, file.changed) for file in _files(source)]
        return hashlib.sha256(repr(found).encode()).hexdigest()
    path = Path(source)
    if path.suffix != ".jsonl":
        return load_dataset(source).fingerprint
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return file_hash(path)


def source_files(source: str) -> dict[str, Path]:
    """Name -> file of all that ``source_fingerprint`` looks at, on this machine: none of a URI. Raises
    InputError as it does."""
    if storage.is_uri(source):
        return {}
    if is_stream(source):
        return {Path(file.place).name: Path(file.place) for file in _files(source)}
    path = Path(source)
    if path.suffix != ".jsonl":
        return dataset_files(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return {path.name: path}


class PairStream:
    """The pairs of a file or of the ``.jsonl`` and ``.parquet`` files in a folder (layouts: pair_layouts).

    Pairs of the questions ``held_out`` (as ``normalised`` writes them) are passed over. ``survey``: what
    another process found with the same arguments, so that it is not read again.
    Raises InputError for nothing to read; while reading, for a bad row, naming file and line.
    """

    def __init__(
        self, source: str, *, held_out: frozenset[str] = frozenset(), survey: Survey | None = None
    ) -> None:
        self.source, self._held_out = source, held_out
        if survey is not None:
            self.survey = survey
        self.chunks = [chunk for file in _files(source) for chunk in _chunks(file.place)]
        if not self.chunks:
            raise InputError(f"{source}: no training pairs; expected .jsonl or .parquet files with rows")

    def __len__(self) -> int:
        return sum(chunk.rows for chunk in self.chunks) - (self.survey.left_out if self._held_out else 0)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the pairs do."""
        read = [source_fingerprint(self.source), *sorted(self._held_out)]
        return hashlib.sha256(repr(read).encode()).hexdigest()

    @cached_property
    def survey(self) -> Survey:
        """One pass over all files, by Ray tasks."""
        import ray

        connect()
        held_out, task = ray.put(self._held_out), ray.remote(_surveyed)
        parts = ray.get([task.remote(asdict(chunk), held_out) for chunk in self.chunks])
        for error in (part for part in parts if isinstance(part, str)):
            raise InputError(error)
        return sum(parts, start=Survey())

    def read(self) -> Iterator[Pair]:
        """Every pair in the order of the files, in this process."""
        pairs = (pair for chunk in self.chunks for pair in _read(chunk))
        return (pair for pair in pairs if normalised(pair.query) not in self._held_out)

    def epoch(self, *, seed: int, epoch: int, skip: int = 0) -> Iterator[Pair]:
        """Every pair once, in the order of (seed, epoch), without the first ``skip``."""
        return islice(_mixed(self._rows(seed, epoch), np.random.default_rng((seed, epoch, 1))), skip, None)

    def _rows(self, seed: int, epoch: int) -> Iterator[Pair]:
        import ray.data

        connect()
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.chunks)).tolist()
        items = [{**asdict(self.chunks[index]), "seed": [seed, epoch, index]} for index in order]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        # A training run may hold every CPU: reading must not wait for one, nor start a process a chunk.
        two = ray.data.TaskPoolStrategy(size=2)
        for row in dataset.flat_map(_shuffled_lines, num_cpus=0, compute=two).iter_rows():
            if row["error"]:
                raise InputError(row["error"])
            pair = parse_line(row["line"], self.source)
            if not self._held_out or normalised(pair.query) not in self._held_out:
                yield pair


def _shuffled_lines(item: dict[str, Any]) -> list[dict[str, str]]:
    """Runs in a Ray task: the chunk's pairs, checked, as lines of one layout in a random order.

    A bad row travels as data: Ray would wrap an exception and print it from every process.
    """
    seed = item.pop("seed")
    try:
        pairs = list(_read(Chunk(**item)))
    except InputError as error:
        return [{"line": "", "error": str(error)}]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [{"line": to_json(pairs[index]), "error": ""} for index in order]


def _surveyed(item: dict[str, Any], held_out: frozenset[str]) -> Survey | str:
    """Runs in a Ray task: the survey of a chunk, or what is wrong with it."""
    try:
        return take_survey(_read(Chunk(**item)), held_out)
    except InputError as error:
        return str(error)


def _mixed(pairs: Iterator[Pair], random: np.random.Generator) -> Iterator[Pair]:
    """Each pair leaves the window at a random moment after it entered."""
    window = list(islice(pairs, WINDOW))
    for pair in pairs:
        place = int(random.integers(len(window)))
        yield window[place]
        window[place] = pair
    for place in random.permutation(len(window)):
        yield window[place]


def _files(source: str) -> list[storage.StoredFile]:
    """The pair files, in order."""
    place = source if storage.is_uri(source) else str(Path(source).resolve())
    return [file for file in storage.list_files(place) if _suffix(file.place) in (".jsonl", ".parquet")]


def _suffix(place: str) -> str:
    """``.parquet``, without the options of a URI."""
    return Path(place.partition("?")[0] if storage.is_uri(place) else place).suffix


def _chunks(path: str) -> Iterator[Chunk]:
    with storage.open_file(path) as file:
        if _suffix(path) == ".parquet":
            for group, rows in enumerate(ParquetGroups(file, path).rows):
                yield Chunk(path, 0, 0, group, rows)
            return
        start, line = 0, 1
        while data := file.read(CHUNK_BYTES):
            if not data.endswith(b"\n"):
                data += _to_line_end(file, f"{path}: after line {line - 1}")
            texts = data.split(b"\n")
            check_line(max(map(len, texts)), f"{path}: after line {line - 1}")
            rows = sum(1 for text in texts if text.strip())
            if rows:
                yield Chunk(path, start, len(data), line, rows)
            start, line = start + len(data), line + data.count(b"\n")


def _to_line_end(file: Any, where: str) -> bytes:
    """The rest of the line in which a read ended; the file is then at the next line."""
    rest = b""
    while data := bytes(file.read(1 << 16)):
        end = data.find(b"\n")
        if end >= 0:
            file.seek(file.tell() - len(data) + end + 1)
            return rest + data[: end + 1]
        rest += data
        check_line(len(rest), where)
    return rest


def _read(chunk: Chunk) -> Iterator[Pair]:
    with storage.open_file(chunk.path) as file:
        if _suffix(chunk.path) == ".parquet":
            yield from _row_group(file, chunk)
            return
        file.seek(chunk.start)
        lines = file.read(chunk.size).split(b"\n")
    for number, line in enumerate(lines, start=chunk.line):
        if line.strip():
            yield parse_line(line, f"{chunk.path}:{number}")


def _row_group(file: Any, chunk: Chunk) -> Iterator[Pair]:
    number = 0
    for batch in ParquetGroups(file, chunk.path).batches(chunk.line):
        for record in _records(batch, chunk):
            try:
                yield parse_pair(record)
            except ValueError as error:
                raise InputError(f"{chunk.path}: row group {chunk.line}, row {number}: {error}") from None
            number += 1


def _records(batch: Any, chunk: Chunk) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{chunk.path}: row group {chunk.line} is not UTF-8: {error}") from None
    return found
