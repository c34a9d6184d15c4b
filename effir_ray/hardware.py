"""What this machine has, what that means for a run, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """``reasons`` says for every choice what it was made from; ``name`` goes into result rows."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    threads: int
    name: str
    reasons: dict[str, str] = field(default_factory=dict)


def detect() -> Hardware:
    """Look at the machine. Imports torch."""
    import torch

    cores = available_cores()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gpu = torch.cuda.get_device_name(0)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(
            device="cuda",
            dtype="bfloat16" if bfloat16 else "float32",
            threads=cores,
            name=f"{count} x {gpu}",
            reasons={
                "device": f"torch {torch.__version__} sees {count} CUDA device(s)",
                "dtype": "the GPU computes bfloat16 natively" if bfloat16 else "no native bfloat16",
                "threads": f"{cores} cores are available to this process",
            },
        )
    return Hardware(
        device="cpu",
        dtype="float32",
        threads=cores,
        name=f"{cores} x {cpu_name()}",
        reasons={
            "device": f"torch {torch.__version__} sees no CUDA device",
            "dtype": "bfloat16 is several times slower than float32 on CPUs without AMX",
            "threads": f"{cores} cores are available to this process",
        },
    )


def available_cores() -> int:
    """Cores this process may run on (affinity and container limits included where the system tells)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
