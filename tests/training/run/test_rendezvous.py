"""Workers of a private instance meet without opening a port to others."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from effir_ray.cluster.connection import INSTANCE, connect


def _meet() -> dict[str, object]:
    import ray.train
    import torch
    import torch.distributed as dist

    number = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(number)
    process = psutil.Process()
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    meeting_places = list(Path(os.environ[INSTANCE]).glob("*/rendezvous"))
    ray.train.report({})
    return {"sum": number.item(), "listening": listening, "places": len(meeting_places)}


@pytest.mark.integration
def test_two_workers_sum_up_and_listen_on_loopback_alone(tmp_path: Path) -> None:
    connect(num_cpus=2)
    from ray.train import RunConfig, ScalingConfig

    from effir_ray.training.run.rendezvous import FileConfig, torch_config
    from effir_ray.training.run.reservations import Trainer

    config = torch_config("gloo")
    assert isinstance(config, FileConfig)
    trainer = Trainer(
        _meet,
        torch_config=config,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=str(tmp_path)),
    )
    found = trainer.fit().return_value
    assert found["sum"] == 3
    assert set(found["listening"]) == {"127.0.0.1"}
    assert found["places"] == 1, "in the folder that goes with the instance"
