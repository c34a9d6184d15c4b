"""Connecting to Ray."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from effir_ray.cluster.connection import private_folder, worker_environment

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

_LISTENERS = """
import os, stat
from pathlib import Path
from effir_ray.cluster.connection import connect, private_folder
connect(num_cpus=1)
import psutil, ray
ray.get(ray.remote(lambda: None).remote())
me = psutil.Process()
for process in [me, *me.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print(connection.laddr.ip.removeprefix("::ffff:"))
token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
folder = token.parents[1]
assert os.environ["RAY_AUTH_MODE"] == "token" and len(token.read_text()) == 64
assert stat.S_IMODE(token.stat().st_mode) == 0o600
assert stat.S_IMODE(folder.stat().st_mode) == 0o700
assert ray._private.worker._global_node.get_session_dir_path().startswith(str(token.parent))
"""

_NOBODY = """
from effir_ray.cluster.connection import connect
from effir_ray.errors import InputError
try:
    connect("127.0.0.1:1")
except InputError as error:
    print(error)
"""


def _run(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | more
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
def test_a_private_instance_is_reached_from_this_machine_and_user_alone(tmp_path: Path) -> None:
    home, place = tmp_path / "home", Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    home.mkdir()
    dead = place / f"effir-ray-{os.getuid()}" / "killed"
    dead.mkdir(parents=True)
    dead.parent.chmod(0o700)
    (dead / "token").touch()
    try:
        done = _run(_LISTENERS, HOME=str(home), RAY_TMPDIR=str(place))
        assert set(done.stdout.split()) == {"127.0.0.1"}
        assert list(home.iterdir()) == []
        assert not list(place.iterdir()), "folders of this and of killed instances are removed"
    finally:
        shutil.rmtree(place)


def test_a_folder_that_others_can_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    usual = tmp_path / f"effir-ray-{os.getuid()}"
    assert private_folder() == usual == private_folder()
    usual.chmod(0o755)
    assert private_folder() != usual


@pytest.mark.integration
def test_an_address_where_nobody_answers_is_named() -> None:
    assert _run(_NOBODY).stdout.startswith("no Ray cluster answers at '127.0.0.1:1'")
