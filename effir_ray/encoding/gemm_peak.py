"""The peak of this machine: FLOP/s of its best large matrix product, what MFU is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from effir_ray.encoding.cpu_kernels import Rows
from effir_ray.encoding.cpu_pass import Product, to_byte_rows
from effir_ray.hardware import Precision

_PEAK_SIZE = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices for ``gemm_peak``: large enough for the plateau, small enough to be quick."""


_PEAK_REPEATS = 5


def gemm_peak(
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of the best of a few large square matrix products.

    On CPUs by torch.mm and by oneDNN with its own weight layout: which of them is faster depends on the
    processor. int8: operations a second of bytes by such weights, CPUs only.
    """
    device = torch.device(device)
    side = _PEAK_SIZE[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    # Drawn numbers, since equal ones cost a GPU less power; by a generator of its own, to move no seed.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=draw, device=device, dtype=dtype)
    b, out = a.clone(), torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    products: list[Callable[[], object]] = [multiply] if precision != "int8" else []
    if device.type == "cpu":
        product = Product(b, dtype, quantized=precision == "int8")
        rows = to_byte_rows(a) if precision == "int8" else Rows(a)
        products.append(lambda: product(rows))
    with torch.inference_mode():
        for work in products:
            work()
        return 2 * side**3 / min(seconds_of(work, clock) for _ in range(_PEAK_REPEATS) for work in products)


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes."""
    started = clock()
    work()
    return clock() - started
