"""Content-addressed stages: a step of work is a folder named by the hash of everything that determines it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from effir_ray import storage
from effir_ray.errors import InputError, LostProcess, TrialFailure, is_disk_full
from effir_ray.files import write_whole
from effir_ray.leases import Lease, Waiting, aloud, lease
from effir_ray.provenance import __version__
from effir_ray.readers import json_object, parse_json, read_json_object, read_text

_RECORD = "stage.json"
_FREED = "freed.json"
_FREED_HERE = "freed"  # notes of what this machine freed in an object store
_SMALL = "small"  # single files of stages that are whole only in an object store
_LOCKS = "locks"
_ASIDE = ".tmp"  # in the name of a folder that is being built

_CHECKPOINTS = "checkpoints"
_FULL = 0.8  # of a disk: then copies of what an object store has make room
_UNUSED_SECONDS = 30 * 60  # of a copy that may go
_LISTED_FOR = 5.0  # seconds that a listing of an object store is good for

GONE = ".gone"  # at the end of the name of a folder that is being deleted

_KEY_LENGTH = 16  # hex digits of the hash in a folder name: 64 bits


class StageStore:
    """Runs each stage once; shared by trials, processes and (on a shared file system) nodes.

    A stage is built in a folder ``<its name>.tmp...`` beside its place and renamed when complete, so a killed
    run leaves nothing that a later one mistakes for a result. Who builds holds a lease: a builder that was
    cut off and comes back can finish nothing any more, and one of long work asks ``lease_of`` its folder on
    the way whether it still holds it.

    With ``remote``, a URI, the stages of all machines are kept there, with the same names; ``root`` holds
    those that this machine built or needed, in the same folder on each. ``root/runs.log`` holds one line a
    build, for audits. Of a stage that was ``free``d only the small files are left: it is built again when it
    is needed.
    """

    def __init__(self, root: Path, remote: str = "") -> None:
        self.root, self.remote = Path(root), remote
        self._building: dict[Path, Lease] = {}
        self._records: dict[str, dict[str, Any]] = {}  # of stages that are in the object store
        self._listed: dict[str, tuple[float, set[str]]] = {}  # kind -> when it was listed, names

    def path(self, stage: str, inputs: Mapping[str, Any], *, version: int = 1) -> Path:
        """Where the stage lies or would lie."""
        identity = {"stage": stage, "version": version, "inputs": inputs}
        return self.root / stage / _digest(identity)[:_KEY_LENGTH]

    def has(self, place: Path) -> bool:
        """Whether the stage at ``place`` exists with everything it holds, here or in the object store."""
        if self.remote:
            there = self._at(place)
            return storage.there(storage.join(there, _RECORD)) and not storage.there(
                storage.join(there, _FREED)
            )
        return _whole(place)

    def bring(self, place: Path) -> Path:
        """The stage at ``place``, which exists, on this machine's disk."""
        if self.remote:
            with suppress(FileNotFoundError):
                os.utime(place)  # used now: it does not make room for another
            if not _whole(place):
                shutil.rmtree(place, ignore_errors=True)
                self._make_room()
                storage.bring(self._at(place), place)
        return place

    def _make_room(self) -> None:
        """Delete copies of what the object store has while this machine's disk is nearly full: those that
        were not used for longest, and none that may be in use."""
        copies: list[tuple[float, Path]] = []
        for record in self.root.glob(f"*/*/{_RECORD}"):
            with suppress(FileNotFoundError):  # another process makes room too
                if _ASIDE not in record.parent.name:
                    copies.append((record.parent.stat().st_mtime, record.parent))
        for used, copy in sorted(copies):
            usage = shutil.disk_usage(self.root)
            if usage.used <= _FULL * usage.total or time.time() - used < _UNUSED_SECONDS:
                return
            # First: a kill in between leaves nothing that looks whole.
            (copy / _RECORD).unlink(missing_ok=True)
            shutil.rmtree(copy, ignore_errors=True)

    @property
    def checkpoints(self) -> str:
        """Where trainings of a store on several machines keep theirs."""
        return storage.join(self.remote, _CHECKPOINTS)

    def local(self, name: str) -> str:
        """``name``; where it is a path in a stage of this store, of which this machine has then a copy."""
        if self.remote and Path(name).is_relative_to(self.root):
            kind, key, *_ = Path(name).relative_to(self.root).parts
            self.bring(self.root / kind / key)
        return name

    def target(self, aside: Path, name: str) -> str:
        """Where workers of all machines can write the part ``name`` of the stage that is built in ``aside``:
        there, or in the object store."""
        return storage.join(self._at(_place_of(aside)), name) if self.remote else str(aside / name)

    def small(self, place: Path, name: str) -> Path:
        """A small file of the stage at ``place``, on this machine's disk."""
        if not self.remote or _whole(place):
            return place / name
        file = self.root / _SMALL / self._key(place) / name
        if not file.exists():
            content = storage.get(storage.join(self._at(place), name))
            if content is not None:
                write_whole(_made(file.parent) / name, content)
        return file

    def send(self, aside: Path) -> None:
        """What was built in ``aside`` to the object store, where it counts when its record follows."""
        place = _place_of(aside)
        for entry in aside.iterdir():
            if entry.name != _RECORD:
                storage.send(entry, storage.join(self._at(place), entry.name))

    def record(self, place: Path) -> dict[str, Any] | None:
        """What ``stage.json`` says of a finished stage, freed or not; None for one that does not exist. Of
        an object store it may be some seconds old."""
        if not self.remote:
            file = place / _RECORD
            return _checked(read_text(file), str(file)) if file.exists() else None
        key = self._key(place)
        if key not in self._records and place.name in self._names(place.parent.name):
            there = storage.join(self._at(place), _RECORD)
            content = storage.get(there)
            if content is not None:
                self._records[key] = _checked(content, there)
        return self._records.get(key)

    def finished(self, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The folder and the inputs of every finished stage of a kind, freed ones too."""
        names = self._names(stage) if self.remote else {each.name for each in self.root.glob(f"{stage}/*")}
        for name in sorted(names):
            if _ASIDE not in name and (found := self.record(self.root / stage / name)) is not None:
                yield self.root / stage / name, found["inputs"]

    def holds(self, place: Path, part: str) -> bool:
        """Whether the folder ``part`` of the stage at ``place`` is there."""
        if self.remote:
            found = storage.entries(self._at(place))
            return part in found and f"{part}{GONE}" not in found
        return (place / part).exists()

    def drop(self, place: Path, part: str) -> None:
        """Delete the folder ``part`` of a stage that is whole without it."""
        gone = f"{part}{GONE}"  # first: a kill in between leaves nothing that looks whole
        if self.remote:
            there = self._at(place)
            storage.put(storage.join(there, gone), b"")
            storage.remove(storage.join(there, part))
            storage.remove(storage.join(there, gone))
        if (place / part).exists():
            (place / part).rename(place / gone)
        shutil.rmtree(place / gone, ignore_errors=True)

    def bytes_of(self, place: Path, part: str) -> int:
        """Of the folder ``part``, where it is there."""
        if self.remote:
            return storage.bytes_at(storage.join(self._at(place), part))
        return size_on_disk(place / part) if (place / part).exists() else 0

    def _key(self, place: Path) -> str:
        return place.relative_to(self.root).as_posix()

    def _at(self, place: Path) -> str:
        return storage.join(self.remote, self._key(place))

    def _names(self, stage: str) -> set[str]:
        """Of the folders of a kind in the object store, which may be finished, some seconds ago."""
        listed, names = self._listed.get(stage, (-_LISTED_FOR, set()))
        if time.monotonic() - listed >= _LISTED_FOR:
            names = set(storage.entries(storage.join(self.remote, stage)))
            self._listed[stage] = (time.monotonic(), names)
        return names

    def lease(self, name: str, waiting: Waiting) -> AbstractContextManager[Lease]:
        """To be held for what only one process at a time may do."""
        place = storage.join(self.remote, _LOCKS) if self.remote else self.root / _LOCKS
        return lease(place, name, waiting=waiting)

    def lease_of(self, folder: Path) -> Lease | None:
        """What this process holds while it builds a stage in ``folder``; None where it builds none there."""
        return self._building.get(folder.absolute())

    def remove_locks(self) -> None:
        """To be called when no other process works in this store, and none can begin to."""
        if self.remote:
            storage.remove(storage.join(self.remote, _LOCKS))
        shutil.rmtree(self.root / _LOCKS, ignore_errors=True)

    def free(self, place: Path, part: str) -> None:
        """Delete the folder ``part`` of the stage at ``place``, and note how many bytes it had."""
        if self.remote:
            self._free_remote(place, part)
            return
        bulk = place / part
        if not (place / _RECORD).exists() or bulk.is_symlink() or not bulk.exists():
            return
        if self.has(place):  # noted first: a kill in between leaves nothing that looks whole
            write_whole(place / _FREED, json.dumps({"part": part, "bytes": size_on_disk(bulk)}))
        shutil.rmtree(bulk, ignore_errors=True)

    def _free_remote(self, place: Path, part: str) -> None:
        there = self._at(place)
        if not self.holds(place, part) or self.record(place) is None:
            return
        note = json.dumps({"part": part, "bytes": self.bytes_of(place, part)})
        storage.put(storage.join(there, _FREED), note.encode())
        storage.remove(storage.join(there, part))
        shutil.rmtree(place, ignore_errors=True)
        write_whole(_made(self.root / _FREED_HERE) / f"{place.parent.name}-{place.name}.json", note)

    def freed_bytes(self) -> int:
        """What was freed and not built again since; of an object store what this machine freed."""
        notes = self.root.glob(f"{_FREED_HERE}/*" if self.remote else f"*/*/{_FREED}")
        return sum(_noted_bytes(note) for note in notes)

    def run(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        version: int = 1,
        resumable: bool = False,
        waiting: Waiting | None = None,
    ) -> Path:
        """The stage's folder, built by ``build(folder)`` unless it is there already.

        ``inputs`` must hold everything that determines the content and be JSON-serialisable; ``version`` is
        raised when the stage's code changes what it writes. Two callers that need the same stage at once
        share one build: the second waits, and ``waiting`` (or else the progress display) hears for whom. A
        ``resumable`` build finds in its
        folder what an interrupted one had written; one that ended with an InputError or a TrialFailure leaves
        nothing. Raises LostProcess when another process took the stage over meanwhile.
        """
        place = self.path(stage, inputs, version=version)
        if self.has(place):
            return self.bring(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with self.lease(f"{stage}-{place.name}", waiting or aloud(stage)) as mine:
                if self.has(place):
                    self.bring(place)
                else:
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
        """Called with the stage's lease held. ``build`` may do so on another machine and ``send`` it from
        there."""
        _discard(place, mine)
        if self.remote and not resumable:
            storage.remove(self._at(place))
        # What is begun records its own paths; what is not continued must not meet what a builder that was
        # cut off still writes.
        aside = place.with_name(f"{place.name}{_ASIDE}" + ("" if resumable else str(mine.generation)))
        for interrupted in place.parent.glob(f"{place.name}{_ASIDE}*"):
            if not (resumable and interrupted == aside):
                shutil.rmtree(interrupted, ignore_errors=True)
        aside.mkdir(exist_ok=True)
        started = time.perf_counter()
        self._building[aside.absolute()] = mine
        try:
            build(aside)
            elsewhere = self.remote and not any(aside.iterdir())  # on another machine, which has sent it
            record = {
                "stage": stage,
                "version": version,
                "inputs": inputs,
                "seconds": round(time.perf_counter() - started, 3),
                "effir_ray": __version__,
            }
            (aside / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            if self.remote and not elsewhere:
                self.send(aside)
            mine.check()
            if self.remote:
                storage.put(storage.join(self._at(place), _RECORD), (aside / _RECORD).read_bytes())
                storage.remove(storage.join(self._at(place), _FREED))
            if elsewhere:
                shutil.rmtree(aside)
            else:
                aside.rename(place)
        except BaseException as error:
            # The folder of a resumable build is its next builder's, who may have it already.
            if not resumable or (isinstance(error, InputError | TrialFailure) and mine.held):
                shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, Exception):
                mine.check()  # whatever a builder ran into whose folder had gone to another
            raise
        finally:
            del self._building[aside.absolute()]
        with (self.root / "runs.log").open("a") as log:
            log.write(f"{stage} {place.name} {record['seconds']}\n")


def _checked(content: str | bytes, source: str) -> dict[str, Any]:
    """The record of a stage; InputError for anything else."""
    what = f"{source}: not the record of a stage; delete its folder, and the stage is built again"
    try:
        record = json_object(parse_json(content, source, unique=True), source)
    except InputError as error:
        raise InputError(f"{what} ({error})") from None
    if not isinstance(record.get("inputs"), dict) or not _is_number(record.get("seconds")):
        raise InputError(what)
    return record


def _noted_bytes(note: Path) -> int:
    size = read_json_object(note).get("bytes")
    if not _is_number(size):
        raise InputError(f"{note}: expected the bytes that were freed; delete the folder it is in")
    return int(size)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _place_of(aside: Path) -> Path:
    return aside.with_name(aside.name.partition(_ASIDE)[0])


def _whole(place: Path) -> bool:
    return (place / _RECORD).exists() and not (place / _FREED).exists()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _discard(place: Path, mine: Lease) -> None:
    """Delete what is at ``place`` but no whole stage. Raises LostProcess when another builder has the lease
    now, of whom nothing is deleted: what it may have finished is put back."""
    mine.check()
    old = place.with_name(f"{place.name}{_ASIDE}-old{mine.generation}")
    try:
        place.rename(old)
    except FileNotFoundError:
        return
    if not mine.held:
        with suppress(OSError):  # it has finished since
            old.rename(place)
    mine.check()
    shutil.rmtree(old, ignore_errors=True)


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
