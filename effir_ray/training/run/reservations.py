"""What the workers of a run reserve, and who gives it back when those who should have are dead."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from effir_ray.cluster.connection import is_private
from effir_ray.training.run.resizing import EvenShares

_OURS = "effir-ray-"
_NO_CONTROLLER = "none"


class NamedReservation(WorkerGroupCallback):  # type: ignore[misc]  # Ray has no types
    """Gives what Ray Train reserves for the workers of ``run`` a name from the start, which says who reserved
    it: for ``release`` and ``release_abandoned``."""

    def __init__(self, run: str) -> None:
        self._prefix = _reservations(run)

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        import ray
        from ray.train.v2._internal.execution.worker_group import worker_group

        unnamed = worker_group.placement_group
        controller = ray.get_runtime_context().get_actor_id() or _NO_CONTROLLER

        def named(*arguments: Any, **options: Any) -> Any:
            name = f"{self._prefix}{controller}-{uuid.uuid4().hex}"
            return unnamed(*arguments, name=name, **options)

        worker_group.placement_group = named
        try:
            yield
        finally:
            worker_group.placement_group = unnamed


def release(run: str) -> None:
    """Give back what the workers of an earlier start of this run have reserved.

    Ray Train's controller does it, unless it is killed itself. Then CPUs and GPUs stay taken until the driver
    ends, and the next start waits for them: Ray's own cleaner hears of a reservation only when its workers
    run, and asks the dashboard whether the controller lives.
    """
    _remove(lambda name: name.startswith(_reservations(run)))


def release_abandoned() -> None:
    """Give back what controllers that are dead have reserved, for whatever run on this cluster.

    That of a trial's process that was killed, and whose trial is not tried again or not yet, stays taken as
    long as the study's driver lives: other trials would wait for it.
    """
    from ray._private import state  # the public way asks the dashboard, which need not be there

    def abandoned(name: str) -> bool:
        if not name.startswith(_OURS):
            return False
        controller = name.removeprefix(_OURS).split("-")[1]
        return controller != _NO_CONTROLLER and state.actors(controller).get("State", "DEAD") == "DEAD"

    _remove(abandoned)


def _remove(which: Callable[[str], bool]) -> None:
    """Give back the reservations whose name is one of those."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group, known in ray.util.placement_group_table().items():
        if known["state"] != "REMOVED" and which(known["name"]):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def _reservations(run: str) -> str:
    return f"{_OURS}{hashlib.sha256(run.encode()).hexdigest()[:16]}-"


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A ``TorchTrainer`` that starts no process it does not need, and of whose killed runs none stays.

    Each of Ray Train's helpers is a process of its own that imports what a worker does. Here no run reads Ray
    datasets. The driver gives back what a dead controller reserved (``release``), and Ray does when the
    driver dies; Ray Train's cleaner, which belongs to no driver, asks the dashboard whether the controller
    lives, and where there is none it stays for ever. Nobody preempts the only node of a private instance.
    """

    def __init__(self, *arguments: Any, numbers_of_workers: Sequence[int] = (), **options: Any) -> None:
        """``numbers_of_workers``: those that may run, where their number may change."""
        super().__init__(*arguments, **options)
        self._numbers = numbers_of_workers

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = EvenShares(self.scaling_config, self._numbers)
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unneeded)]

    def fit(self) -> Any:
        if not is_private():
            return super().fit()
        before = os.environ.get(ENABLE_PREEMPTION_WATCHER_ENV_VAR)
        os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"  # handed on to the controller
        try:
            return super().fit()
        finally:
            os.environ.pop(ENABLE_PREEMPTION_WATCHER_ENV_VAR)
            if before is not None:
                os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = before
