"""Running a function of (retriever, batch) over many batches: in this process or on Ray actors."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever

B = TypeVar("B")
R = TypeVar("R")


class Mapper(Protocol):
    """Results come in the order of the batches, whoever computed them."""

    def __call__(self, function: Callable[[Retriever, B], R], batches: Iterable[B]) -> Iterator[R]: ...


@contextmanager
def mapper(
    retriever: Retriever,
    *,
    workers: int | None = None,
    scratch: Path | None = None,
    address: str | None = None,
) -> Iterator[Mapper]:
    """``workers=None`` computes here; a number starts that many Ray actors, each with its own copy of the
    model.

    The model travels as a checkpoint folder under ``scratch`` (a temporary folder by default): on a cluster
    of several machines give a folder they all see. Raises InputError when the cluster has fewer CPUs than
    workers.
    """
    if workers is None:
        yield lambda function, batches: (function(retriever, batch) for batch in batches)
        return
    if workers < 1:
        raise InputError(f"{workers} workers; expected at least 1")
    with tempfile.TemporaryDirectory(prefix="effir-ray-", dir=scratch) as folder:
        from effir_ray.models.checkpoint import save_checkpoint

        path = Path(folder) / "model"
        save_checkpoint(retriever, path)
        with _actors(path, retriever, workers, address) as actors:
            yield lambda function, batches: _spread(actors, function, batches)


@contextmanager
def _actors(path: Path, retriever: Retriever, workers: int, address: str | None) -> Iterator[list[Any]]:
    import ray

    from effir_ray.cluster.connection import connect

    connect(address)
    available = int(ray.cluster_resources().get("CPU", 0))
    if workers > available:
        raise InputError(f"{workers} workers asked for, the Ray cluster has {available} CPUs; ask for fewer")
    on_gpu = retriever.model.device.type == "cuda"
    actor = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(_Worker)
    dtype = str(retriever.model.dtype).removeprefix("torch.")
    actors = [actor.remote(str(path), dtype, "cuda" if on_gpu else "cpu") for _ in range(workers)]
    try:
        yield actors
    finally:
        for handle in actors:
            ray.kill(handle)


class _Worker:
    """One copy of the model."""

    def __init__(self, path: str, dtype: str, device: str) -> None:
        from effir_ray.models.retriever import load_retriever

        self.retriever = load_retriever(path, dtype=dtype, device=device)

    def compute(self, function: Callable[[Retriever, B], R], batch: B) -> R:
        return function(self.retriever, batch)


def _spread(actors: list[Any], function: Callable[[Retriever, B], R], batches: Iterable[B]) -> Iterator[R]:
    """Two batches in flight an actor: memory stays bounded and nobody waits for the driver."""
    import ray

    pending: deque[Any] = deque()
    for number, batch in enumerate(batches):
        if len(pending) >= 2 * len(actors):
            yield ray.get(pending.popleft())
        pending.append(actors[number % len(actors)].compute.remote(function, batch))
    while pending:
        yield ray.get(pending.popleft())
