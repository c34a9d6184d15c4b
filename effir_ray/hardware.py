"""What this machine has, what that means for a run, and why."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from effir_ray.caches import cache_folder
from effir_ray.errors import InputError
from effir_ray.files import write_whole

Precision = Literal["float32", "bfloat16", "int8"]
"""What an encoder can be asked to multiply in."""

Computed = Precision | Literal["float16"]
"""What products may have been multiplied in: float16 is a GPU's, where a model was loaded so."""


PINNED = "EFFIR_RAY_PRECISION"
"""Environment: float32 or bfloat16, what is multiplied in wherever nothing else says so."""

_WORTHWHILE = 1.3  # times as fast as float32 its products must be before bfloat16 is chosen


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """``dtype``: what models are loaded in; ``precision``: what encoders and trainings multiply in, which on
    CPUs differs: weights stay float32 there. ``reasons`` says for every choice what it was made from;
    ``name`` goes into result rows.
    """

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    precision: Literal["float32", "bfloat16"]
    threads: int
    name: str
    reasons: dict[str, str] = field(default_factory=dict)


def detect() -> Hardware:
    """Look at the machine. Imports torch. Raises InputError for a wrong ``EFFIR_RAY_PRECISION``."""
    import torch

    cores, pinned = available_cores(), pinned_precision()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gpu = torch.cuda.get_device_name(0)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "the GPU computes bfloat16 natively" if bfloat16 else "no native bfloat16"
        found = pinned or ("bfloat16" if bfloat16 else "float32")
        return Hardware(
            device="cuda",
            dtype=found,
            precision=found,
            threads=cores,
            name=f"{count} x {gpu}",
            reasons={
                "device": f"torch {torch.__version__} sees {count} CUDA device(s)",
                "precision": f"{PINNED} is set" if pinned else why,
                "threads": f"{cores} cores are available to this process",
            },
        )
    precision, why = cpu_precision()
    return Hardware(
        device="cpu",
        dtype="float32",
        precision=precision,
        threads=cores,
        name=f"{cores} x {cpu_name()}",
        reasons={
            "device": f"torch {torch.__version__} sees no CUDA device",
            "precision": why,
            "threads": f"{cores} cores are available to this process",
        },
    )


def cpu_precision() -> tuple[Literal["float32", "bfloat16"], str]:
    """What to multiply in on this machine's CPU, whatever else it has, and why."""
    pinned = pinned_precision()
    return (pinned, f"{PINNED} is set") if pinned else _cpu_precision()


def pinned_precision() -> Literal["float32", "bfloat16"] | None:
    """What ``EFFIR_RAY_PRECISION`` says. Raises InputError where it is neither of the two."""
    pinned = os.environ.get(PINNED, "")
    known: dict[str, Literal["float32", "bfloat16"] | None] = {
        "": None,
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    if pinned not in known:
        raise InputError(f"{PINNED} is '{pinned}'; expected float32 or bfloat16, or nothing")
    return known[pinned]


@lru_cache(maxsize=1)
def _cpu_precision() -> tuple[Literal["float32", "bfloat16"], str]:
    """By what instructions there are, and by a measurement of some milliseconds whether they are worth it."""
    if "avx512_bf16" not in cpu_features():  # processors with AMX have it too
        return "float32", "the processor has no products of bfloat16 (AVX512_BF16 or AMX)"
    if compiler() is None:
        return "float32", "bfloat16 on CPUs needs a C++ compiler, and none is installed"
    ratio = _bfloat16_speed()
    if ratio < _WORTHWHILE:
        return "float32", f"products of bfloat16 are {ratio:.1f} times as fast as float32's here"
    return "bfloat16", f"its products are {ratio:.1f} times as fast as float32's here"


def _bfloat16_speed() -> float:
    """How many times as fast as float32's its products are on this kind of processor. Measured once and noted
    in the user's cache: all processes must choose alike, whatever else the machine does then.
    """
    import torch

    identity = "\0".join((torch.__version__, cpu_name(), *sorted(cpu_features())))
    note = cache_folder() / "precision" / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError, ValueError):
        return float(note.read_text())
    ratio = _measured_bfloat16_speed()
    with suppress(OSError):  # a folder that cannot be written to: every process measures
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, f"{ratio:.3f}")
    return ratio


def _measured_bfloat16_speed() -> float:
    """The best of a few products that take turns, on one thread and by its own time: no other work on the
    machine, and no waiting of threads for each other, is counted.
    """
    import torch

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            left, right = torch.randn(512, 384, generator=draw), torch.randn(384, 1536, generator=draw)
            for _ in range(8):
                for dtype in best:
                    x, y = left.to(dtype), right.to(dtype)
                    started = time.thread_time()
                    x @ y
                    best[dtype] = min(best[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] / best[torch.bfloat16]


def compiler() -> str | None:
    """The C++ compiler that compiled parts are built with."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def available_cores() -> int:
    """Cores this process may run on (affinity and container limits included where the system tells)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """What instructions this processor has, as Linux names them; empty where that is not told."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, listed = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(listed.split())
    return frozenset()


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
