"""Content-addressed stages: a step of work is a folder named by the hash of everything that determines it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from effir_ray.errors import InputError, LostProcess, TrialFailure, is_disk_full
from effir_ray.files import write_whole
from effir_ray.leases import Lease, Waiting, lease
from effir_ray.provenance import __version__

_FREED = "freed.json"
_LOCKS = "locks"
_ASIDE = ".tmp"  # in the name of a folder that is being built

_KEY_LENGTH = 16  # hex digits of the hash in a folder name: 64 bits


class StageStore:
    """Runs each stage once; shared by trials, processes and (on a shared file system) nodes.

    A stage is built in a folder ``<its name>.tmp...`` beside its place and renamed when complete, so a killed
    run leaves nothing that a later one mistakes for a result. Who builds holds a lease: a builder that was
    cut off and comes back can finish nothing any more. ``root/runs.log`` holds one line a build, for
    audits. Of a stage that was ``free``d only the small files are left: it is built again when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, stage: str, inputs: Mapping[str, Any], *, version: int = 1) -> Path:
        """Where the stage lies or would lie."""
        identity = {"stage": stage, "version": version, "inputs": inputs}
        return self.root / stage / _digest(identity)[:_KEY_LENGTH]

    def has(self, place: Path) -> bool:
        """Whether the stage at ``place`` is there with everything it holds."""
        return (place / "stage.json").exists() and not (place / _FREED).exists()

    def finished(self, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The folder and the inputs of every finished stage of a kind, freed ones too."""
        for record in sorted(self.root.glob(f"{stage}/*/stage.json")):
            if _ASIDE not in record.parent.name:
                yield record.parent, json.loads(record.read_text(encoding="utf-8"))["inputs"]

    def lease(self, name: str, waiting: Waiting) -> AbstractContextManager[Lease]:
        """To be held for what only one process at a time may do."""
        return lease(self.root / _LOCKS, name, waiting=waiting)

    def remove_locks(self) -> None:
        """To be called when no other process works in this store, and none can begin to."""
        shutil.rmtree(self.root / _LOCKS, ignore_errors=True)

    def free(self, place: Path, part: str) -> None:
        """Delete the folder ``part`` of the stage at ``place``, and note how many bytes it had."""
        bulk = place / part
        if not (place / "stage.json").exists() or bulk.is_symlink() or not bulk.exists():
            return
        if self.has(place):  # noted first: a kill in between leaves nothing that looks whole
            write_whole(place / _FREED, json.dumps({"part": part, "bytes": size_on_disk(bulk)}))
        shutil.rmtree(bulk, ignore_errors=True)

    def freed_bytes(self) -> int:
        """What was freed and not built again since."""
        notes = self.root.glob(f"*/*/{_FREED}")
        return sum(int(json.loads(note.read_text(encoding="utf-8"))["bytes"]) for note in notes)

    def run(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        version: int = 1,
        resumable: bool = False,
        waiting: Waiting = lambda owner, seconds: None,
    ) -> Path:
        """The stage's folder, built by ``build(folder)`` unless it is there already.

        ``inputs`` must hold everything that determines the content and be JSON-serialisable; ``version`` is
        raised when the stage's code changes what it writes. Two callers that need the same stage at once
        share one build: the second waits, and ``waiting`` hears for whom. A ``resumable`` build finds in its
        folder what an interrupted one had written; one that ended with an InputError or a TrialFailure leaves
        nothing. Raises LostProcess when another process took the stage over meanwhile.
        """
        place = self.path(stage, inputs, version=version)
        if self.has(place):
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with self.lease(f"{stage}-{place.name}", waiting) as mine:
                if not self.has(place):
                    self._build(stage, inputs, build, version, place, resumable, mine)
        except Exception as error:
            if is_disk_full(error) and not isinstance(error, LostProcess):  # that was a node's own
                raise InputError(
                    f"{self.root}: no disk space left while building stage '{stage}'; free some and resume"
                ) from None
            raise
        return place

    def _build(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], None],
        version: int,
        place: Path,
        resumable: bool,
        mine: Lease,
    ) -> None:
        """Called with the stage's lease held."""
        shutil.rmtree(place, ignore_errors=True)
        # What is begun records its own paths; what is not continued must not meet what a builder that was
        # cut off still writes.
        aside = place.with_name(f"{place.name}{_ASIDE}" + ("" if resumable else str(mine.generation)))
        for interrupted in place.parent.glob(f"{place.name}{_ASIDE}*"):
            if not (resumable and interrupted == aside):
                shutil.rmtree(interrupted, ignore_errors=True)
        aside.mkdir(exist_ok=True)
        started = time.perf_counter()
        try:
            build(aside)
            record = {
                "stage": stage,
                "version": version,
                "inputs": inputs,
                "seconds": round(time.perf_counter() - started, 3),
                "effir_ray": __version__,
            }
            (aside / "stage.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            mine.check()
            aside.rename(place)
        except BaseException as error:
            if not resumable or isinstance(error, InputError | TrialFailure):
                shutil.rmtree(aside, ignore_errors=True)
            raise
        with (self.root / "runs.log").open("a") as log:
            log.write(f"{stage} {place.name} {record['seconds']}\n")


def size_on_disk(place: Path) -> int:
    """Bytes of a file, or of all files below a folder; what links lead to is not counted."""
    files = [place] if place.is_file() else (file for file in place.rglob("*") if file.is_file())
    return sum(file.lstat().st_size for file in files if not file.is_symlink())


def fingerprint(path: Path) -> str:
    """SHA-256 over the relative names and bytes of a file or of every file below a folder."""
    path = Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _digest(identity: Mapping[str, Any]) -> str:
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
