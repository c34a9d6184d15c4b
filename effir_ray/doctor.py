"""What this machine offers to effir-ray, and why each choice was made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from effir_ray.caches import data_folder
from effir_ray.encoding.cpu_kernels import build
from effir_ray.encoding.gemm_peak import gemm_peak
from effir_ray.evaluation.index import faiss_gpus
from effir_ray.hardware import Hardware, Precision, compiler, detect

PACKAGES = (
    "effir-ray",
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "optuna",
    "pyarrow",
    "duckdb",
    "beir",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``ok`` False: something does not work; ``reason`` then says what to do about it."""

    subject: str
    found: str
    reason: str
    ok: bool = True


def diagnose() -> list[Finding]:
    """Look at hardware, optional parts and versions. Starts nothing, and writes nothing but the compiled
    kernels of encoding, where they are not there yet."""
    cluster = [_ray(), _token()]
    return [*_hardware(), _faiss(), *_deepspeed(), *cluster, _memory_and_disk(), _data(), *_versions()]


def _hardware() -> list[Finding]:
    hardware = detect()
    values = {"device": hardware.device, "precision": hardware.precision, "threads": str(hardware.threads)}
    machine = Finding(
        subject="machine", found=hardware.name, reason=f"{platform.system()} {platform.machine()}"
    )
    return [
        machine,
        *(Finding(subject=k, found=v, reason=hardware.reasons.get(k, "")) for k, v in values.items()),
        *(_products(hardware) if hardware.device == "cpu" else []),
    ]


def _products(hardware: Hardware) -> list[Finding]:
    """What this processor multiplies in, and how fast."""
    built = build()
    kinds: list[Precision] = ["float32"]
    if built.kernels is not None and built.kernels.has_bfloat16:
        kinds.append("bfloat16")
    if built.kernels is not None and built.kernels.has_bytes:
        kinds.append("int8")
    peaks = [f"{kind} {gemm_peak('cpu', kind) / 1e9:,.0f}" for kind in kinds]
    return [
        Finding(
            subject="compiled kernels",
            found="none" if built.kernels is None else "yes",
            reason=built.reason,
            ok=built.kernels is not None,
        ),
        Finding(
            subject="matrix products",
            found=", ".join(peaks) + " GFLOP/s",
            reason=f"measured now on {hardware.threads} threads; other work on the machine lowers them",
        ),
    ]


def _faiss() -> Finding:
    if importlib.util.find_spec("faiss") is None:
        return Finding(
            subject="exact search",
            found="torch",
            reason="FAISS is not installed; results are the same. To have it: pip install 'effir-ray[cpu]'",
        )
    import faiss
    import torch

    if torch.cuda.is_available() and not faiss_gpus():
        reason = f"FAISS {faiss.__version__} is a build for CPUs; results are the same"
        return Finding(subject="exact search", found="torch on GPU", reason=reason)
    gpus = faiss_gpus()
    return Finding(
        subject="exact search",
        found=f"FAISS {faiss.__version__} on {f'{gpus} GPU(s)' if gpus else 'CPU'}",
        reason="installed",
    )


def _deepspeed() -> list[Finding]:
    if importlib.util.find_spec("deepspeed") is None:
        reason = "DeepSpeed is not installed: pip install deepspeed"
        return [Finding(subject="training engine", found="PyTorch DDP", reason=reason, ok=False)]
    version = importlib.metadata.version("deepspeed")
    command = compiler()
    return [
        Finding(
            subject="training engine",
            found=f"DeepSpeed {version}",
            reason="installed; where it does not start, training says so and goes on with PyTorch DDP",
        ),
        Finding(
            subject="C++ compiler",
            found=command or "none",
            reason="builds the kernels of encoding on CPUs and DeepSpeed's operators"
            if command
            else "encoding on CPUs is slower and DeepSpeed's operators are off; install g++ to have them",
        ),
    ]


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    jobs = importlib.util.find_spec("aiohttp_cors") is not None
    return Finding(
        subject="Ray",
        found=f"cluster at {address}" if address else "a private instance on this machine",
        reason=("RAY_ADDRESS is set" if address else "RAY_ADDRESS is not set")
        + ("" if address else "; it listens on 127.0.0.1 only, asks for a token, its files have mode 0700")
        + ("; job submission available" if jobs else "; for submit and jobs: pip install 'ray[default]'"),
    )


def _token() -> Finding:
    """Whether Ray asks for a token, and where it finds one: in this order."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    left = Path.home() / ".ray" / "auth_token"
    places = {
        "RAY_AUTH_TOKEN": bool(os.environ.get("RAY_AUTH_TOKEN")),
        f"RAY_AUTH_TOKEN_PATH ({file})": file is not None and Path(file).is_file(),
        str(left): left.is_file(),
    }
    source = next((place for place, there in places.items() if there), None)
    ok = True
    if mode.lower() == "token":
        ok = source is not None
        reason = "RAY_AUTH_MODE=token; every node of a cluster needs the same"
        if not ok:
            reason = (
                "RAY_AUTH_MODE=token, and there is none: set RAY_AUTH_TOKEN, or ray get-auth-token --generate"
            )
    elif mode:
        reason = f"RAY_AUTH_MODE={mode}: no cluster that asks for a token can be reached"
    elif source == str(left):
        ok = False
        reason = (
            "RAY_AUTH_MODE is not set, and `ray.init()` leaves a token here: the next `ray start --head` "
            "asks for it, and nodes without it fail with InvalidAuthToken; set RAY_AUTH_MODE=token and give "
            "all nodes this one, or remove the file"
        )
    elif source:
        reason = "RAY_AUTH_MODE is not set: `ray start --head` would ask for this token; set it to token"
    else:
        reason = "RAY_AUTH_MODE is not set; whoever reaches a cluster without a token can run code on it"
    return Finding(subject="Ray's token", found=source or "none", reason=reason, ok=ok)


def _memory_and_disk() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    total, available = (page * os.sysconf(name) / 2**30 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    free = shutil.disk_usage(".").free / 2**30
    return Finding(
        subject="memory and disk",
        found=f"{total:.1f} GiB, {free:.1f} GiB free on disk",
        reason=f"{available:.1f} GiB of memory is unused now; disk of the current folder",
    )


def _data() -> Finding:
    reason = (
        "EFFIR_RAY_DATA is set" if os.environ.get("EFFIR_RAY_DATA") else "default; EFFIR_RAY_DATA moves it"
    )
    return Finding(subject="data folder", found=str(data_folder()), reason=reason)


def _versions() -> list[Finding]:
    findings = [
        Finding(subject="python", found=platform.python_version(), reason="3.11 to 3.13 are supported")
    ]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(subject=name, found="missing", reason=f"pip install {name}", ok=False))
        else:
            findings.append(Finding(subject=name, found=version, reason="installed"))
    return findings
