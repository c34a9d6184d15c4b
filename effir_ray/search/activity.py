"""What every trial process is doing, passed to the driver through small files in the study's folder.

Files reach the driver wherever stages do (a shared file system), cost no actor, and survive for a look after
a crash.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from effir_ray import storage
from effir_ray.config import Config, parse
from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.mirrors import Mirror
from effir_ray.progress import show_progress
from effir_ray.readers import parse_json

FOLDER = "activity"


class Activity(Config):
    """``stage`` runs since ``since`` (seconds since the epoch); ``detail`` is its own latest progress
    line."""

    trial: str
    split: str
    stage: str
    since: float
    detail: str = ""


class ActivityWriter:
    """The trial's side: call it with the name of each stage that begins."""

    def __init__(self, study: Mirror, file: Path, trial: str, split: str) -> None:
        """``trial`` is what people read."""
        self.study, self.file, self.trial, self.split = study, file, trial, split

    def __call__(self, stage: str) -> None:
        activity = Activity(trial=self.trial, split=self.split, stage=stage, since=time.time())
        write_whole(self.file, activity.model_dump_json())
        self.file.with_suffix(".log").write_text("")
        self.study.push(self.file)


@contextmanager
def reporting(study: Mirror, trial_id: str, trial: str, split: str) -> Iterator[ActivityWriter]:
    """Within this context the trial's progress lines go to its file; afterwards the files are gone.

    They belong to the trial, not to the process: one that is killed leaves them to its successor.
    """
    file = study.folder / FOLDER / f"{trial_id}-{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    log = file.with_suffix(".log")
    log.unlink(missing_ok=True)
    try:
        with log.open("a", buffering=1) as stream, show_progress(stream):
            yield ActivityWriter(study, file, trial, split)
    finally:
        file.unlink(missing_ok=True)
        if study.uri:
            storage.remove(study.at(f"{FOLDER}/{file.name}"))
        log.unlink(missing_ok=True)


def remove_leftovers(study: Mirror) -> None:
    """Remove what killed processes left."""
    shutil.rmtree(study.folder / FOLDER, ignore_errors=True)
    if study.uri:
        storage.remove(study.at(FOLDER))


def current(study: Mirror) -> list[Activity]:
    """The driver's side: everything that runs now, oldest first. Of other machines than this, where a study
    lies in an object store, only which stage runs, some seconds late."""
    found = _elsewhere(study) if study.uri else []
    for file in sorted((study.folder / FOLDER).glob("*.json")):
        try:
            activity = _parsed(file.read_text(), file)
            with file.with_suffix(".log").open("rb") as log:
                detail = _last_line(log)
        except FileNotFoundError:  # ended between listing and reading
            continue
        if activity is not None:
            found.append(activity.model_copy(update={"detail": detail}))
    return sorted(found, key=lambda activity: activity.since)


_asked: dict[str, tuple[float, list[Activity]]] = {}
_ASK_AGAIN = 5.0  # seconds


def _elsewhere(study: Mirror) -> list[Activity]:
    when, found = _asked.get(study.uri, (-_ASK_AGAIN, []))
    if time.monotonic() - when >= _ASK_AGAIN:
        here = {file.name for file in (study.folder / FOLDER).glob("*.json")}
        names = storage.entries(study.at(FOLDER)).keys() - here
        texts = [storage.get(study.at(f"{FOLDER}/{name}")) for name in sorted(names)]
        read = [_parsed(text, name) for name, text in zip(sorted(names), texts, strict=True) if text]
        found = [activity for activity in read if activity is not None]
        _asked[study.uri] = (time.monotonic(), found)
    return list(found)


def _parsed(text: str | bytes, source: object) -> Activity | None:
    """None for what no trial of this version has written: what is shown is no reason to end a study."""
    try:
        return parse(parse_json(text, str(source)), Activity, source=str(source))
    except InputError:
        return None


def _last_line(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 1000))
    lines = log.read().decode(errors="replace").rstrip("\n").splitlines()
    return lines[-1] if lines else ""
