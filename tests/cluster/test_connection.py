"""Connecting to Ray."""

import os
import subprocess
import sys

import pytest
import torch

from effir_ray.cluster.connection import worker_environment

_LOCAL = """
from effir_ray.cluster.connection import connect
connect(num_cpus=2)
connect()
import ray
@ray.remote
def worker_policy():
    import os
    return os.environ["OMP_WAIT_POLICY"]
print(ray.get(worker_policy.remote()), int(ray.cluster_resources()["CPU"]))
"""

_NOBODY = """
from effir_ray.cluster.connection import connect
from effir_ray.errors import InputError
try:
    connect("127.0.0.1:1")
except InputError as error:
    print(error)
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )


def test_only_a_training_worker_without_gpu_tells_deepspeed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may stand on a head without GPUs, and its workers on nodes with them."""
    from effir_ray.hardware import detect
    from effir_ray.training.config import TrainConfig
    from effir_ray.training.run.loop import _device

    assert "DS_ACCELERATOR" not in worker_environment()
    if detect().device == "cuda":
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("ray.get_gpu_ids", list)  # outside a worker Ray would start for the question
    threads = torch.get_num_threads()
    try:
        _device(TrainConfig(dataset="stdlib"))
    finally:
        torch.set_num_threads(threads)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.integration
def test_a_private_instance_is_quiet_and_prepares_its_workers() -> None:
    done = _run(_LOCAL)
    assert done.stdout == "passive 2\n"
    assert done.stderr == ""


@pytest.mark.integration
def test_an_address_where_nobody_answers_is_named() -> None:
    assert _run(_NOBODY).stdout.startswith("no Ray cluster answers at '127.0.0.1:1'")
