"""The compiled kernels of this process, for others that have a cache of their own: compiling takes seconds of
all cores, each time."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

from effir_ray.caches import cache_folder
from effir_ray.encoding.cpu_kernels import build

_FOLDER = "kernels"


@lru_cache(maxsize=1)
def compiled() -> Path | None:
    """Where they lie; None without a compiler."""
    place = cache_folder() / _FOLDER
    build()
    return place if place.is_dir() else None


def with_kernels(cache: Path) -> Path:
    """``cache``, a folder to be, in which they lie."""
    if (place := compiled()) is not None:
        shutil.copytree(place, cache / _FOLDER)
    return cache
