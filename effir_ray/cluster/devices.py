"""Computing where a GPU is reserved, and waiting for nodes that have what work needs.

A process that Ray started without a GPU must not take one. What ``ray.cluster_resources()`` shows is what is
there now: an autoscaler starts nodes for what somebody asks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from effir_ray.cluster.connection import is_connected, is_private, through_client
from effir_ray.cluster.probe import Shared, current, everywhere
from effir_ray.errors import InputError
from effir_ray.hardware import Hardware, detect
from effir_ray.progress import duration, progress_stream, show_progress

T = TypeVar("T")

WAITING = "waiting for a GPU"

AUTOSCALER_SECONDS = 1800.0
"""For so long a node that the cluster's autoscaler can start is waited for."""

EMPTY_SECONDS = 300.0
"""For so long nodes are waited for where nothing but the head is there, and nobody known to start any."""

STATIC_SECONDS = 60.0
"""The same where some nodes are there, before anything has begun: the others may be on their way."""

_REFUSED = "whose autoscaler starts no such nodes"

_SAY_SECONDS, _LOOK_SECONDS = 10.0, 0.5
_STATUS_SECONDS = 10
_MOST_NODES = 8  # that a message lists

_KINDS = ("GPU", "CPU")


@dataclass(frozen=True, kw_only=True)
class Computed(Generic[T]):
    """``seconds``: how long it took, the wait for a GPU left out."""

    value: T
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a cluster has for some workers: whether each gets a GPU, and how many CPUs there are in all."""

    gpus: bool
    cpus: float


_reserves: ContextVar[bool | None] = ContextVar("effir_ray_reserves", default=None)
_share: ContextVar[float] = ContextVar("effir_ray_share", default=1.0)
_avoid: ContextVar[Sequence[str]] = ContextVar("effir_ray_avoid", default=())


def reserving(gpus: bool) -> AbstractContextManager[None]:
    """Within it work goes to GPUs, or never does, whatever nodes are up: a study computes on one kind."""
    return _within(_reserves, gpus)


def sharing(gpus: float) -> AbstractContextManager[None]:
    """Within it what computes in one process reserves that share of a GPU, beside others."""
    return _within(_share, gpus)


def avoiding(nodes: Sequence[str]) -> AbstractContextManager[None]:
    """Within it no GPU of ``nodes``, by their ids, is used."""
    return _within(_avoid, nodes)


@contextmanager
def _within(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def avoided(nodes: Sequence[str], kind: str) -> dict[str, str]:
    """Ray's label selector for other nodes than ``nodes``; an empty one where no other has such resources."""
    if not nodes:
        return {}
    import ray

    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get(kind, 0) > 0 and node["NodeID"] not in nodes
    ]
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if others else {}


def uses_gpus() -> bool:
    """Whether work goes to GPUs: as the study does, else where the cluster has any now."""
    decided = _reserves.get()
    return _totals()[0] > 0 if decided is None else decided


def room(workers: int = 1, cpus: float = 1.0) -> Room:
    """Room for ``workers`` with so many CPUs each, and a GPU each where the cluster has or can get any.

    Waits, and says so, for nodes that an autoscaler starts, or that are on their way. Raises InputError,
    which lists what there is, for more than a private instance has, for what an autoscaler says it can never
    bring, and when the wait has been too long.
    """
    alone = is_private()
    gpus = uses_gpus() or (not alone and _reserves.get() is None and _brings_gpus(_address()))
    need = (float(workers) if gpus else 0.0, workers * cpus)
    if not _has(need) and alone:
        raise _too_few(workers, cpus, need, "")
    if not _has(need):
        bundles = [{"CPU": cpus, **({"GPU": 1.0} if gpus else {})}] * workers
        refused = _wait(bundles, lambda: _has(need), _in_words(need))
        if refused is not None:
            raise _too_few(workers, cpus, need, refused)
    # Nodes without an autoscaler may have brought the first GPU.
    if not gpus and _reserves.get() is None and _totals()[0] > 0:
        return room(workers, cpus)
    return Room(gpus=gpus, cpus=_totals()[1])


@cache
def _brings_gpus(cluster: str) -> bool:
    """Whether the autoscaler of the ``cluster`` of that address starts nodes with GPUs; then one is there."""
    if not _has_autoscaler():
        return False
    failed = _wait([{"GPU": 1.0}], lambda: _totals()[0] > 0, "a GPU")
    if failed not in (None, _REFUSED):
        raise _too_few(1, 1.0, (1.0, 1.0), str(failed))
    return failed is None


def _wait(bundles: list[dict[str, float]], enough: Callable[[], bool], what: str) -> str | None:
    """Ask the cluster for ``bundles`` and wait until there is ``enough``; or why that is in vain."""
    from ray.util.placement_group import placement_group, remove_placement_group

    autoscaled = _has_autoscaler()
    begun = said = time.monotonic()
    demand = placement_group(bundles)  # seen by an autoscaler, and given back as soon as nodes are there
    refusal = _Refusal(demand=demand.id.hex(), bundle=bundles[0])
    try:
        while not enough():
            waited = time.monotonic() - begun
            begins = _reserves.get() is None and any(_totals())  # nothing is lost by an early end
            limit = AUTOSCALER_SECONDS if autoscaled else STATIC_SECONDS if begins else EMPTY_SECONDS
            if autoscaled and refusal.holds():
                return _REFUSED
            if waited > limit:
                return f"after {duration(waited)}"
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                _say(f"waiting for {what}, {duration(waited)}")
            time.sleep(_LOOK_SECONDS)
    finally:
        remove_placement_group(demand)
    return None


@dataclass(kw_only=True)
class _Refusal:
    """What the autoscaler says of the placement group ``demand``, all of whose bundles are like ``bundle``.

    It also calls a group infeasible that only lacks what somebody else uses now. So its word counts where
    nothing was in use that the group could have had, in the state of the nodes that it judged by.
    """

    demand: str
    bundle: dict[str, float]
    _free_since: int | None = None

    def holds(self) -> bool:
        """Whether it has looked at the group and can never bring nodes for it."""
        status = _cluster_status()
        nodes, autoscaler = status.cluster_resource_state, status.autoscaling_state
        rooms = [
            (self._fits(n.total_resources), self._fits(n.available_resources)) for n in nodes.node_states
        ]
        if any(in_all > free for in_all, free in rooms):
            self._free_since = None
            return False
        if self._free_since is None:
            self._free_since = nodes.cluster_resource_state_version
        return autoscaler.last_seen_cluster_resource_state_version >= self._free_since and any(
            request.details.startswith(self.demand)
            for request in autoscaler.infeasible_gang_resource_requests
        )

    def _fits(self, resources: Mapping[str, float]) -> int:
        """How many bundles a node has room for."""
        return min(int(resources.get(kind, 0.0) // amount) for kind, amount in self.bundle.items())


def _has_autoscaler() -> bool:
    return bool(_cluster_status().autoscaling_state.autoscaler_state_version)


def _cluster_status() -> Any:
    """Nodes and what the cluster's autoscaler last told; empty where none is, or none can be reached."""
    from ray import _raylet
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    raylet: Any = _raylet  # its stub leaves the client out
    reply = GetClusterStatusReply()
    if address := _address():
        reply.ParseFromString(raylet.GcsClient(address).get_cluster_status(timeout_s=_STATUS_SECONDS))
    return reply


def _address() -> str:
    """Of the cluster's control service; "" through the Ray client, which does not reach it."""
    import ray

    return "" if through_client() else str(ray.get_runtime_context().gcs_address)


def _totals() -> tuple[float, float]:
    """GPUs and CPUs of the nodes that are up."""
    import ray

    found = ray.cluster_resources()
    return float(found.get("GPU", 0.0)), float(found.get("CPU", 0.0))


def _has(need: tuple[float, float]) -> bool:
    return all(there >= wanted for there, wanted in zip(_totals(), need, strict=True))


def _too_few(workers: int, cpus: float, need: tuple[float, float], why: str) -> InputError:
    each = f" of {cpus:g} CPUs each" if cpus != 1 else ""
    several = f"{workers} workers{each} need" if workers > 1 else f"a worker{each} needs"
    there = _in_words(_totals())
    lower = "lower their number, or start nodes first" if workers > 1 else "start nodes first"
    return InputError(
        f"{several} {_in_words(need)}, and the cluster{f', {why},' if why == _REFUSED else ''} has {there}"
        f"{_inventory()}{f' {why}' if why not in ('', _REFUSED) else ''}; {lower}"
    )


def _in_words(amounts: tuple[float, float]) -> str:
    kinds = (f"{amount:g} {kind}{'s' * (amount != 1)}" for amount, kind in zip(amounts, _KINDS, strict=True))
    return " and ".join(words for words, amount in zip(kinds, amounts, strict=True) if amount) or "none"


def _inventory() -> str:
    """``" (node-1: 4 CPUs; node-2: 1 GPU and 8 CPUs)"``; "" of a private instance."""
    import ray

    if is_private():
        return ""
    nodes = [
        f"{node['NodeManagerHostname']}: "
        + _in_words((node["Resources"].get("GPU", 0.0), node["Resources"].get("CPU", 0.0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    more = [f"{len(nodes) - _MOST_NODES} more"] if len(nodes) > _MOST_NODES else []
    return f" ({'; '.join([*nodes[:_MOST_NODES], *more])})"


def _say(line: str) -> None:
    stream = progress_stream()
    if stream is not None:
        print(line, file=stream, flush=True)


def on_device(function: Callable[..., T], *arguments: Any) -> Computed[T]:
    """``function(*arguments)`` on a GPU, or a share of one, that is reserved for it, where the cluster has
    GPUs; else here.

    A process that has a GPU already (a stage within a stage) uses that one. Progress goes where this
    process's goes, if that is a file that the other process sees. Raises what ``function`` raises.
    """
    if not is_connected() or not uses_gpus():
        return _timed(function, *arguments)
    import ray

    if ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return _timed(function, *arguments)
    log = _log()
    if log is not None and ray.available_resources().get("GPU", 0) < _share.get():
        with log.open("a") as lines:
            lines.write(f"{WAITING}\n")
    # Without a strategy of its own the task would have to fit into the reservation of this trial, a sliver
    # of a CPU. A lost one is the trial's to try again.
    options: dict[str, Any] = {}
    if selector := avoided(_avoid.get(), "GPU"):
        options["label_selector"] = selector
    options |= {"num_cpus": 0, "num_gpus": _share.get(), "max_retries": 0, "scheduling_strategy": "DEFAULT"}
    task = ray.remote(**options)(_there)
    try:
        found: Computed[T] = ray.get(task.remote(current(), log, function, *arguments))
    except ray.exceptions.RayTaskError as error:
        if error.cause is None or isinstance(error.cause, ray.exceptions.RayError):
            raise
        raise error.cause from None
    return found


def lacks_nodes() -> bool:
    """Whether this process is connected to a cluster, and no node is up on which work could go on."""
    if not is_connected():
        return False
    gpus, cpus = _totals()
    return cpus == 0 or (uses_gpus() and gpus == 0)


def machine() -> Hardware:
    """What stages compute on: a GPU's process where the cluster has or can get any, else this machine, whose
    GPUs do not count where none shall be reserved."""
    if not is_connected():
        return detect()
    room()
    if _reserves.get() is False:
        import ray

        # In this process they could be seen; Ray hides them from what has reserved none.
        return cast(Hardware, ray.get(ray.remote(num_cpus=0)(detect).remote()))
    return on_device(detect).value


def _there(
    shared: Shared | None, log: Path | None, function: Callable[..., T], *arguments: Any
) -> Computed[T]:
    with ExitStack() as stack:
        stack.enter_context(everywhere(shared))
        if log is not None and log.parent.is_dir():  # a machine that sees the same disk
            stack.enter_context(show_progress(stack.enter_context(log.open("a", buffering=1))))
        return _timed(function, *arguments)


def _timed(function: Callable[..., T], *arguments: Any) -> Computed[T]:
    started = time.monotonic()
    value = function(*arguments)
    return Computed(value=value, seconds=time.monotonic() - started)


def _log() -> Path | None:
    name = getattr(progress_stream(), "name", None)
    return Path(name) if isinstance(name, str) and Path(name).is_file() else None
