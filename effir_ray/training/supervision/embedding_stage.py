"""Embeddings of many texts as stages: encoded once by a model, shard by shard, so a killed run resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from effir_ray.progress import progress
from effir_ray.stages import StageStore

if TYPE_CHECKING:
    from effir_ray.encoding.encoder import Encoder

Kind = Literal["query", "document"]


class Texts(Protocol):
    """A list of texts, or what reads one part of them at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Sequence[str]: ...


SHARD = 4096  # texts: at most so many are encoded twice after a kill
_FILE = "embeddings.npy"


def encode_texts(
    stages: StageStore,
    inputs: Mapping[str, Any],
    make_encoder: Callable[[], Encoder],
    texts: Texts,
    kind: Kind,
    *,
    description: str,
    max_length: int | None = None,
    shard_size: int | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Shards (shard_size or SHARD, d) float32 in the order of ``texts``, memory-mapped.

    ``inputs`` must determine ``texts`` and the encoder. Only if a shard is missing, its texts are asked for,
    and ``make_encoder`` is called, at most once.
    """
    encoder, shard_size = cache(make_encoder), shard_size or SHARD
    shards = []
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
            shards.append(np.load(folder / _FILE, mmap_mode="r"))
            bar.advance(part.stop - part.start)
    return shards


def load_encoder(model: str | Path) -> Encoder:
    """An encoder of any model that ``load_retriever`` takes, in ``encoder_dtype`` on this machine."""
    from effir_ray.encoding.encoder import as_encoder

    return as_encoder(model)


def encoder_dtype() -> str:
    """What ``load_encoder`` computes in on this machine: a part of what determines embeddings."""
    from effir_ray.hardware import detect

    return detect().dtype


def _encode(
    encoder: Callable[[], Encoder],
    texts: Texts,
    part: slice,
    kind: Kind,
    max_length: int | None,
    folder: Path,
) -> None:
    np.save(folder / _FILE, encoder().encode(texts[part], kind, max_length=max_length))
