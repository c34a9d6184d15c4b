"""A corpus to a folder of embeddings: resumable shard by shard, bounded in memory, by workers on Ray Data.

Ray Data only carries shard numbers and where their documents lie; its actors read the documents, encode
them and write the shard themselves. What is on disk is the only state: a run that was killed at any point
goes on where its last finished shard was, and its embeddings are bit for bit those of an undisturbed run,
because a shard is always encoded as a whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import resource
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effir_ray.cluster.connection import is_connected
from effir_ray.cluster.devices import on_device, room, uses_gpus
from effir_ray.cluster.lost import in_one_line, outlive_ray, watched
from effir_ray.cluster.probe import Shared, check_shared, everywhere
from effir_ray.data.beir_files import Document, changed_meanwhile, read_documents
from effir_ray.data.datasets import Corpus, Dataset, corpus_files, load_dataset
from effir_ray.encoding.embedding_shards import (
    CorpusEmbeddings,
    Encoding,
    ShardFolder,
    ShardRecord,
    StoredType,
    differences,
)
from effir_ray.encoding.encoder import Encoder, as_encoder
from effir_ray.encoding.gemm_peak import gemm_peak
from effir_ray.errors import InputError, LostProcess, TrialFailure
from effir_ray.hardware import Computed, Precision, available_cores, detect
from effir_ray.leases import Held, Lease, aloud, lease
from effir_ray.mirrors import copy_of
from effir_ray.models.names import backbone_fingerprint, model_reads
from effir_ray.progress import progress
from effir_ray.stages import StageStore

SHARD_SIZE = 1024
"""Documents a shard: seconds of work on a GPU, minutes on a CPU; what a killed worker loses at most."""


_WRITER = ".writer"

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (InputError, TrialFailure, LostProcess)
}


def encode_corpus(
    model: str | Path,
    dataset: Dataset | str | Path,
    out: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    max_length: int | None = None,
    dtype: StoredType = "float32",
    precision: Precision | None = None,
    address: str | None = None,
    stages: StageStore | None = None,
    held: Lease | None = None,
) -> CorpusEmbeddings:
    """Encode all documents of ``dataset`` with ``model`` (a name or a folder workers can read) into ``out``.

    ``precision``: what is multiplied in, see ``Encoder``; chosen by the machine without one.
    A folder needs no queries: its ``corpus.jsonl`` or ``corpus.parquet`` will do.
    Runs on the Ray cluster at ``address`` (this machine without one), one GPU a worker where there are GPUs;
    one worker without an address is this process. ``stages``: the store that a stage's ``model`` lies in,
    from which workers of other machines get it. A second call returns what is there, without Ray and without
    loading the model.
    ``held``: the lease of the stage whose folder has ``out``. Who holds it is the only writer, whatever a
    stopped predecessor left; every shard is written while it is held.

    Raises InputError for bad arguments, for an ``out`` that holds other embeddings, and while another run
    writes to it; TrialFailure when one text alone does not fit a worker's memory; LostProcess when another
    process took the work over.
    """
    if shard_size < 1 or workers < 1:
        raise InputError(f"shard_size and workers must be at least 1, not {shard_size} and {workers}")
    if dtype not in ("float32", "float16"):
        raise InputError(f"dtype '{dtype}' cannot be stored; expected float32 or float16")
    data = dataset if isinstance(dataset, Dataset) else load_dataset(dataset, queries=False)
    encoding = Encoding(
        model=str(model),
        model_fingerprint=backbone_fingerprint(model),
        dataset=data.name,
        corpus_fingerprint=data.corpus.fingerprint,
        documents=len(data.corpus),
        shard_size=shard_size,
        max_length=max_length,
        dtype=dtype,
        precision=precision,
    )
    folder = ShardFolder(out)
    if not _complete(folder, encoding):
        with _only_writer(folder, held) as mine:
            _prepare(folder, encoding)
            missing = sorted(set(range(encoding.shards)) - folder.finished())
            _encode_missing(folder, encoding, data, missing, workers, address, stages, mine)
    return CorpusEmbeddings(folder)


def _complete(folder: ShardFolder, encoding: Encoding) -> bool:
    found = folder.header()
    return (
        found is not None
        and not differences(found, encoding)
        and (folder.finished() >= set(range(encoding.shards)))
    )


def _prepare(folder: ShardFolder, encoding: Encoding) -> None:
    """A new folder gets its header; an old one must be for the same embeddings."""
    found = folder.header()
    if found is None:
        folder.write_header(encoding)
        return
    different = differences(found, encoding)
    if different:
        listed = "; ".join(f"{name} is {old}, now {new}" for name, (old, new) in different.items())
        raise InputError(
            f"{folder.location}: holds embeddings of '{found.dataset}' by '{found.model}', not of "
            f"'{encoding.dataset}' by '{encoding.model}' ({listed}); choose another output folder"
        )
    folder.remove_leftovers()


@contextmanager
def _only_writer(folder: ShardFolder, held: Lease | None) -> Iterator[Lease | None]:
    """Two runs at once would do every shard twice."""
    if held is not None or folder.local is None:  # object stores have no leases; shards there are put whole
        yield held
        return
    with ExitStack() as stack:
        try:
            waiting = aloud(folder.location)
            mine = stack.enter_context(lease(folder.local, _WRITER, waiting=waiting, wait=False))
        except Held as other:
            where = f", on {other.owner}" if other.owner else ""
            raise InputError(
                f"{folder.location}: another run is writing here{where}; wait for it or stop it"
            ) from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"{folder.location}: cannot be written: {error}") from None
        yield mine


def _encode_missing(
    folder: ShardFolder,
    encoding: Encoding,
    data: Dataset,
    missing: list[int],
    workers: int,
    address: str | None,
    stages: StageStore | None,
    held: Lease | None,
) -> None:
    if not missing:
        return
    corpus = data.corpus
    workers = min(workers, len(missing))
    reads = model_reads(encoding.model) | {f"data '{encoding.dataset}'": partial(corpus_files, corpus.path)}
    if workers == 1 and not _elsewhere(address):
        with everywhere(check_shared(folder.local, reads)):
            on_device(_encode_here, folder, encoding, corpus, missing, held)
        return

    def work() -> None:
        if left := sorted(set(range(encoding.shards)) - folder.finished()):
            shared = check_shared(folder.local, reads)
            _spread(folder, encoding, data, left, workers, stages, held, shared)

    goes_on = f"run it again to go on with {folder.location}"
    outlive_ray(work, address, restart=not is_connected(), goes_on=goes_on)


def _spread(
    folder: ShardFolder,
    encoding: Encoding,
    data: Dataset,
    missing: list[int],
    workers: int,
    stages: StageStore | None,
    held: Lease | None,
    shared: Shared | None,
) -> None:
    """Encode the ``missing`` shards in ``workers`` actors of the Ray that this process is connected to."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    corpus, resources = data.corpus, _resources(workers)
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its ERROR: the traceback of what is raised
    tasks = ray.data.from_items(
        [_task(corpus, encoding.rows(shard), shard) for shard in missing], override_num_blocks=len(missing)
    )
    done = tasks.map_batches(
        _Worker,
        batch_size=1,
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_kwargs={
            "folder": folder,
            "encoding": encoding,
            "path": corpus.path,
            "workers_a_node": _workers_a_node(workers, resources),
            "computed_in": _computed_in(folder),
            "stages": stages,
            "source": data.source,
            "held": held,
            "shared": shared,
        },
        **resources,
    )
    rows = iter(done.iter_rows())
    with in_one_line("encoding"):
        _follow(iter(partial(watched, partial(next, rows, None)), None), encoding, missing, workers)


def _elsewhere(address: str | None) -> bool:
    """Whether a cluster is named, or this process is on one of several nodes that have only CPUs: then the
    work is spread, and counted, as Ray places it. On a GPU it is where one is reserved."""
    if address or not is_connected():
        return bool(address or os.environ.get("RAY_ADDRESS"))
    import ray

    able = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return len(able) > 1 and not uses_gpus()


def _encode_here(
    folder: ShardFolder, encoding: Encoding, corpus: Corpus, missing: list[int], held: Lease | None
) -> None:
    """One worker alone is this process: starting another takes longer than encoding a small corpus."""
    encoder = _ShardEncoder(folder, encoding, corpus.path, 1, _computed_in(folder), held)
    tasks = (_task(corpus, encoding.rows(shard), shard) for shard in missing)
    done = (encoder({name: [value] for name, value in task.items()}) for task in tasks)
    rows = ({name: values[0] for name, values in figures.items()} for figures in done)
    threads = torch.get_num_threads()
    try:
        _follow(rows, encoding, missing, 1)
    finally:
        torch.set_num_threads(threads)  # a worker of its own would not have touched them


def _follow(done: Iterator[dict[str, Any]], encoding: Encoding, missing: list[int], workers: int) -> None:
    """Show how far ``workers`` have come with the ``missing`` shards; raise what went wrong with one."""
    documents = sum(len(encoding.rows(shard)) for shard in missing)
    started, tokens, flops = time.monotonic(), 0, 0.0
    with progress("Encoding", total=documents, unit="docs") as bar:
        for row in done:
            if row["problem"]:
                raise _ERRORS.get(row["error"], RuntimeError)(row["problem"])
            if row["warning"]:  # Python shows it once
                warnings.warn(row["warning"], RuntimeWarning, stacklevel=3)
            tokens, flops = tokens + int(row["tokens"]), flops + row["flops"]
            seconds = time.monotonic() - started
            mfu = flops / seconds / (workers * row["gemm_peak"])
            figures = {"tokens_per_s": tokens / seconds, "mfu": mfu, "precision": row["precision"]}
            bar.advance(int(row["documents"]), **figures)


def _computed_in(folder: ShardFolder) -> Computed | None:
    """The type that the shards so far were computed in; all have the same."""
    return next((folder.record(shard).computed_in for shard in sorted(folder.finished())), None)


def _task(corpus: Corpus, rows: range, shard: int) -> dict[str, Any]:
    """What a worker needs to read the documents ``rows``.

    Kept small: the tasks of a whole corpus exist at once, and a worker's memory counts every page of the
    object store that it has read.
    """
    offsets = np.frombuffer(corpus.offsets, dtype=np.int64)[rows.start : rows.stop]
    steps = zlib.compress(np.diff(offsets, prepend=0).tobytes())
    ids = corpus.arrow_ids.slice(rows.start, len(rows)).to_pylist()
    return {"shard": shard, "offset_steps": steps, "ids_sha256": _ids_sha256(ids)}


def _documents(path: Path, offset_steps: bytes, ids_sha256: str) -> list[Document]:
    """The documents of a task. Raises InputError where others stand in their place now."""
    steps = np.frombuffer(zlib.decompress(offset_steps), dtype=np.int64)
    offsets = np.cumsum(steps).tolist()
    documents = list(read_documents(path, offsets))
    if _ids_sha256([document.id for document in documents]) != ids_sha256:
        raise changed_meanwhile(path)
    return documents


def _ids_sha256(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def _resources(workers: int) -> dict[str, float]:
    """What one actor reserves. Raises InputError for more workers than the cluster can ever run.

    A worker reserves one core and computes on its share of the node's: a larger reservation would wait
    forever beside any other job.
    """
    return {"num_cpus": 1, "num_gpus": 1} if room(workers).gpus else {"num_cpus": 1}


def _workers_a_node(workers: int, resources: dict[str, float]) -> int:
    """How many of ``workers`` share a node. A head that only schedules has no room for any."""
    import ray

    kind = "GPU" if "num_gpus" in resources else "CPU"
    able = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= 1]
    return -(-workers // max(1, len(able)))


@cache
def _peak_of_this_process(device: torch.device, precision: Computed) -> float:
    """Measured once: a study's processes encode for one trial after the other."""
    return gemm_peak(device, precision)


_NO_FIGURES: dict[str, Any] = {
    "documents": 0,
    "tokens": 0,
    "flops": 0.0,
    "gemm_peak": 1.0,
    "warning": "",
    "precision": "",
    "error": "",
    "problem": "",
}


class _ShardEncoder:
    """The actor: loads the model once by its path, then encodes and writes one shard a call."""

    def __init__(
        self,
        folder: ShardFolder,
        encoding: Encoding,
        path: Path,
        workers_a_node: int,
        computed_in: Computed | None,
        held: Lease | None = None,
        stages: StageStore | None = None,
        source: str = "",
        shared: Shared | None = None,
    ) -> None:
        if source and not path.exists():  # the data set is copied to this machine too
            copy_of(source)
        self._folder, self._encoding, self._path, self._held = folder, encoding, path, held
        self._stages, self._shared = stages, shared
        self._workers_a_node, self._computed_in = workers_a_node, computed_in

    @cached_property
    def _encoder(self) -> Encoder:
        """Made at the first shard, not with the actor: there an InputError would end as a dead actor."""
        asked, begun = self._encoding.precision, self._computed_in
        torch.set_num_threads(max(1, available_cores() // self._workers_a_node))
        going_on = None if begun == "float16" else begun  # a GPU's, which nobody can ask for
        model = self._encoding.model
        model = self._stages.local(model) if self._stages else model
        encoder = as_encoder(model, precision=asked or going_on)
        if begun in (None, encoder.precision):
            return encoder
        raise InputError(
            f"{self._folder.location}: its shards so far were computed in {begun}, this worker "
            f"({detect().name}) computes in {encoder.precision}; choose another output folder"
        )

    @cached_property
    def _gemm_peak(self) -> float:
        return _peak_of_this_process(self._encoder.retriever.model.device, self._encoder.precision)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row of ``_task`` in, one row of figures out.

        What is wrong travels as a value: Ray would drop the exception and keep its traceback.
        """
        shard, steps, ids = int(batch["shard"][0]), batch["offset_steps"][0], str(batch["ids_sha256"][0])
        figures = dict(_NO_FIGURES)
        try:
            if self._shared is not None:
                self._shared.check()
            before = self._encoder.flops_seen
            record = self._encode(shard, _documents(self._path, steps, ids))
            figures |= {"documents": record.documents, "tokens": record.tokens, "gemm_peak": self._gemm_peak}
            figures["flops"] = float(self._encoder.flops_seen - before)
            figures |= {"warning": self._encoder.warning, "precision": self._encoder.precision}
        except tuple(_ERRORS.values()) as error:
            figures |= {"error": type(error).__name__, "problem": str(error)}
        return {name: [value] for name, value in figures.items()}

    def _encode(self, shard: int, documents: list[Document]) -> ShardRecord:
        before, started = self._encoder.tokens_seen, time.perf_counter()
        texts = [document.document_text for document in documents]
        embeddings = self._encoder.encode(texts, "document", max_length=self._encoding.max_length)
        record = ShardRecord(
            shard=shard,
            documents=len(texts),
            dimension=embeddings.shape[1],
            tokens=self._encoder.tokens_seen - before,
            seconds=time.perf_counter() - started,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            computed_in=self._encoder.precision,
        )
        ids = [document.id for document in documents]
        if self._held is not None:
            self._held.check()
        self._folder.write_shard(record, ids, embeddings, self._encoding.dtype)
        return record


class _Worker(_ShardEncoder):
    """One of Ray Data's, which would put advice of its own in the place of what an error says."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(batch)
        except Exception as error:
            name = type(error).__name__
            figures = _NO_FIGURES | {"error": name, "problem": f"{name} on {platform.node()}: {error}"}
            return {name: [value] for name, value in figures.items()}
