"""Retrieval data sets: BEIR folders, read as streams and checked completely when they are loaded.

``load_dataset`` makes one validating pass over a folder, so that everything wrong with it is said (file and
line) before any model is loaded; texts are then streamed from disk and never held together in memory. A
process makes that pass once: what it learnt is remembered while the files stay as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from effir_ray import storage
from effir_ray.caches import data_folder
from effir_ray.data.beir_files import (
    Document,
    changed_meanwhile,
    read_documents,
    read_qrels,
    read_queries,
    scan_corpus,
)
from effir_ray.data.parquet_corpus import part_files
from effir_ray.data.stdlib_corpus import build_stdlib
from effir_ray.errors import InputError
from effir_ray.mirrors import copy_of

if TYPE_CHECKING:
    import pyarrow as pa

DEV_SHARE = 0.1
_SPLITS = ("train", "dev", "test")
_ALIASES = {"dbpedia": "dbpedia-entity", "touche2020": "webis-touche2020", "touche-2020": "webis-touche2020"}

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Corpus:
    """The documents of a data set (or a part of them), in a fixed order, on disk."""

    path: Path
    arrow_ids: pa.ChunkedArray  # what a corpus of any size is encoded with; see ``ids``
    offsets: array[int]  # byte offset in ``path`` of each document's line; in Parquet, its row
    fingerprint: str = ""  # of all documents and their order

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def ids(self) -> list[str]:
        """Document ids in order, as Python objects."""
        ids: list[str] = self.arrow_ids.to_pylist()
        return ids

    @cached_property
    def position(self) -> dict[str, int]:
        """Document id -> its index in this corpus."""
        return {identifier: index for index, identifier in enumerate(self.ids)}

    def iter_documents(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Documents ``start`` to ``stop`` (exclusive), one at a time."""
        return self._read(range(start, len(self) if stop is None else min(stop, len(self))))

    def texts(self, ids: Sequence[str]) -> list[str]:
        """The texts (title and text) of these documents. Raises KeyError for an unknown id."""
        indices = [self.position[i] for i in ids]
        ascending = sorted(set(indices))  # a file is read fastest from front to back
        found = {
            i: document.document_text for i, document in zip(ascending, self._read(ascending), strict=True)
        }
        return [found[i] for i in indices]

    def _read(self, indices: Sequence[int]) -> Iterator[Document]:
        documents = read_documents(self.path, [self.offsets[i] for i in indices])
        for index, document in zip(indices, documents, strict=True):
            if document.id != self.arrow_ids[index].as_py():
                raise changed_meanwhile(self.path)
            yield document

    def subset(self, indices: Sequence[int]) -> Corpus:
        """The documents at ``indices``, in that order."""
        import pyarrow as pa

        ids = self.arrow_ids.take(pa.array(indices, pa.int64()))
        offsets = array("q", [self.offsets[i] for i in indices])
        chosen = hashlib.sha256(offsets.tobytes()).hexdigest()
        return Corpus(self.path, ids, offsets, _digest(self.fingerprint, chosen))


@dataclass(frozen=True)
class Dataset:
    """Corpus, queries and judgements. ``fingerprint`` changes whenever any of them does.

    Without an official dev split one is cut from the train queries (a fixed ``DEV_SHARE`` by SHA-1 of the
    query id). ``queries("train")`` leaves out every dev query: what is chosen on dev was never trained on.
    """

    name: str
    folder: Path
    corpus: Corpus
    fingerprint: str
    warnings: tuple[str, ...]
    all_queries: dict[str, str]
    judgements: dict[str, Qrels]  # split -> qrels
    source: str = ""  # the URI that ``folder`` is this machine's copy of

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, dev and test that exist."""
        return tuple(self.judgements)

    def qrels(self, split: str) -> Qrels:
        """Query id -> document id -> relevance. Raises InputError for a split this data set lacks."""
        if split not in self.judgements:
            raise InputError(
                f"data set '{self.name}' has no split '{split}'; it has {', '.join(self.splits)}"
                + (" (dev is cut from train, which is missing too)" if split == "dev" else "")
            )
        return self.judgements[split]

    def queries(self, split: str) -> dict[str, str]:
        """Query id -> text of the judged queries of ``split``."""
        return {query_id: self.all_queries[query_id] for query_id in self.qrels(split)}

    def sample(self, split: str, *, queries: int, documents: int, seed: int = 0) -> Dataset:
        """A small view with only ``split``: so many of its queries over so many documents, always the same.

        All relevant documents of the chosen queries are in (even if they are more than ``documents``);
        distractors fill up the rest. Order is by SHA-256 of seed and id: independent of library versions.
        """
        if queries < 1 or documents < 1:
            raise InputError(f"a sample needs at least 1 query and 1 document, not {queries} and {documents}")
        qrels = self.qrels(split)
        chosen = sorted(sorted(qrels, key=lambda query_id: _draw(seed, query_id))[:queries])
        relevant = {
            document_id
            for query_id in chosen
            for document_id, score in qrels[query_id].items()
            if score > 0 and document_id in self.corpus.position
        }
        others = sorted((i for i in self.corpus.ids if i not in relevant), key=lambda i: _draw(seed, i))
        kept = relevant.union(others[: max(0, documents - len(relevant))])
        corpus = self.corpus.subset([index for index, i in enumerate(self.corpus.ids) if i in kept])
        return dataclasses.replace(
            self,
            name=f"{self.name}[{split}:{len(chosen)}x{len(corpus)}:{seed}]",
            corpus=corpus,
            fingerprint=_digest(self.fingerprint, split, str(len(chosen)), str(len(corpus)), str(seed)),
            all_queries={query_id: self.all_queries[query_id] for query_id in chosen},
            judgements={
                split: {q: {d: s for d, s in qrels[q].items() if d in kept or s > 0} for q in chosen}
            },
        )


def load_dataset(name_or_path: str | Path, *, queries: bool = True) -> Dataset:
    """``stdlib`` (built on first use), a BEIR folder or the URI of one (of which this machine then has a
    copy), or the name of a data set downloaded before.

    Without ``queries`` only the corpus is read and need be there: the data set has no split.

    Raises InputError for anything missing or malformed, naming file and line.
    """
    folder, name = _place(name_or_path)
    found = read_beir_folder(folder, name=name, queries=queries)
    return dataclasses.replace(found, source=str(name_or_path)) if storage.is_uri(name_or_path) else found


def dataset_files(name_or_path: str | Path) -> dict[str, Path]:
    """Name -> file of everything that ``load_dataset`` reads; nothing is read. Raises InputError for a data
    set that is not here."""
    folder, _ = _place(name_or_path)
    files = [folder / "queries.jsonl", *(folder / "qrels" / f"{split}.tsv" for split in _SPLITS)]
    judged = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return corpus_files(_corpus_file(folder)) | judged


def corpus_files(corpus: Path) -> dict[str, Path]:
    """The same of a corpus alone, a ``.jsonl`` or ``.parquet``. Raises InputError where it is not there."""
    files = part_files(corpus) if corpus.suffix == ".parquet" else [corpus]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"{corpus}: no such file")
    return {file.name: file for file in files}


def _place(name_or_path: str | Path) -> tuple[Path, str | None]:
    """The folder of a data set, and what it is called if not as its folder is."""
    if storage.is_uri(name_or_path):
        return copy_of(str(name_or_path)), None
    path = Path(name_or_path).expanduser()
    if str(name_or_path) == "stdlib":
        return build_stdlib(), "stdlib"
    if path.is_dir():
        return path, None
    if path.is_absolute() or str(name_or_path).startswith("."):
        raise InputError(
            f"data set '{name_or_path}': no such folder; give 'stdlib', a BEIR folder (corpus.jsonl, "
            "queries.jsonl, qrels/test.tsv), or a name of: effir-ray data list"
        )
    for name in (str(name_or_path), official_name(str(name_or_path))):
        if ".." not in path.parts and (data_folder() / name).is_dir():
            return data_folder() / name, name
    raise InputError(
        f"data set '{name_or_path}': no such folder, and nothing of that name in {data_folder()}; "
        f"give 'stdlib', a BEIR folder, or run: effir-ray data get {name_or_path}"
    )


def official_name(name: str) -> str:
    """BEIR's name of a data set that people write in other ways: ``DBPedia``, ``touche2020``."""
    whole, slash, part = name.lower().partition("/")
    return f"{_ALIASES.get(whole, whole)}{slash}{part}"


def read_beir_folder(folder: Path, *, name: str | None = None, queries: bool = True) -> Dataset:
    """Read and check a BEIR folder (without ``queries`` its corpus); ``name`` defaults to the folder's.

    What this process has read is remembered (see ``_once``) until a file of it changes.
    """
    folder = folder.resolve()
    corpus = _corpus_file(folder)
    parts = sorted(path.parent for path in folder.glob("*/corpus.jsonl"))
    if parts and not corpus.exists():
        names = ", ".join(f"{name or folder}/{part.name}" for part in parts)
        raise InputError(f"{folder}: holds several data sets; name one of its parts: {names}")
    files = part_files(corpus) if corpus.suffix == ".parquet" else [corpus]
    found = _once(folder, "corpus", files, lambda: _corpus_alone(folder, corpus))
    if queries:
        alone = found
        files = [*files, folder / "queries.jsonl", *(folder / "qrels" / f"{split}.tsv" for split in _SPLITS)]
        found = _once(folder, "whole", files, lambda: _with_queries(alone))
    return dataclasses.replace(found, name=name or folder.name)


def _corpus_file(folder: Path) -> Path:
    parquet = folder / "corpus.parquet"
    return parquet if parquet.exists() and not (folder / "corpus.jsonl").exists() else folder / "corpus.jsonl"


_REMEMBERED = 8  # corpora, with queries or without
_REMEMBERED_DOCUMENTS = 10_000_000
_SETTLED_NS = 2 * 10**9  # file systems tell times of change apart by up to 2 s (FAT)


@dataclass(frozen=True)
class _Reading:
    """``files``: size and time of change (ns) of each when it was read, None of one that was not there."""

    files: tuple[tuple[int, int] | None, ...]
    dataset: Dataset


_readings: OrderedDict[tuple[Path, str], _Reading] = OrderedDict()
_readings_lock = threading.Lock()


def _once(folder: Path, part: str, files: Sequence[Path], read: Callable[[], Dataset]) -> Dataset:
    """What ``read`` returns, remembered while the ``files`` that it reads keep their size and time of change.

    The data sets used last are kept, up to ``_REMEMBERED`` readings and ``_REMEMBERED_DOCUMENTS`` documents
    (a larger one alone). A document takes about 20 bytes beside its id, and 200 more once its corpus was
    asked for ``ids`` and ``position``. Files that changed a moment ago are not remembered: the next change
    could bear the same time.
    """
    now, states = time.time_ns(), tuple(_state(file) for file in files)
    with _readings_lock:
        known = _readings.get((folder, part))
        if known is not None and known.files == states:
            _readings.move_to_end((folder, part))
            return known.dataset
    dataset = read()
    if all(state is None or now - state[1] > _SETTLED_NS for state in states):
        with _readings_lock:
            _readings[folder, part] = _Reading(states, dataset)
            _readings.move_to_end((folder, part))
            while len(_readings) > _REMEMBERED or (len(_readings) > 1 and _too_many_documents()):
                _readings.popitem(last=False)
    return dataset


def _state(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None  # whoever reads it says so
    return status.st_size, status.st_mtime_ns


def _too_many_documents() -> bool:
    corpora = {id(reading.dataset.corpus): len(reading.dataset.corpus) for reading in _readings.values()}
    return len(corpora) > 1 and sum(corpora.values()) > _REMEMBERED_DOCUMENTS


def _corpus_alone(folder: Path, corpus: Path) -> Dataset:
    scan = scan_corpus(corpus)
    return Dataset(
        name=folder.name,
        folder=folder,
        corpus=Corpus(corpus, scan.ids, scan.offsets, scan.sha256),
        fingerprint=_digest(scan.sha256),
        warnings=scan.warnings,
        all_queries={},
        judgements={},
    )


def _with_queries(corpus: Dataset) -> Dataset:
    folder = corpus.folder
    queries = read_queries(folder / "queries.jsonl")
    files = {split: folder / "qrels" / f"{split}.tsv" for split in _SPLITS}
    files = {split: path for split, path in files.items() if path.is_file()}
    if not files:
        raise InputError(f"{folder / 'qrels'}: no train.tsv, dev.tsv or test.tsv; at least one is needed")
    documents = set(corpus.corpus.arrow_ids.to_pylist())  # not ``ids``: these need not stay
    judged = {split: read_qrels(path, queries, documents) for split, path in files.items()}
    warnings = [*corpus.warnings, *(w for part in judged.values() for w in part.warnings)]
    contents = [_file_digest(path) for path in (folder / "queries.jsonl", *files.values())]
    return dataclasses.replace(
        corpus,
        fingerprint=_digest(corpus.corpus.fingerprint, *files, *contents),
        warnings=tuple(warnings),
        all_queries=queries,
        judgements=_with_dev({split: part.qrels for split, part in judged.items()}),
    )


def _with_dev(judgements: dict[str, Qrels]) -> dict[str, Qrels]:
    """Cut dev from train where there is no official one; splits in the order train, dev, test.

    Queries of an official dev split that are in train as well are dev's alone.
    """
    train = judgements.get("train", {})
    if "dev" in judgements:
        own = {query_id: row for query_id, row in train.items() if query_id not in judgements["dev"]}
        judgements = judgements | ({"train": own} if train else {})
    if len(train) > 1 and "dev" not in judgements:
        rank = {query_id: int(hashlib.sha1(query_id.encode()).hexdigest(), 16) / 2**160 for query_id in train}
        dev = {query_id for query_id in train if rank[query_id] < DEV_SHARE} or {
            min(train, key=rank.__getitem__)
        }
        if len(dev) == len(train):
            dev.remove(max(train, key=rank.__getitem__))
        judgements = judgements | {
            "train": {query_id: row for query_id, row in train.items() if query_id not in dev},
            "dev": {query_id: row for query_id, row in train.items() if query_id in dev},
        }
    return {split: judgements[split] for split in _SPLITS if split in judgements}


def _draw(seed: int, identifier: str) -> str:
    return hashlib.sha256(f"{seed}:{identifier}".encode()).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
