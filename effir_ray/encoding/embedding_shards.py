"""A folder of document embeddings: Parquet shards of fixed size with a manifest each, for any Arrow reader.

    encoding.json            what was encoded with what (identity), number of documents, shard size
    shards/000000.parquet    columns id: string, embedding: fixed_size_list<float16|float32>[d]
    shards/000000.json       written last: a shard without its manifest does not exist

The folder is local or any file system that pyarrow knows by URI (``s3://``, ``gs://``, ``hdfs://``).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from effir_ray import storage
from effir_ray.config import Config, parse
from effir_ray.errors import InputError
from effir_ray.hardware import Computed, Precision
from effir_ray.readers import json_object, parse_json

StoredType = Literal["float32", "float16"]
FORMAT = 2
_HEADER = "encoding.json"


class Encoding(Config):
    """What determines the embeddings in a folder; two folders with equal ones hold the same."""

    format: int = FORMAT
    model: str
    model_fingerprint: str
    dataset: str
    corpus_fingerprint: str
    documents: int
    shard_size: int
    max_length: int | None
    dtype: StoredType
    precision: Precision | None  # as asked for; None: the best on each kind of machine

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, read: Any) -> Any:
        if isinstance(read, dict) and read.get("format") == 1 and "quantize" in read:
            others = {name: value for name, value in read.items() if name not in ("format", "quantize")}
            return {**others, "precision": read["quantize"]}
        return read

    @property
    def shards(self) -> int:
        """How many shards a finished folder has."""
        return -(-self.documents // self.shard_size)

    def rows(self, shard: int) -> range:
        """Indices in the corpus of a shard's documents."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.documents))


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard's manifest. ``peak_bytes``: the worker process's largest resident size so far.

    ``computed_in``: the precision of the products, which stored rows do not show.
    """

    shard: int
    documents: int
    dimension: int
    tokens: int
    seconds: float
    peak_bytes: int
    computed_in: Computed


class ShardFolder:
    """Where shards are written to and read from; picklable, so that actors can use it."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)

    def __truediv__(self, name: str) -> str:
        return f"{self._root()[1]}/{name}"

    def _root(self) -> tuple[Any, str]:
        """(pyarrow file system, path in it)."""
        return storage.locate(self.location)

    @property
    def local(self) -> Path | None:
        """The folder's path when it lies on a local (or mounted) file system."""
        system, path = self._root()
        return Path(path) if system.type_name == "local" else None

    def header(self) -> Encoding | None:
        """What the folder holds; None when it is new. Raises InputError when it is something else."""
        with storage.reached(self.location):
            text = self._read(_HEADER)
        if text is None:
            return None
        return parse(parse_json(text, self / _HEADER), Encoding, source=self / _HEADER)

    def write_header(self, encoding: Encoding) -> None:
        """Make the folder."""
        system, root = self._root()
        with storage.reached(self.location):
            system.create_dir(f"{root}/shards", recursive=True)
            self._write(_HEADER, (encoding.model_dump_json(indent=1) + "\n").encode())

    def finished(self) -> set[int]:
        """Numbers of the shards that are there completely."""
        from pyarrow import fs

        system, root = self._root()
        selector = fs.FileSelector(f"{root}/shards", allow_not_found=True)
        listing = storage.steadily(self.location, lambda: system.get_file_info(selector))
        names = {item.base_name for item in listing}
        whole = {name[:-5] for name in names if name.endswith(".json")}
        return {int(stem) for stem in whole if stem.isdecimal() and f"{stem}.parquet" in names}

    def write_shard(
        self,
        record: ShardRecord,
        ids: Sequence[str],
        embeddings: npt.NDArray[np.float32],
        dtype: StoredType,
    ) -> None:
        """Store embeddings (n, d) of the documents ``ids``: the rows, then the manifest, each atomically."""
        import pyarrow as pa
        from pyarrow import parquet

        values = pa.array(embeddings.astype(dtype).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
        table = pa.table({"id": pa.array(ids, pa.string()), "embedding": vectors})
        sink = pa.BufferOutputStream()
        # Embeddings are noise to a compressor, and nobody filters by their statistics.
        parquet.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
        with storage.reached(self.location):
            self._write(f"shards/{record.shard:06d}.parquet", sink.getvalue())
            self._write(f"shards/{record.shard:06d}.json", json.dumps(record.__dict__).encode())

    def read_shard(
        self, shard: int, columns: Sequence[str] = ("id", "embedding")
    ) -> tuple[list[str], npt.NDArray[np.float32]]:
        """(ids, embeddings (n, d) as float32) of one shard; a column left out comes back empty."""
        from pyarrow import ArrowInvalid, parquet

        system, root = self._root()
        path = f"{root}/shards/{shard:06d}.parquet"
        try:
            table = parquet.read_table(path, filesystem=system, columns=list(columns))
        except (OSError, ArrowInvalid, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: not a readable shard ({error}); delete it and its .json, then resume"
            ) from None
        ids = table["id"].to_pylist() if "id" in columns else []
        if "embedding" not in columns:
            return ids, np.empty((0, 0), dtype=np.float32)
        column = table["embedding"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return ids, flat.reshape(len(column), -1).astype(np.float32, copy=False)

    def record(self, shard: int) -> ShardRecord:
        """The manifest of a finished shard."""
        with storage.reached(self.location):
            text = self._read(f"shards/{shard:06d}.json")
        if text is None:
            raise InputError(
                f"{self.location}: shard {shard} is missing; run the same encoding again to resume"
            )
        place = f"{self.location}: shard {shard}"
        try:
            return ShardRecord(**json_object(parse_json(text, place), place))
        except TypeError:
            raise InputError(f"{place}: its manifest is not one of effir-ray") from None

    def remove_leftovers(self) -> None:
        """Delete what killed writers left aside. Only while no other run writes here."""
        folder = self.local
        for leftover in folder.glob("shards/*.tmp-*") if folder else ():
            leftover.unlink(missing_ok=True)

    def _read(self, name: str) -> bytes | None:
        if storage.is_uri(self.location):
            return storage.get(storage.join(self.location, name))
        system, root = self._root()
        try:
            with system.open_input_stream(f"{root}/{name}") as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            return None
        return content

    def _write(self, name: str, content: Any) -> None:
        """Readers see the whole file or none: renamed into place; object stores are atomic by themselves."""
        if storage.is_uri(self.location):
            storage.put(storage.join(self.location, name), content)
            return
        system, root = self._root()
        path = f"{root}/{name}"
        aside = f"{path}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}" if self.local else path
        with system.open_output_stream(aside) as stream:
            stream.write(content)
        if aside != path:
            system.move(aside, path)


class CorpusEmbeddings:
    """A finished folder of embeddings, in corpus order."""

    def __init__(self, folder: ShardFolder) -> None:
        """Raises InputError when the folder is no encoding or not complete."""
        self.folder = folder
        header = folder.header()
        if header is None:
            raise InputError(
                f"{folder.location}: holds no {_HEADER}; expected a folder written by encode_corpus"
            )
        missing = sorted(set(range(header.shards)) - folder.finished())
        if missing:
            raise InputError(
                f"{folder.location}: {len(missing)} of {header.shards} shards are missing (the first is "
                f"{missing[0]}); run the same encoding again to resume"
            )
        self.encoding: Encoding = header

    def __len__(self) -> int:
        return self.encoding.documents

    @property
    def ids(self) -> list[str]:
        """Document ids, row by row. Read from the shards at each call."""
        return [i for n in range(self.encoding.shards) for i in self.folder.read_shard(n, ["id"])[0]]

    def shards(self) -> Iterator[npt.NDArray[np.float32]]:
        """Embeddings (n, d) shard by shard; only one is in memory."""
        for shard in range(self.encoding.shards):
            yield self.folder.read_shard(shard, ["embedding"])[1]

    def records(self) -> list[ShardRecord]:
        """The manifests: tokens and seconds of each shard."""
        return [self.folder.record(shard) for shard in range(self.encoding.shards)]


def differences(found: Encoding, wanted: Encoding) -> Mapping[str, tuple[Any, Any]]:
    """Field -> (found, wanted) where two encodings would not give the same rows.

    Names are for people: the same content under another path is the same model or data set.
    """
    fields = set(Encoding.model_fields) - {"model", "dataset"}
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in sorted(fields)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
