"""What the workers of a run reserve, and who gives it back when those who should have are dead."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from effir_ray.cluster.connection import is_private


class NamedReservation(WorkerGroupCallback):  # type: ignore[misc]  # Ray has no types
    """Gives what Ray Train reserves for the workers of ``run`` a name from the start, for ``release``."""

    def __init__(self, run: str) -> None:
        self._prefix = _reservations(run)

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        from ray.train.v2._internal.execution.worker_group import worker_group

        unnamed = worker_group.placement_group

        def named(*arguments: Any, **options: Any) -> Any:
            return unnamed(*arguments, name=f"{self._prefix}{uuid.uuid4().hex}", **options)

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
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group, known in ray.util.placement_group_table().items():
        if known["name"].startswith(_reservations(run)) and known["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def _reservations(run: str) -> str:
    return f"effir-ray-{hashlib.sha256(run.encode()).hexdigest()[:16]}-"


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A ``TorchTrainer`` that starts no process it does not need, and of whose killed runs none stays.

    Each of Ray Train's helpers is a process of its own that imports what a worker does. Here no run reads Ray
    datasets. On a private instance the driver gives back what a dead controller reserved (``release``); Ray's
    cleaner asks a dashboard that is not there whether the controller lives, and would wait for it for ever.
    Nor does anybody preempt its only node.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = (DatasetsCallback, *([PlacementGroupCleanerCallback] if is_private() else []))
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
