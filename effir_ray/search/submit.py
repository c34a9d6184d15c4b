"""A search as a job of a Ray cluster: its space travels with it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from effir_ray.cluster.jobs import submit
from effir_ray.config import load_yaml
from effir_ray.errors import InputError
from effir_ray.search.dry_run import dry_run
from effir_ray.search.space import SearchSpace

_SPACE_FILE = "space.yaml"


def submit_search(space: Path, out: str, *, address: str | None = None, resume: bool = False) -> str:
    """Start ``effir-ray search space --out out`` on the cluster; returns the job's id.

    ``out`` and data sets must be paths that the cluster sees. Raises InputError for a space that cannot run,
    for a relative ``out`` and when no job server answers.
    """
    loaded = load_yaml(space, SearchSpace)
    dry_run(loaded)
    if not PurePosixPath(out).is_absolute():
        raise InputError(
            f"--out {out}: a job's own folder is gone when it ends; give the absolute path of a folder that "
            "every node of the cluster sees"
        )
    return submit(
        ["search", _SPACE_FILE, "--out", out, *(["--resume"] if resume else [])],
        name=f"effir-ray-{loaded.name}",
        files={_SPACE_FILE: space.read_text(encoding="utf-8")},
        address=address,
    )
