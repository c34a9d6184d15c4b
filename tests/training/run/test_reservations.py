"""Reservations of a run by its name; those of controllers that are really killed are in
``test_killed_runs``."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import placement_group, placement_group_table

from effir_ray.cluster.connection import connect
from effir_ray.training.run.reservations import NamedReservation, release


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
