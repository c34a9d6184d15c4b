"""Who works on what, among processes on machines that share a folder: one holder of a name at a time.

File locks of a network file system end with neither their process nor its machine, or do nothing at all. A
lease is a file that its holder touches: whoever waits sees by a clock of its own that nobody touches it any
more, whatever the clocks of others say. Only an exclusive creation is asked of the file system.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Self

import psutil

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

_SAY_FIRST, _SAY_AGAIN = 2.0, 10.0  # seconds of waiting until it is said, and said again

LEASES = ".leases"
"""The folder of leases inside one that holds other things."""

_FREE = "free"
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


@dataclass(frozen=True)
class Lease:
    """What this process holds."""

    place: Path
    name: str
    generation: int

    @property
    def held(self) -> bool:
        """Whether nobody has taken it over; may be asked by any process that sees the folder."""
        with suppress(FileNotFoundError):
            return _highest(self.place, self.name) == self.generation and self.file.exists()
        return False

    def check(self) -> None:
        """Raise LostProcess when another process has taken it over: what was done since does not count."""
        if not self.held:
            raise LostProcess(
                f"{self.name}: another process took this work over while this one was stopped or cut off"
            )

    @property
    def file(self) -> Path:
        return _file(self.place, self.name, self.generation)


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
    place: Path, name: str, *, waiting: Waiting = lambda owner, seconds: None, wait: bool = True
) -> Iterator[Lease]:
    """Hold ``name`` of the folder ``place``, after everybody who had it before.

    Without ``wait`` raises Held as soon as it is known that another process has it and lives, which takes up
    to ``EXPIRY`` seconds for one on another machine. A dead holder's lease is taken over.
    """
    place.mkdir(parents=True, exist_ok=True)
    mine = _acquire(place, name, waiting, wait)
    _beating.add(mine)
    try:
        yield mine
    finally:
        _beating.remove(mine)
        with suppress(FileNotFoundError):
            if mine.file.stat() and _highest(place, name) == mine.generation:
                write_whole(mine.file, _FREE)


def _acquire(place: Path, name: str, waiting: Waiting, wait: bool) -> Lease:
    watched = _Watched()
    begun, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        generation = _highest(place, name)
        taken = _owner(_file(place, name, generation)) if generation else _FREE
        if taken == _FREE or watched.is_dead(_file(place, name, generation), taken):
            mine = _create(place, name, generation + 1)
            if mine is not None:
                return mine
            continue  # another was faster
        owner = taken if isinstance(taken, Owner) else None
        if not wait and watched.lives:
            raise Held(owner)
        waiting(owner, time.monotonic() - begun)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


@dataclass
class _Watched:
    """What a process that waits has seen of the holder's file."""

    seen: tuple[Path, int] | None = None  # file, and when it was touched by its file system's clock
    since: float = 0.0  # by this process's clock
    lives: bool = False

    def is_dead(self, file: Path, owner: Owner | str | None) -> bool:
        """``owner``: what the file says; None where it is empty or gone."""
        if isinstance(owner, Owner) and owner.nearby:
            self.lives = owner.lives
            if not self.lives:
                return True
        try:
            now = (file, file.stat().st_mtime_ns)
        except FileNotFoundError:
            return False  # look again
        if now != self.seen:
            self.lives = self.lives or (self.seen is not None and now[0] == self.seen[0])
            self.seen, self.since = now, time.monotonic()
        return time.monotonic() - self.since > EXPIRY


def _create(place: Path, name: str, generation: int) -> Lease | None:
    """The lease, unless another process was faster."""
    file = _file(place, name, generation)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w") as stream:
        stream.write(json.dumps(asdict(Owner.here())))
    known = _generations(place, name)
    if max(known) > generation:  # this generation had come and gone since one looked
        file.unlink()
        return None
    for old in known:
        if old < generation:
            _file(place, name, old).unlink(missing_ok=True)
    return Lease(place, name, generation)


def _owner(file: Path) -> Owner | str | None:
    """Who holds it; ``_FREE``; or None for a file that is being written or was just replaced."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    if text == _FREE:
        return _FREE
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _file(place: Path, name: str, generation: int) -> Path:
    return place / f"{name}.{generation}"


def _generations(place: Path, name: str) -> list[int]:
    with os.scandir(place) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(f"{name}.")]
    numbers = [found[len(name) + 1 :] for found in names]
    return [int(number) for number in numbers if number.isdigit()]


def _highest(place: Path, name: str) -> int:
    return max(_generations(place, name), default=0)


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
                with suppress(OSError):  # gone, or a file system that is away for a moment
                    os.utime(lease.file)


_beating = _Heart()
