"""Reservations of a run by its name; those of controllers that are really killed are in
``test_killed_runs``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import ray
from ray._private import state
from ray.cluster_utils import Cluster
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import placement_group, placement_group_table

from effir_ray.cluster.connection import connect
from effir_ray.training.run.reservations import NamedReservation, Trainer, release, release_abandoned
from tests.helpers.training_runs import has_step, processes, settings, wait_for, when

KNOWN = (
    "TrainController",
    "RayTrainWorker",
    "SynchronizationActor",
    "DatasetManager",
    "PreemptionWatcher",
    "PlacementGroupCleaner",
)


def running(*, but: set[int]) -> set[str]:
    found = {name: {process.pid for process in processes(f"ray::{name}")} for name in KNOWN}
    return {name for name, pids in found.items() if pids - but}


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


class Controller:
    def reserve(self, run: str) -> str:
        with NamedReservation(run).on_worker_group_start():
            group = worker_group.placement_group([{"CPU": 0.1}])
        ray.get(group.ready())
        return str(group.id.hex())


@pytest.mark.integration
def test_what_controllers_that_are_dead_reserved_is_given_back() -> None:
    """Their driver lives, as that of a study does whose trial was killed."""
    connect(None)
    dead, living = (ray.remote(num_cpus=0)(Controller).remote() for _ in range(2))
    groups = ray.get([dead.reserve.remote("a"), living.reserve.remote("b")])
    ray.kill(dead)
    deadline = time.monotonic() + 60
    while placement_group_table()[groups[0]]["state"] != "REMOVED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
        release_abandoned()
    assert placement_group_table()[groups[1]]["state"] == "CREATED"
    release("b")


TRAINING = """
import sys
from pathlib import Path
from effir_ray.training.config import TrainConfig
from effir_ray.training.run.launcher import train
config = TrainConfig.model_validate_json(sys.argv[1])
train("random:llama", config, Path(sys.argv[2]), address=sys.argv[3])
"""


def _kill_a_driver(config: str, out: Path) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 128 * 1024**2},
    )
    try:
        command = [sys.executable, "-c", TRAINING, config, str(out), cluster.address]
        driver = subprocess.Popen(command, start_new_session=True)
        wait_for(partial(has_step, out, 2))
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        connect(cluster.address)
        deadline = time.monotonic() + 60
        while left := _left():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _left() -> list[str]:
    """Actors that live, but for the one of Ray's that every cluster has one of; and what is reserved."""
    groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [actor["ActorClassName"] for actor in state.actors().values() if actor["State"] != "DEAD"]
    return groups + [name for name in actors if name != "_AutoscalingCoordinatorActor"]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_killed_driver_leaves_nothing_where_there_is_no_dashboard(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, steps=1000).model_dump_json()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(_kill_a_driver, config, tmp_path / "out").result()


@pytest.mark.integration
def test_a_run_on_a_private_instance_starts_no_process_that_it_does_not_need(tmp_path: Path) -> None:
    """Beside its controller and its worker Ray Train has one, where the workers meet."""
    connect(None)
    seen: set[str] = set()
    before = {process.pid for process in processes("ray::")}  # of other tests
    watcher = when(lambda: seen.update(running(but=before)) or (tmp_path / "ended").exists(), lambda: None)
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
