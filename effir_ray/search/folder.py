"""The folder of a study: whose it is, that only one search works in it, which rows it has.

OUT/study.json      the search space this folder belongs to
OUT/rows/           one Parquet file for every finished trial and split; one for all when the study ends
OUT/query_scores/   what every query scored, in the same way
OUT/stages/         every step of work, by content; shared by all trials
OUT/optuna.db       what the sampler knows; ``optuna-dashboard sqlite:///OUT/optuna.db`` shows it
OUT/tune/           Ray Tune's own logs

OUT may be a URI: then each machine works in a folder of its cache, and puts what is finished there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc

from effir_ray.cluster.probe import is_unused
from effir_ray.config import Config, parse
from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.hardware import PINNED, Hardware, available_cores, detect
from effir_ray.leases import LEASES, Held, Lease, aloud, lease
from effir_ray.mirrors import Mirror
from effir_ray.provenance import __version__
from effir_ray.readers import read_json
from effir_ray.results import store
from effir_ray.results.query_scores import QUERY_SCORES
from effir_ray.results.schema import TrialRow
from effir_ray.search.optuna_study import STORAGE
from effir_ray.search.space import SearchSpace
from effir_ray.stages import StageStore

STUDY_FILE = "study.json"
STAGES_FOLDER = "stages"


_NOT_IDENTITY = (
    "budget",
    "concurrency",
    "device",
    "elastic",
    "encoding_workers",
    "halving",
    "keep",
    "priors",
    "resources",
    "seeds",
    "strategy",
    "trials",
)
"""Fields of a search space that no row depends on: they may be others when a study is resumed."""


class StudyRecord(Config):
    """What a study was started with.

    threads: compute threads of a trial, fixed for the whole study because sums depend on it
    computes: on what its stages do: device and number format; a study does not mix them
    contents: role -> fingerprint of what its trials read (``stage_graph.Sources``)
    effir_ray: version of effir-ray
    """

    space: SearchSpace
    threads: int
    contents: dict[str, str]
    effir_ray: str
    computes: str = ""


def find(out: Path, space: SearchSpace, contents: Mapping[str, str], *, resume: bool) -> StudyRecord | None:
    """What ``out`` says of this study; None for a new folder. Writes nothing.

    Raises InputError when the folder holds something else, this study already and ``resume`` is False, or
    rows of other ``contents`` than there are now: their scores would stand on one front.
    """
    file = out / STUDY_FILE
    if not file.exists():
        if not is_unused(out):
            raise InputError(f"{out} is not empty and holds no study; choose another --out")
        return None
    record = _read(file)
    differing = _differing(record.space, space)
    if differing:
        which = f", which differs in {', '.join(differing)}" if record.space.name == space.name else ""
        raise InputError(
            f"{out} holds another study ('{record.space.name}'{which}); "
            "choose another --out, or give back the search space that study was started with"
        )
    if not resume:
        raise InputError(f"{out} holds this study already; add --resume to go on, or choose another --out")
    changed = [role for role, content in record.contents.items() if contents.get(role) != content]
    if changed:
        raise InputError(
            f"{out}: what the study reads has changed since it began ({', '.join(changed)}); "
            "put it back to go on, or choose another --out"
        )
    return record


def record_of(out: Path) -> StudyRecord:
    """What the study in ``out`` was started with. Raises InputError where there is none."""
    if not (out / STUDY_FILE).is_file():
        raise InputError(f"{out}: holds no study (no {STUDY_FILE})")
    return _read(out / STUDY_FILE)


def claim(
    out: Path, space: SearchSpace, contents: Mapping[str, str], *, resume: bool, here: Hardware | None = None
) -> StudyRecord:
    """Make ``out`` the folder of ``space``, or check that it is; returns what it was started with.

    ``here``: what stages compute on, this machine unless told. Raises InputError as ``find`` does, and for a
    study that computes on something else.
    """
    here = here or detect()
    computes = f"{here.device}, {here.precision}"
    record = find(out, space, contents, resume=resume)
    if record is None:
        out.mkdir(parents=True, exist_ok=True)
        record = StudyRecord(
            space=space,
            threads=space.threads or max(1, available_cores() // space.concurrency),
            contents=dict(contents),
            effir_ray=__version__,
            computes=computes,
        )
        write_whole(out / STUDY_FILE, record.model_dump_json(indent=1) + "\n")
    elif record.computes not in ("", computes):
        device, _, precision = record.computes.partition(", ")
        raise InputError(
            f"{out}: the study computes on {record.computes}, and here it would on {computes}: its scores "
            "would stand on one front; go on where it was started, or choose another --out"
            + (
                f"; {PINNED}={precision} computes as there"
                if (device, precision) == (here.device, "float32")
                else ""
            )
        )
    elif record.space != space:
        record = record.model_copy(update={"space": space})
        write_whole(out / STUDY_FILE, record.model_dump_json(indent=1) + "\n")
    return record


def pull(study: Mirror) -> None:
    """What an object store has of a study that began, for who goes on with it."""
    study.pull_file(STUDY_FILE)
    study.pull_file(STORAGE)
    pull_rows(study)


def pull_rows(study: Mirror) -> None:
    for kind in (QUERY_SCORES.name, store.ROWS_FOLDER):
        study.pull_files(kind)


def stages_of(study: Mirror) -> StageStore:
    """Every step of work of a study."""
    return StageStore(study.folder / STAGES_FOLDER, study.at(STAGES_FOLDER))


@contextmanager
def exclusive(study: Mirror) -> Iterator[Lease]:
    """Only one search works in a folder. That of a killed one is taken over: at once on its own machine,
    after ``leases.EXPIRY`` seconds elsewhere."""
    try:
        place = study.at(LEASES) or study.folder / LEASES
        with lease(place, "search", waiting=aloud(str(study)), wait=False) as mine:
            yield mine
    except Held as held:
        where = f", on {held.owner}" if held.owner else ""
        raise InputError(
            f"{study}: another search is running in this folder{where}; wait for it or stop it"
        ) from None


def finished_rows(out: Path, space: SearchSpace) -> list[TrialRow]:
    """The last row of every trial and split that decides, those of single ones of several data sets left out;
    and failed ones, for a resumed study tries them again."""
    if not any((out / store.ROWS_FOLDER).glob("*.parquet")):
        return []
    table = store.latest(store.read([out]))
    deciding = pc.and_(pc.equal(table["dataset"], space.measured_on), pc.equal(table["status"], "ok"))
    return store.trial_rows(table.filter(deciding))


def attempts(out: Path, space: SearchSpace) -> Counter[tuple[str, str]]:
    """(trial id, split) -> how often it was tried, whatever came of it."""
    if not any((out / store.ROWS_FOLDER).glob("*.parquet")):
        return Counter()
    rows = store.read([out]).select(["trial_id", "split", "dataset"]).to_pylist()
    return Counter((row["trial_id"], row["split"]) for row in rows if row["dataset"] == space.measured_on)


def _read(file: Path) -> StudyRecord:
    try:
        return parse(read_json(file), StudyRecord, source=str(file))
    except InputError:
        raise InputError(f"{file}: not readable as a study of this version of effir-ray") from None


def _differing(old: SearchSpace, new: SearchSpace) -> list[str]:
    """The fields that make it another study."""
    fields = (name for name in type(old).model_fields if name not in _NOT_IDENTITY)
    return [name for name in fields if getattr(old, name) != getattr(new, name)]
