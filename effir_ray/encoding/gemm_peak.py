"""The peak of this machine: FLOP/s of its best large matrix product, what MFU is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from effir_ray.encoding.cpu_kernels import Rows, build
from effir_ray.encoding.cpu_products import Linear, make_product
from effir_ray.encoding.projections import Int8Projection, OneDnnProjection, has_one_dnn
from effir_ray.hardware import Computed

_PEAK_SIZE = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices for ``gemm_peak``: large enough for the plateau, small enough to be quick."""


_PEAK_REPEATS = 5


def gemm_peak(
    device: torch.device | str = "cpu",
    precision: Computed = "float32",
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of the best of a few large square matrix products.

    On CPUs by torch.mm, by oneDNN with its own weight layout and by the compiled kernels: which of them is
    fastest depends on the processor. int8: operations a second on bytes, on CPUs.
    """
    device = torch.device(device)
    side = _PEAK_SIZE[device.type]
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    # Drawn numbers, since equal ones cost a GPU less power; by a generator of its own, to move no seed.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=draw, device=device, dtype=dtype)
    b, out = a.clone(), torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    products: list[Callable[[], object]] = []
    kernels = build().kernels if device.type == "cpu" else None
    if kernels is not None and kernels.multiplies(precision):
        product = make_product(Linear(weight=b.float()), kernels, dtype, quantized=precision == "int8")
        rows = kernels.to_bytes(a) if precision == "int8" else Rows(a)
        products.append(lambda: product(rows))
    if precision == "int8":
        in_torch = Int8Projection(b, None)
        products.append(lambda: in_torch.project(a))
    else:
        products.append(multiply)
        if has_one_dnn(b):
            laid_out = OneDnnProjection(b, None)
            products.append(lambda: laid_out.project(a))
    with torch.inference_mode():
        for work in products:
            work()
        return 2 * side**3 / min(seconds_of(work, clock) for _ in range(_PEAK_REPEATS) for work in products)


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes."""
    started = clock()
    work()
    return clock() - started
