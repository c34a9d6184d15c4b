"""Long work in parts, each a stage of its own: a killed run resumes after the last finished part.

``encode_texts`` gives embeddings of many texts, shard by shard; ``in_chunks`` works through training pairs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from effir_ray.data.pairs import Pair, write_pairs
from effir_ray.encoding.encoder import Encoder, as_encoder
from effir_ray.hardware import detect
from effir_ray.models.folder import TextKind
from effir_ray.progress import progress
from effir_ray.stages import StageStore

CHUNK = 2000  # queries: at most so many are worked on twice after a kill
SHARD = 4096  # texts: at most so many are encoded twice after a kill
PAIRS_FILE = "pairs.jsonl"
_FILE = "embeddings.npy"


class Texts(Protocol):
    """A list of texts, or what reads one part of them at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Sequence[str]: ...


class Shards(Sequence[npt.NDArray[np.float32]]):
    """Shards (shard_size, d) float32, the last one maybe shorter, memory-mapped while they are looked at.

    A map holds its file open, and a process may have only about a thousand of these: less than the shards of
    five million texts.
    """

    def __init__(self, files: Sequence[Path], shard_size: int) -> None:
        self._files, self._shard_size = tuple(files), shard_size

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, shard: int) -> npt.NDArray[np.float32]: ...
    @overload
    def __getitem__(self, shard: slice) -> Shards: ...
    def __getitem__(self, shard: int | slice) -> npt.NDArray[np.float32] | Shards:
        if isinstance(shard, slice):
            return Shards(self._files[shard], self._shard_size)
        embeddings: npt.NDArray[np.float32] = np.load(self._files[shard], mmap_mode="r")
        return embeddings

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(len(indices), d): rows by their number over all shards."""
        shards, inside = np.divmod(indices, self._shard_size)
        order = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        parts = [self[int(shards[part[0]])][inside[part]] for part in np.split(order, starts[1:])]
        return np.concatenate(parts)[np.argsort(order, kind="stable")]


def encode_texts(
    stages: StageStore,
    inputs: Mapping[str, Any],
    make_encoder: Callable[[], Encoder],
    texts: Texts,
    kind: TextKind,
    *,
    description: str,
    max_length: int | None = None,
    shard_size: int | None = None,
) -> Shards:
    """The embeddings of ``texts`` in their order, in shards of ``shard_size`` or SHARD rows.

    ``inputs`` must determine ``texts`` and the encoder. Only if a shard is missing, its texts are asked for,
    and ``make_encoder`` is called, at most once.
    """
    encoder, shard_size = cache(make_encoder), shard_size or SHARD
    files = []
    with progress(description, total=len(texts), unit="texts") as bar:
        for start in range(0, len(texts), shard_size):
            part = slice(start, min(start + shard_size, len(texts)))
            key = {
                **inputs,
                "kind": kind,
                "max_length": max_length,
                "start": part.start,
                "stop": part.stop,
            }
            folder = stages.run("embeddings", key, partial(_encode, encoder, texts, part, kind, max_length))
            files.append(folder / _FILE)
            bar.advance(part.stop - part.start)
    return Shards(files, shard_size)


def load_encoder(model: str | Path) -> Encoder:
    """An encoder of any model that ``load_retriever`` takes, in ``encoder_dtype`` on this machine."""
    return as_encoder(model)


def encoder_dtype() -> str:
    """What ``load_encoder`` computes in on this machine: a part of what determines embeddings."""
    return detect().precision


def _encode(
    encoder: Callable[[], Encoder],
    texts: Texts,
    part: slice,
    kind: TextKind,
    max_length: int | None,
    folder: Path,
) -> None:
    np.save(folder / _FILE, encoder().encode(texts[part], kind, max_length=max_length))


Process = Callable[[Sequence[Pair]], list[Pair]]


def in_chunks(
    stages: StageStore,
    stage: str,
    inputs: Mapping[str, Any],
    pairs: Sequence[Pair],
    make_process: Callable[[], Process],
    *,
    description: str,
    size: int | None = None,
) -> Path:
    """The JSONL file of the stage: ``process`` applied to ``pairs``, ``size`` (default ``CHUNK``) at a time.

    ``inputs`` must determine ``pairs`` and ``process``. ``make_process`` is called at most once, and only if
    a chunk is missing (loading a model or building an index is not for nothing).
    """
    process, size = cache(make_process), size or CHUNK
    parts = [
        (start, {**inputs, "start": start, "stop": min(start + size, len(pairs))})
        for start in range(0, len(pairs), size)
    ]

    def build_part(start: int, folder: Path) -> None:
        write_pairs(process()(pairs[start : start + size]), folder / PAIRS_FILE)

    def build(folder: Path) -> None:
        with (
            progress(description, total=len(pairs), unit="queries") as bar,
            (folder / PAIRS_FILE).open("wb") as out,
        ):
            for start, part in parts:
                made = stages.run(f"{stage}-part", part, partial(build_part, start))
                out.write((made / PAIRS_FILE).read_bytes())
                bar.advance(part["stop"] - start)

    folder = stages.run(stage, inputs, build)
    for _, part in parts:  # the whole holds them now
        shutil.rmtree(stages.path(f"{stage}-part", part), ignore_errors=True)
    return folder / PAIRS_FILE
