"""Which code this is: version, commit, packages."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.1.0"

_PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "optuna",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "numpy",
    "pyarrow",
    "peft",
)


@lru_cache(maxsize=1)
def git_commit() -> str:
    """Commit of the checkout this package runs from; empty for an installed copy."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """effir-ray and the packages that numbers depend on, as far as installed."""
    found = {"effir_ray": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
