"""The peak of this machine: FLOP/s of its best large matrix product, what MFU is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from effir_ray.encoding.projections import OneDnnProjection, has_one_dnn

_PEAK_SIZE = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices for ``gemm_peak``: large enough for the plateau, small enough to be quick."""


_PEAK_REPEATS = 5


def gemm_peak(
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of the best of a few large square matrix products (float32 unless ``dtype`` says else).

    On CPUs by torch.mm and by oneDNN with its own weight layout: which of them is faster depends on the
    processor.
    """
    device = torch.device(device)
    side = _PEAK_SIZE[device.type]
    # Drawn numbers, since equal ones cost a GPU less power; by a generator of its own, to move no seed.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=draw, device=device, dtype=dtype or torch.float32)
    b, out = a.clone(), torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    products: list[Callable[[], object]] = [multiply]
    if has_one_dnn(b):
        packed = OneDnnProjection(b, None)
        products.append(lambda: packed.project(a))
    with torch.inference_mode():
        for product in products:
            product()
        return 2 * side**3 / min(seconds_of(work, clock) for _ in range(_PEAK_REPEATS) for work in products)


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes."""
    started = clock()
    work()
    return clock() - started
