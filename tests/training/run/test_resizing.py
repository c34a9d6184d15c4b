"""Which number of workers a run gets, of what a cluster has for it."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from effir_ray.cluster.lost import is_lost_process
from effir_ray.training.config import TrainConfig
from effir_ray.training.run import resizing
from effir_ray.training.run.resizing import EvenShares


def policy(workers: tuple[int, int], cpus: float = 1) -> EvenShares:
    config = TrainConfig(dataset="unused", batch_size=24, workers=workers, zero_stage=0)
    scaling = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus})
    return EvenShares(scaling, config.numbers_of_workers)


@pytest.mark.parametrize(("cpus", "workers"), [(1, 0), (2, 2), (5, 4), (7, 6), (9, 8), (99, 8)])
def test_a_number_that_would_share_a_batch_unevenly_is_passed_over(cpus: int, workers: int) -> None:
    nodes = {"a": {"CPU": float(cpus - cpus // 2)}, "b": {"CPU": float(cpus // 2)}}
    assert policy((2, 8))._count_possible_workers(nodes) == workers


def test_shares_of_a_cpu_add_up() -> None:
    assert (0.99 + 0.99 + 0.99) // 0.99 == 2
    assert policy((1, 3), 0.99)._count_possible_workers({"a": {"CPU": 0.99 + 0.99 + 0.99}}) == 3
    assert policy((1, 3), 0.99)._count_possible_workers({"a": {"CPU": 2.96}}) == 2


def test_a_node_that_does_not_answer_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        assert resizing._answers(node)
    assert not resizing._answers(node)


@pytest.mark.parametrize(("room", "grows_to"), [(1.0, None), (4.0, None), (5.0, None), (6.0, 6)])
def test_workers_that_run_are_only_ever_joined_by_more(
    room: float, grows_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvenShares, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(EvenShares, "_get_reserved_resources", lambda self: {"a": {"CPU": room}})
    running = SimpleNamespace(num_workers=4, start_time=0.0)
    monkeypatch.setattr(resizing.time, "monotonic", lambda: 1000.0)
    decision = policy((1, 8)).make_decision_for_running_worker_group(running, None)
    assert getattr(decision, "num_workers", None) == grows_to


def test_room_for_the_fewest_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, connected = policy((2, 8)), ray.is_initialized()
    monkeypatch.setattr(resizing, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(EvenShares, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(EvenShares, "_get_reserved_resources", lambda self: {"a": {"CPU": 1.0}})
    assert isinstance(waiting.make_decision_for_non_running_worker_group(), NoopDecision)
    waiting._patience = 0.0
    with pytest.raises(WorkerGroupStartupFailedError, match="no room for 2 workers within 0 s") as given_up:
        waiting.make_decision_for_non_running_worker_group()
    assert is_lost_process(given_up.value)
    monkeypatch.setattr(EvenShares, "_get_reserved_resources", lambda self: {"a": {"CPU": 5.0}})
    decision: Any = waiting.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 4
    assert ray.is_initialized() == connected, "nothing of this asks Ray"
