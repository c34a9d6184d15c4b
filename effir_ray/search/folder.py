"""The folder of a study: whose it is, that only one search works in it, which rows it has.

OUT/study.json      the search space this folder belongs to
OUT/rows/           one Parquet file for every finished trial and split
OUT/stages/         every step of work, by content; shared by all trials
OUT/optuna.db       what the sampler knows; ``optuna-dashboard sqlite:///OUT/optuna.db`` shows it
OUT/tune/           Ray Tune's own logs
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from effir_ray.config import Config, parse
from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.hardware import available_cores
from effir_ray.readers import read_json
from effir_ray.results import store
from effir_ray.results.schema import TrialRow
from effir_ray.search.space import SearchSpace

STUDY_FILE = "study.json"
STAGES = "stages"


class StudyRecord(Config):
    """``threads``: compute threads of a trial, fixed for the whole study because sums depend on it."""

    space: SearchSpace
    threads: int


def find(out: Path, space: SearchSpace, *, resume: bool) -> StudyRecord | None:
    """What ``out`` says of this study; None for a new folder. Writes nothing.

    Raises InputError when the folder holds something else, or this study already and ``resume`` is False.
    """
    file = out / STUDY_FILE
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not empty and holds no study; choose another --out")
        return None
    record = _read(file)
    if record.space != space:
        raise InputError(
            f"{out} holds another study ('{record.space.name}'{_difference(record.space, space)}); "
            "choose another --out, or give back the search space that study was started with"
        )
    if not resume:
        raise InputError(f"{out} holds this study already; add --resume to go on, or choose another --out")
    return record


def claim(out: Path, space: SearchSpace, *, resume: bool) -> SearchSpace:
    """Make ``out`` the folder of ``space``, or check that it is; returns the space with its threads fixed.

    Raises InputError as ``find`` does.
    """
    record = find(out, space, resume=resume)
    if record is None:
        out.mkdir(parents=True, exist_ok=True)
        record = StudyRecord(
            space=space, threads=space.threads or max(1, available_cores() // space.concurrency)
        )
        write_whole(out / STUDY_FILE, record.model_dump_json(indent=1) + "\n")
    return space.model_copy(update={"threads": record.threads})


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Only one search works in a folder. The system frees the lock of a killed one."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{out}: another search is running in this folder; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def finished_rows(out: Path) -> list[TrialRow]:
    """The last row of every trial and split, failed ones left out: a resumed study tries them again."""
    if not any((out / store.ROWS_FOLDER).glob("*.parquet")):
        return []
    table = store.latest(store.read([out]))
    return [row for row in store.trial_rows(table) if row.status == "ok"]


def _read(file: Path) -> StudyRecord:
    try:
        return parse(read_json(file), StudyRecord, source=str(file))
    except InputError:
        raise InputError(f"{file}: not readable as a study of this version of effir-ray") from None


def _difference(old: SearchSpace, new: SearchSpace) -> str:
    changed = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    return f", which differs in {', '.join(changed)}" if old.name == new.name else ""
