"""Who works on what, among processes on machines that share a folder: one holder of a name at a time.

File locks of a network file system end with neither their process nor its machine, or do nothing at all. A
lease is a file that its holder touches: whoever waits sees by a clock of its own that nobody touches it any
more, whatever the clocks of others say.

A name's files are ``NAME.<generation>``; the highest counts. It holds who has the lease, or says that it is
free; who takes it next, from a holder that let go or from a dead one, makes the next generation. Of two that
try at once one makes it. The generation is the fencing token: a holder that was away too long (a stopped
process, a network that came back) finds a higher one, and nothing that it finished since counts.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol, Self

import psutil

from effir_ray import storage
from effir_ray.errors import LostProcess
from effir_ray.files import write_whole
from effir_ray.progress import duration, progress_stream

_HEARTBEAT = 5.0
"""Seconds between two touches."""

EXPIRY = 90.0
"""Seconds without a touch after which a holder on another machine is dead; network file systems show what
another machine did up to a minute late."""

_CLOCK_STEP = 60.0
"""Seconds by which a clock that is set may change when a process seems to have begun."""

_SETTLING = 1.0
"""Seconds in which those that tried at the same moment in an object store make way for one of them."""

_SAY_FIRST, _SAY_AGAIN = 2.0, 10.0  # seconds of waiting until it is said, and said again

LEASES = ".leases"
"""The folder of leases inside one that holds other things."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0  # seconds between two looks


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process: ``host`` is what people call its machine, ``machine`` tells machines (and containers, whose
    process ids are their own) apart, ``started`` is when the process began, in seconds since the epoch."""

    host: str
    machine: str
    pid: int
    started: float

    @classmethod
    def here(cls) -> Self:
        """This process."""
        process = psutil.Process()
        return cls(host=platform.node(), machine=_machine(), pid=process.pid, started=process.create_time())

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"

    @property
    def nearby(self) -> bool:
        """Whether this process can see whether that one lives."""
        return self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Only of a nearby one; a process that got the same number soon after it may be taken for it."""
        try:
            process = psutil.Process(self.pid)
            same: bool = abs(process.create_time() - self.started) < _CLOCK_STEP
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One generation: ``key`` is its file, ``touched`` when its holder last did so (or made it), in ns by the
    clock of whoever keeps the file."""

    generation: int
    key: str
    touched: int
    free: bool = False


class _Place(Protocol):
    """Where leases lie."""

    def last(self, name: str) -> _Entry | None:
        """The highest generation."""

    def create(self, name: str, generation: int, owner: str) -> str | None:
        """The key of a new generation; None when another process was faster. Older ones go."""

    def owner(self, key: str) -> str | None: ...

    def touch(self, key: str) -> None: ...

    def free(self, key: str) -> None: ...


@dataclass(frozen=True)
class Lease:
    """What this process holds."""

    place: _Place
    name: str
    generation: int
    key: str

    @property
    def held(self) -> bool:
        """Whether nobody has taken it over; may be asked by any process that sees the folder."""
        last = self.place.last(self.name)
        return last is not None and last.generation == self.generation

    def check(self) -> None:
        """Raise LostProcess when another process has taken it over: what was done since does not count."""
        if not self.held:
            raise LostProcess(
                f"{self.name}: another process took this work over while this one was stopped or cut off"
            )


class Held(Exception):
    """Somebody else has the lease; ``owner`` is None where it has not yet said who it is."""

    def __init__(self, owner: Owner | None) -> None:
        super().__init__(str(owner))
        self.owner = owner


Waiting = Callable[[Owner | None, float], None]
"""Hears, at every look, whom one waits for and since how many seconds."""


def aloud(what: str, begins: Callable[[], object] = lambda: None) -> Waiting:
    """Says on the progress display, now and then, who holds ``what``: of one wait alone. ``begins`` is called
    before it is said first."""
    said: float | None = None

    def waiting(owner: Owner | None, seconds: float) -> None:
        nonlocal said
        if seconds < (_SAY_FIRST if said is None else said + _SAY_AGAIN):
            return
        if said is None:
            begins()
        said = seconds
        stream = progress_stream()
        if stream is not None:
            held = f", held by {owner}" if owner else ""
            print(f"waiting for {what}{held}, {duration(seconds)}", file=stream, flush=True)

    return waiting


@contextmanager
def lease(
    place: Path | str, name: str, *, waiting: Waiting = lambda owner, seconds: None, wait: bool = True
) -> Iterator[Lease]:
    """Hold ``name`` of ``place``, a folder or a URI, after everybody who had it before.

    Without ``wait`` raises Held as soon as it is known that another process has it and lives, which takes up
    to ``EXPIRY`` seconds for one on another machine. A dead holder's lease is taken over.
    """
    mine = _acquire(_place(place), name, waiting, wait)
    _beating.add(mine)
    try:
        yield mine
    finally:
        _beating.remove(mine)
        last = mine.place.last(name)
        if last is not None and last.generation == mine.generation:
            mine.place.free(mine.key)


def _place(place: Path | str) -> _Place:
    return _Objects(str(place)) if storage.is_uri(place) else _Files(Path(place))


def _acquire(place: _Place, name: str, waiting: Waiting, wait: bool) -> Lease:
    watched = _Watched()
    begun, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        last = place.last(name)
        owner = None if last is None or last.free else _read_owner(place.owner(last.key))
        if last is None or last.free or watched.is_dead(last, owner):
            generation = 1 if last is None else last.generation + 1
            key = place.create(name, generation, json.dumps(asdict(Owner.here())))
            if key is not None:
                return Lease(place, name, generation, key)
            continue  # another was faster
        if not wait and watched.lives:
            raise Held(owner)
        waiting(owner, time.monotonic() - begun)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


@dataclass
class _Watched:
    """What a process that waits has seen of the holder."""

    seen: tuple[str, int] | None = None  # its file, and when it was touched
    since: float = 0.0  # by this process's clock
    lives: bool = False

    def is_dead(self, last: _Entry, owner: Owner | None) -> bool:
        """``owner``: None where it has not said who it is."""
        if owner is not None and owner.nearby:
            self.lives = owner.lives
            if not self.lives:
                return True
        now = (last.key, last.touched)
        if now != self.seen:
            self.lives = self.lives or (self.seen is not None and now[0] == self.seen[0])
            self.seen, self.since = now, time.monotonic()
        return time.monotonic() - self.since > EXPIRY


def _read_owner(text: str | None) -> Owner | None:
    try:
        return Owner(**json.loads(text or ""))
    except (ValueError, TypeError):  # it is being written
        return None


@dataclass(frozen=True)
class _Files:
    """In a folder: ``NAME.<generation>``, of which the file system lets one process create each.

    A free one stays, as what the next generation is counted from.
    """

    folder: Path

    def last(self, name: str) -> _Entry | None:
        generation = max(self._generations(name), default=0)
        file = self.folder / f"{name}.{generation}"
        try:
            status = file.stat()
            free = status.st_size == len(_FREE) and file.read_text() == _FREE
        except FileNotFoundError:  # none, or it has just made way for the next
            return self.last(name) if generation else None
        return _Entry(generation=generation, key=file.name, touched=status.st_mtime_ns, free=free)

    def create(self, name: str, generation: int, owner: str) -> str | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.{generation}"
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(descriptor, "w") as stream:
            stream.write(owner)
        known = self._generations(name)
        if max(known) > generation:  # this generation had come and gone since one looked
            file.unlink()
            return None
        for old in known:
            if old < generation:
                (self.folder / f"{name}.{old}").unlink(missing_ok=True)
        return file.name

    def owner(self, key: str) -> str | None:
        try:
            return (self.folder / key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def touch(self, key: str) -> None:
        os.utime(self.folder / key)

    def free(self, key: str) -> None:
        write_whole(self.folder / key, _FREE)

    def _generations(self, name: str) -> list[int]:
        try:
            with os.scandir(self.folder) as found:
                names = [entry.name for entry in found if entry.name.startswith(f"{name}.")]
        except FileNotFoundError:
            return []
        numbers = [each[len(name) + 1 :] for each in names]
        return [int(number) for number in numbers if number.isdigit()]


_FREE = "free"


@dataclass(frozen=True)
class _Objects:
    """In an object store, which lets everybody write everything, but shows at once what was written.

    Who wants a generation puts ``NAME@<generation>@<token>``, then looks: who sees nobody else has it. Of
    two, the one that put second sees the first, so never both have it. Who sees others makes way, but for the
    first of them, which looks again when they had time to. Its holder touches ``...@beat``, and ``...@free``
    says that it let go.
    """

    uri: str

    def last(self, name: str) -> _Entry | None:
        found = self._found(name)
        return max(found, key=lambda entry: entry.generation) if found else None

    def create(self, name: str, generation: int, owner: str) -> str | None:
        key = f"{name}@{generation}@{uuid.uuid4().hex[:12]}"
        storage.put(storage.join(self.uri, key), owner.encode())
        rivals = self._rivals(name, generation)
        if rivals != [key] and rivals[0] == key:
            time.sleep(_SETTLING)
            rivals = self._rivals(name, generation)
        if rivals != [key]:
            self._remove(key)
            return None
        for old in self._found(name):
            if old.generation < generation:
                self._remove(old.key)
        return key

    def owner(self, key: str) -> str | None:
        content = storage.get(storage.join(self.uri, key))
        return None if content is None else content.decode()

    def touch(self, key: str) -> None:
        storage.put(storage.join(self.uri, f"{key}{_BEAT}"), b"")

    def free(self, key: str) -> None:
        storage.put(storage.join(self.uri, f"{key}{_LET_GO}"), b"")

    def _remove(self, key: str) -> None:
        for each in (key, f"{key}{_BEAT}", f"{key}{_LET_GO}"):
            storage.remove(storage.join(self.uri, each))

    def _rivals(self, name: str, generation: int) -> list[str]:
        """Those of this generation and higher ones."""
        return sorted(entry.key for entry in self._found(name) if entry.generation >= generation)

    def _found(self, name: str) -> list[_Entry]:
        objects = storage.entries(self.uri)
        split = {key: key.rsplit("@", 2) for key in objects}
        return [
            _Entry(
                generation=int(parts[1]),
                key=key,
                touched=objects.get(f"{key}{_BEAT}", objects[key]),
                free=f"{key}{_LET_GO}" in objects,
            )
            for key, parts in split.items()
            if len(parts) == 3 and parts[0] == name and parts[1].isdigit()
        ]


_BEAT, _LET_GO = "@beat", "@free"


@cache
def _machine() -> str:
    """The same for processes that see each other's process ids, and for no others."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


@dataclass
class _Heart:
    """Touches the files of what this process holds."""

    held: set[Lease] = field(default_factory=set)
    guard: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self.guard:
            self.held.add(lease)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self.thread.start()

    def remove(self, lease: Lease) -> None:
        with self.guard:
            self.held.discard(lease)

    def _beat(self) -> None:
        while True:
            time.sleep(_HEARTBEAT)
            with self.guard:
                held = list(self.held)
                if not held:
                    self.thread = None
                    return
            for lease in held:
                with suppress(OSError, LostProcess):  # gone, or a file system that is away for a moment
                    lease.place.touch(lease.key)


_beating = _Heart()
