"""Processes that Ray lost: which errors say so, and how long to wait before the work is tried again.

A killed process, one without memory or a node that is gone says nothing about the work: it is tried again.
An error that the work itself raised would only come again.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

from effir_ray.caches import cache_folder
from effir_ray.cluster.connection import connect, disconnect, on_cluster, start_no_other
from effir_ray.errors import InputError, LostProcess, TrialFailure, is_disk_full

T = TypeVar("T")

FIRST_PAUSE = 2.0  # seconds; doubled with every further try
RESTARTS = 2  # of a Ray that was lost, before a command stops

_POLL_SECONDS = 0.5
_SECONDS_TO_STOP = 10.0
_NEXT_TO_NOTHING = 16 * 2**20  # bytes

_PARTS = ("cause", "controller_failure", "health_check_failure", "__cause__", "__context__")
"""Where errors of Ray, Ray Train and Python keep the one they came from."""


def is_lost_process(error: BaseException) -> bool:
    """Whether ``error``, or one it came from, says that a process or a node is gone."""
    from ray import exceptions
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    kinds = (
        LostProcess,
        exceptions.WorkerCrashedError,
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,  # its memory monitor killed the process
        exceptions.RpcError,
        exceptions.TaskPlacementGroupRemoved,
        exceptions.ActorPlacementGroupRemoved,
        WorkerGroupStartupFailedError,
    )
    return any(
        isinstance(part, kinds) and not getattr(part, "actor_init_failed", False) for part in _parts(error)
    )


@contextmanager
def in_one_line(work: str) -> Iterator[None]:
    """What Ray raises within it while it does ``work`` comes out as one line: our own errors as the processes
    there raised them, a lost process as LostProcess, anything else without the other process's traceback."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | TrialFailure | LostProcess):
            raise cause from None
        if is_lost_process(error):
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LostProcess(
                f"{work}: a process was lost (killed, out of memory, or its node gone); run it again to "
                f"go on ({reason.strip()})"
            ) from error
        if cause is None or isinstance(cause, RayError):
            raise
        raise cause from None


class UnfitNode(LostProcess):
    """The node of that id cannot do the work, and another one may."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message)
        self.node = node

    def __reduce__(self) -> tuple[type[UnfitNode], tuple[str, str]]:
        return type(self), (str(self), self.node)


@contextmanager
def own_disks(study: Path) -> Iterator[None]:
    """A disk of this node's own that is full within is an UnfitNode; that of the folder ``study``, which all
    nodes share, stays what it is."""
    try:
        yield
    except Exception as error:
        place = _full_place(error, study) if is_disk_full(error) and on_cluster() else None
        if place is None or isinstance(error, LostProcess):
            raise
        node = sys.modules["ray"].get_runtime_context().get_node_id()
        raise UnfitNode(f"node {platform.node()}: no space in {place}", node) from None


def unfit_node(error: BaseException) -> str:
    """The id of the node that ``error`` says is unfit; "" for none."""
    return next((part.node for part in _parts(error) if isinstance(part, UnfitNode)), "")


def _full_place(error: BaseException, study: Path) -> Path | None:
    """The folder of this node that is full; None where it is on the file system of ``study``.

    Not every error names its file: then a folder for temporary files or caches is it that has next to
    nothing left.
    """
    names = [part.filename for part in _parts(error) if isinstance(part, OSError) and part.filename]
    if names:
        place = _existing(Path(os.fsdecode(names[0])))
        return None if _same_disk(place, study) else place
    for place in map(_existing, (Path(tempfile.gettempdir()), cache_folder())):
        if not _same_disk(place, study) and shutil.disk_usage(place).free < _NEXT_TO_NOTHING:
            return place
    return None


def _same_disk(place: Path, study: Path) -> bool:
    return place.stat().st_dev == _existing(study).stat().st_dev


def _existing(path: Path) -> Path:
    """The folder that ``path`` lies in, or the next one above it that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())


def check_local_processes() -> None:
    """Raise LostProcess when a process of the Ray that this process started is gone.

    Whoever waits for such a Ray waits for ever, or is ended by it after a minute. Nothing is known of a
    cluster that was there before.
    """
    from ray._private import worker

    node = worker._global_node
    if node is not None and (dead := [name for name, _ in node.dead_processes()]):
        raise LostProcess(f"Ray's own {' and '.join(dead)} ended")


def watched(work: Callable[[], T]) -> T:
    """``work()``, or LostProcess as soon as a process of the Ray that this process started is gone.

    Then ``work`` stays behind in a thread of its own: it waits for what does not come any more. What stops
    this thread, as Ctrl-C does, stops ``work`` too.
    """
    from ray._private import worker

    if worker._global_node is None or not worker._global_node.all_processes:
        return work()
    outcome: Future[T] = Future()
    context = copy_context()  # the display belongs to the caller's

    def run() -> None:
        try:
            outcome.set_result(context.run(work))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()  # within: it waits until the other one runs, and may be stopped meanwhile
        while not wait([outcome], _POLL_SECONDS).done:
            check_local_processes()
    except BaseException as error:
        if not isinstance(error, LostProcess) and thread.is_alive():
            _interrupt(thread)
            wait([outcome], _SECONDS_TO_STOP)
        start_no_other()  # as what is left of it might
        raise
    return outcome.result()


def _interrupt(thread: threading.Thread) -> None:
    """KeyboardInterrupt in another thread, as soon as that runs Python again."""
    kind = ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), kind)


def outlive_ray(
    work: Callable[[], T],
    address: str | None,
    *,
    restart: bool,
    goes_on: str,
    between: Callable[[], None] = lambda: None,
) -> T:
    """``work()`` with this process connected to Ray. Where Ray itself is lost meanwhile, it is started or
    reached anew, ``between()`` tidies up, and ``work`` goes on with what it had not done.

    Raises what ``work`` and ``between`` raise, and LostProcess, saying how the work ``goes_on``, when that
    did not help or when ``restart`` is False: then Ray was the caller's.
    """
    losses = 0
    while True:
        connect(address)
        try:
            return work()
        except Exception as error:
            if not is_lost_process(error):
                raise
            losses += 1
            if losses > RESTARTS or not restart:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise LostProcess(f"Ray was lost ({reason}); {goes_on}") from error
        disconnect()
        time.sleep(pause_seconds(losses))
        between()


def pause_seconds(failures: int) -> float:
    """How long to wait before the next try, after so many failures in a row."""
    return float(FIRST_PAUSE * 2 ** (failures - 1))


def _parts(error: BaseException) -> Iterator[BaseException]:
    """``error`` and every error it came from, each once."""
    seen: dict[int, BaseException] = {}
    todo: list[Any] = [error]
    while todo:
        part = todo.pop()
        if not isinstance(part, BaseException) or id(part) in seen:
            continue
        seen[id(part)] = part
        todo += [getattr(part, name, None) for name in _PARTS]
        todo += getattr(part, "worker_failures", {}).values()
    yield from seen.values()
