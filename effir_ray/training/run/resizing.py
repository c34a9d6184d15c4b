"""How many workers a run has whose number of them may change."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray._private.ray_constants import env_float
from ray.exceptions import RayError
from ray.train.v2._internal.constants import (
    DEFAULT_WORKER_GROUP_START_TIMEOUT_S,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2.api.config import ScalingConfig

_ANSWER_SECONDS = 3.0
_PAUSE_SECONDS = 1.0
_ROUNDING = 1e-6


class EvenShares(ElasticScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """Ray Train's own policy, but among ``numbers`` of workers alone, and of the cluster as it is now.

    Ray's takes any number, looks at the nodes every 20 s, and where there are too few it asks again and again
    without a pause and for ever.
    """

    def __init__(self, scaling: ScalingConfig, numbers: Sequence[int]) -> None:
        super().__init__(scaling)
        self._numbers = numbers
        self._waits_since: float | None = None
        self._latest_reserved_resources: Any = None
        self._patience = env_float(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S)

    def make_decision_for_non_running_worker_group(self) -> Any:
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since = now
            self._latest_reserved_resources_query_time = float("-inf")  # what ran has just been lost
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._waits_since = None
        elif now - self._waits_since > self._patience:
            raise WorkerGroupStartupFailedError(
                f"no room for {self._numbers[0]} workers within {self._patience:g} s"
            )
        else:
            time.sleep(_PAUSE_SECONDS)
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Only ever more workers: those of a lost node fail, and a busy one may have been slow to answer."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        grows = getattr(decision, "num_workers", 0) > worker_group_state.num_workers
        return decision if grows else NoopDecision()

    def _count_possible_workers(self, reserved: Any) -> int:
        """Ray's own loses a worker where shares of a CPU add up to a little less."""
        each = {
            name: need for name, need in self.scaling_config._resources_per_worker_not_none.items() if need
        }
        possible = sum(
            min(int(resources.get(name, 0.0) / need + _ROUNDING) for name, need in each.items())
            for resources in reserved.values()
        )
        return max((number for number in self._numbers if number <= possible), default=0)

    def _get_reserved_resources(self) -> Any:
        """Without the nodes that do not answer: a lost one counts until Ray misses it, up to half a minute
        later, and new workers would be waited for there."""
        age = time.monotonic() - self._latest_reserved_resources_query_time
        if age < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        try:
            found = self._autoscaling_coordinator.get_reserved_resources.remote(
                self._requester_id, recompute=True
            )
            reserved = ray.get(found, timeout=_ANSWER_SECONDS)
        except RayError:
            reserved = None
        if reserved is not None:
            there = {node["NodeID"] for node in ray.nodes() if node["Alive"] and _answers(node)}
            reserved = {node: resources for node, resources in reserved.items() if node in there}
        self._latest_reserved_resources_query_time = time.monotonic()
        self._latest_reserved_resources = reserved
        return reserved


def _answers(node: dict[str, Any]) -> bool:
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        with socket.create_connection(address, timeout=_ANSWER_SECONDS):
            return True
    except OSError:
        return False
