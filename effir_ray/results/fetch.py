"""The tables of a study that ran as a job of a cluster: where they lie, and a copy of them here."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from effir_ray.cluster.jobs import find_job
from effir_ray.config import Config
from effir_ray.errors import InputError
from effir_ray.files import whole
from effir_ray.readers import read_json_object
from effir_ray.results.store import ROWS_FOLDER
from effir_ray.storage import exists, is_uri, list_files, open_file
from effir_ray.storage import join as join_place

_STUDY_FILE = "study.json"
_TABLES = (ROWS_FOLDER, "query_scores")


class JobResults(Config):
    """``place``: the study's folder as the cluster names it; ``seen``: whether this machine sees it, with
    tables in it; ``files``: what was copied."""

    job: str
    status: str
    place: str
    seen: bool
    files: tuple[Path, ...] = ()


def fetch_results(job: str, out: Path | str | None = None, *, address: str | None = None) -> JobResults:
    """Copy the tables of the study that ``job`` ran to ``out``; without ``out`` only say where they are.

    A copy replaces files of the same name alone, so that it can be repeated while the job runs. Raises
    InputError when no job server answers, for an unknown job or one that is no search, and when there is
    something to copy but this machine does not see it.
    """
    found = find_job(job, address=address)
    place = _study_place(found.id, found.command)
    files = _table_files(place) if _is_study_of(place, found.id) else []
    copied: list[Path] = []
    if out is not None:
        if not files:
            raise InputError(
                f"the tables of {job} lie in {place} on the cluster, where this machine sees none; run "
                f"this where that folder is mounted, or copy its folder {ROWS_FOLDER} by other means"
            )
        copied = [_copy(file, Path(out) / table) for table, file in files]
    return JobResults(job=found.id, status=found.status, place=place, seen=bool(files), files=tuple(copied))


def _study_place(job: str, command: str) -> str:
    words = shlex.split(command)
    if "search" in words and "--out" in words[:-1]:
        return words[words.index("--out") + 1]
    raise InputError(f"job {job} is no search with --out: {command}")


def _is_study_of(place: str, job: str) -> bool:
    """Whether the folder there is that study's, as far as can be told: another machine may have one of that
    name.
    """
    if is_uri(place):
        return True
    file = Path(place) / _STUDY_FILE
    if not file.is_file():
        return False
    space = read_json_object(file).get("space")
    name = space.get("name") if isinstance(space, dict) else None
    return not job.startswith("effir-ray-") or job.rpartition("-")[0] == f"effir-ray-{name}"


def _table_files(place: str) -> list[tuple[str, str]]:
    """(table, file) of everything that a search has finished writing."""
    folders = [(table, join_place(place, table)) for table in _TABLES]
    return [
        (table, file.place)
        for table, folder in folders
        if exists(folder)
        for file in list_files(folder)
        if _name(file.place).endswith(".parquet")
    ]


def _name(place: str) -> str:
    """The last part of a path or URI, without a URI's options."""
    return place.partition("?")[0].rpartition("/")[2]


def _copy(source: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _name(source)
    with open_file(source) as stream, whole(target) as aside, aside.open("wb") as file:
        shutil.copyfileobj(stream, file)
    return target
