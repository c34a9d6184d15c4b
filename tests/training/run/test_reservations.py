"""Reservations of a run by its name; those of controllers that are really killed are in
``test_killed_runs``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import placement_group, placement_group_table

from effir_ray.cluster.connection import connect
from effir_ray.training.run.reservations import NamedReservation, Trainer, release
from tests.helpers.training_runs import processes, when

KNOWN = (
    "TrainController",
    "RayTrainWorker",
    "SynchronizationActor",
    "DatasetManager",
    "PreemptionWatcher",
    "PlacementGroupCleaner",
)


def running() -> set[str]:
    return {name for name in KNOWN if processes(f"ray::{name}")}


@pytest.mark.integration
def test_what_a_failed_start_reserved_is_given_back(tmp_path: Path) -> None:
    """What other runs have reserved stays theirs."""
    connect(None)
    mine, other = str(tmp_path), str(tmp_path / "other")
    with NamedReservation(mine).on_worker_group_start():
        group = worker_group.placement_group([{"CPU": 0.1}])
    assert worker_group.placement_group is placement_group
    with NamedReservation(other).on_worker_group_start():
        kept = worker_group.placement_group([{"CPU": 0.1}])
    ray.get([group.ready(), kept.ready()])
    release(mine)
    release(mine)  # nothing is left: nothing to do
    assert placement_group_table(group)["state"] == "REMOVED"
    assert placement_group_table(kept)["state"] == "CREATED"
    release(other)


@pytest.mark.integration
def test_a_run_on_a_private_instance_starts_no_process_that_it_does_not_need(tmp_path: Path) -> None:
    """Beside its controller and its worker Ray Train has one, where the workers meet."""
    connect(None)
    seen: set[str] = set()
    watcher = when(lambda: seen.update(running()) or (tmp_path / "ended").exists(), lambda: None)
    with watcher:
        trainer = Trainer(
            lambda: time.sleep(1),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(storage_path=str(tmp_path / "runs")),
        )
        trainer.fit()
        (tmp_path / "ended").touch()
    assert "ENABLE_PREEMPTION" not in " ".join(os.environ)
    assert seen == {"TrainController", "RayTrainWorker", "SynchronizationActor"}
