"""Whether every node of a cluster sees the same: output folder, data, models, versions.

A process that writes to a folder of its own node's, or reads other data there, ends without an error and with
half a result. ``check_shared`` is asked before the start; ``Shared`` goes along with the work, for nodes that
join later.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from effir_ray.cluster.connection import on_cluster, through_client
from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.provenance import __version__

Find = Callable[[], Mapping[str, Path]]
"""Name -> file of all that is read of a data set or a model, where it is called. Picklable; raises InputError
where it is not there."""

MARK = ".shared"
"""A file in an output folder, by which a node knows it again; answers of nodes begin with its name."""

ANSWER_SECONDS = 180.0
"""A node has to start a process within them, and to look."""

_SIGHT_SECONDS = 5.0  # until a network file system shows a file that another machine has just written
_END = 2**20  # bytes of a file's beginning and end that are compared


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every node must see. ``folder``: of the output, None of one in an object store, and the ``mark``
    in it; ``reads``: what is read, by what it is called; ``found``: of each the files on ``host``, where the
    work was started; ``versions`` there, by package."""

    folder: Path | None
    mark: str
    reads: Mapping[str, Find]
    found: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    host: str

    def check(self) -> None:
        """Raise InputError where this node sees something else, naming it. Costs nothing the next time."""
        if self.mark in _checked:
            return
        problem = self._problem()
        if problem is not None:
            raise InputError(f"node {_node()}: {problem}")
        _checked.add(self.mark)

    def _problem(self) -> str | None:
        for package, version in _versions().items():
            if version != self.versions[package]:
                return (
                    f"{package} is {version} there and {self.versions[package]} on {self.host}; install the "
                    "same on every node"
                )
        if self.folder is not None and not _seen(self.folder / MARK, self.mark):
            return (
                f"the output folder {self.folder} is not the one of {self.host}; every node must see the "
                "same folder at this path: mount shared storage there, or choose another"
            )
        for what, find in self.reads.items():
            try:
                there = _files(find)
            except (InputError, OSError) as error:
                return f"{what} is not there ({error}); put it where every node sees it"
            different = _difference(self.found[what], there)
            if different:
                return (
                    f"{what}: {different} is not what it is on {self.host}; put the same on every node, or "
                    "use shared storage"
                )
        return None


_checked: set[str] = set()
"""Marks of what this process has compared."""

_current: ContextVar[Shared | None] = ContextVar("effir_ray_shared", default=None)


def current() -> Shared | None:
    """What the work that runs here needs every node to see; None of a private instance."""
    return _current.get()


@contextmanager
def everywhere(shared: Shared | None) -> Iterator[None]:
    """Work that needs all nodes to see what is ``shared``: checked here, and, as ``current``, by processes
    that this one starts. Raises InputError as ``Shared.check``."""
    if shared is not None:
        shared.check()
    token = _current.set(shared)
    try:
        yield
    finally:
        _current.reset(token)


def check_shared(folder: Path | None, reads: Mapping[str, Find]) -> Shared | None:
    """Ask every live node of the cluster that this process is connected to; None on a private instance.

    ``folder``: where results go, None in an object store. The files of ``reads`` are compared by name, size
    and their ends. Work within a trial was asked for with its study. Raises InputError for the first node
    that sees something else, or does not answer.
    """
    if current() is not None or not on_cluster():
        return current()
    new = folder is not None and not folder.exists()
    try:
        mark, made = _marked(folder)
        shared = Shared(
            folder=folder,
            mark=mark,
            reads=dict(reads),
            found={what: _files(find) for what, find in reads.items()},
            versions=_versions(),
            host=platform.node(),
        )
        try:
            _ask_nodes(shared)
        except BaseException:
            if folder is not None and made:
                (folder / MARK).unlink(missing_ok=True)
            raise
    except InputError:
        if folder is not None and new:
            with suppress(OSError):  # not empty: somebody else's
                folder.rmdir()
        raise
    return shared


def is_unused(folder: Path) -> bool:
    """Whether nothing was written to ``folder`` but what ``check_shared`` writes."""
    return not folder.exists() or all(entry.name.startswith(MARK) for entry in folder.iterdir())


def _marked(folder: Path | None) -> tuple[str, bool]:
    """The mark of ``folder``, and whether it has only now got one."""
    if folder is None:
        return uuid.uuid4().hex, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{MARK}-*"):  # of a killed run
            if time.time() - old.stat().st_mtime > 10 * ANSWER_SECONDS:
                old.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            return (folder / MARK).read_text(encoding="utf-8"), False
        mark = uuid.uuid4().hex
        write_whole(folder / MARK, mark)
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as the output folder: {error.strerror}") from None
    return mark, True


def _ask_nodes(shared: Shared) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if not through_client() and set(nodes) == {ray.get_runtime_context().get_node_id()}:
        return
    task = ray.remote(num_cpus=0, max_retries=0)(_answer)
    names, asked = {}, {}
    for number, node in nodes.items():
        answer = shared.folder and shared.folder / f"{MARK}-{uuid.uuid4().hex}"
        names[number] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        strategy = NodeAffinitySchedulingStrategy(number, soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(shared, answer)] = number, answer
    waiting, deadline = list(asked), time.monotonic() + ANSWER_SECONDS
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = ", ".join(sorted(names[asked[each][0]] for each in waiting))
                raise InputError(
                    f"node {late}: does not start a process within {ANSWER_SECONDS:.0f} s; mend it or take "
                    "it out of the cluster"
                )
            number, answer = asked[done[0]]
            problem = _outcome(done[0], number)
            if problem is None and answer is not None and not _seen(answer, shared.mark):
                problem = (
                    f"what it writes to {shared.folder} is not seen on {shared.host}; use shared storage"
                )
            if problem:
                raise InputError(f"node {names[number]}: {problem}")
    finally:
        for _, answer in asked.values():
            if answer is not None:
                answer.unlink(missing_ok=True)


def _outcome(reference: Any, number: str) -> str | None:
    """What is wrong with a node, "" where that does not matter: it is gone."""
    import ray
    from ray.exceptions import RayError

    try:
        problem: str | None = ray.get(reference)
        return problem
    except RayError as error:
        if number not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            return ""
        reason = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
        return f"cannot run effir-ray ({reason[-1].strip()}); install the same on every node"


def _answer(shared: Shared, answer: Path | None) -> str | None:
    """Runs on a node: what is different there; None for nothing, and then ``answer`` is written."""
    problem = shared._problem()
    if problem is None and answer is not None:
        try:
            write_whole(answer, shared.mark)
        except OSError as error:
            return f"cannot write to {shared.folder} ({error.strerror})"
    return problem


def _seen(file: Path, content: str) -> bool:
    """Whether ``file`` has that ``content``, after a while."""
    deadline = time.monotonic() + _SIGHT_SECONDS
    while True:
        with suppress(OSError):
            if file.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _files(find: Find) -> dict[str, str]:
    """Name of a file -> its size and a hash of its ends."""
    return {name: _print(path) for name, path in find().items()}


def _print(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in (0, max(0, size - _END)):
            file.seek(start)
            digest.update(file.read(_END))
    return f"{size} {digest.hexdigest()}"


def _difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """The name of a file that is another there, or is only in one place; "" for none."""
    return next((name for name in sorted({*here, *there}) if here.get(name) != there.get(name)), "")


def _versions() -> dict[str, str]:
    """What stages are computed by. Builds of torch for other devices (``+cpu``) are one version."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"effir-ray": __version__, "Python": python, "torch": metadata.version("torch").partition("+")[0]}


def _node() -> str:
    import ray

    return f"{platform.node()} ({ray.util.get_node_ip_address()})"
