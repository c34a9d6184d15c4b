"""Every tensor of a checkpoint has a place in the model and every place has a tensor, or loading fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effir_ray.errors import InputError


def check_tensors(source: Path, report: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """``report`` is transformers' loading info. Tensors whose names start with ``allowed`` may be left over.

    Raises InputError naming missing, unexpected and misshapen tensors.
    """
    missing = sorted(report["missing_keys"])
    left_over = sorted(key for key in report["unexpected_keys"] if not _bare(key).startswith(allowed))
    misshapen = [
        f"{key} ({tuple(found)}, expected {tuple(wanted)})"
        for key, found, wanted in report["mismatched_keys"]
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", left_over), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise InputError(f"{source}: the tensors do not match config.json: {'; '.join(problems)}")


def _bare(key: str) -> str:
    """Tensor names of a checkpoint with a head carry the name of the model inside it."""
    return key.removeprefix("model.").removeprefix("bert.")
