"""What every trial process is doing, passed to the driver through small files in the study's folder.

Files reach the driver wherever stages do (a shared file system), cost no actor, and survive for a look after
a crash.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from effir_ray.files import write_whole
from effir_ray.progress import show_progress

FOLDER = "activity"


@dataclass(frozen=True, kw_only=True)
class Activity:
    """``stage`` runs since ``since`` (seconds since the epoch); ``detail`` is its own latest progress
    line."""

    trial: str
    split: str
    stage: str
    since: float
    detail: str = ""


class ActivityWriter:
    """The trial's side: call it with the name of each stage that begins."""

    def __init__(self, file: Path, trial: str, split: str) -> None:
        """``trial`` is what people read."""
        self.file, self.trial, self.split = file, trial, split

    def __call__(self, stage: str) -> None:
        activity = Activity(trial=self.trial, split=self.split, stage=stage, since=time.time())
        write_whole(self.file, json.dumps(asdict(activity)))
        self.file.with_suffix(".log").write_text("")


@contextmanager
def reporting(out: Path, trial_id: str, trial: str, split: str) -> Iterator[ActivityWriter]:
    """Within this context the trial's progress lines go to its file; afterwards the files are gone.

    They belong to the trial, not to the process: one that is killed leaves them to its successor.
    """
    file = out / FOLDER / f"{trial_id}-{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    log = file.with_suffix(".log")
    log.unlink(missing_ok=True)
    try:
        with log.open("a", buffering=1) as stream, show_progress(stream):
            yield ActivityWriter(file, trial, split)
    finally:
        file.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def remove_leftovers(out: Path) -> None:
    """Remove what killed processes left."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def current(out: Path) -> list[Activity]:
    """The driver's side: everything that runs now, oldest first."""
    found = []
    for file in sorted((out / FOLDER).glob("*.json")):
        try:
            activity = Activity(**json.loads(file.read_text()))
            with file.with_suffix(".log").open("rb") as log:
                detail = _last_line(log)
        except FileNotFoundError:  # ended between listing and reading
            continue
        found.append(Activity(**{**asdict(activity), "detail": detail}))
    return sorted(found, key=lambda activity: activity.since)


def _last_line(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 1000))
    lines = log.read().decode(errors="replace").rstrip("\n").splitlines()
    return lines[-1] if lines else ""
