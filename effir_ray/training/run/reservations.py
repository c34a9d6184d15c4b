"""What the workers of a run reserve, and who gives it back when those who should have are dead."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner


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


class MortalCleaner(PlacementGroupCleaner):  # type: ignore[misc]
    """Ray's actor that frees the reservation of a dead controller, and then really ends.

    It watches in a thread, and what ends an actor there ends only the thread: a process of 200 MB would stay
    for every controller that was killed, for as long as the cluster lives.
    """

    def _exit(self) -> None:
        if threading.current_thread() is self._monitor_thread:
            os._exit(0)
        super()._exit()


class _CleanerCallback(PlacementGroupCleanerCallback):  # type: ignore[misc]
    def after_controller_start(self, train_run_context: Any) -> None:
        plain = placement_group_callback.PlacementGroupCleaner
        placement_group_callback.PlacementGroupCleaner = MortalCleaner
        try:
            super().after_controller_start(train_run_context)
        finally:
            placement_group_callback.PlacementGroupCleaner = plain


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A ``TorchTrainer`` of whose killed runs nothing stays."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            _CleanerCallback() if type(callback) is PlacementGroupCleanerCallback else callback
            for callback in super()._create_default_callbacks()
        ]
