"""Connecting to Ray."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest
import ray
import torch
from ray._private.utils import check_version_info
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from effir_ray.cluster import connection
from effir_ray.cluster.connection import _no_cluster, private_folder, worker_environment

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
from contextlib import suppress
from pathlib import Path
from effir_ray.cluster.connection import connect, private_folder
connect(num_cpus=1)
import psutil, ray
ray.get(ray.remote(lambda: None).remote())
me = psutil.Process()
for process in [me, *me.children(recursive=True)]:
    with suppress(psutil.NoSuchProcess):  # a worker that Ray started to spare and has ended
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


_STUCK = """
import os, threading, time
from effir_ray.cluster.connection import connect
connect(num_cpus=1)
import ray
@ray.remote
class Worker:
    def pid(self):
        threading.Thread(target=threading.Event().wait).start()  # the interpreter waits for it when it ends
        return os.getpid()
    def end(self):
        ray.actor.exit_actor()
worker = Worker.remote()
print(ray.get(worker.pid.remote()))
worker.end.remote()
time.sleep(2)
"""

_REFUSED = """
import sys, time
import ray
from effir_ray.cluster.connection import connect
from effir_ray.errors import InputError
began = time.monotonic()
try:
    connect(sys.argv[1])
except InputError as error:
    print(error)
assert time.monotonic() - began < 5
"""


def _run(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process that has had no Ray yet: this one may, and its environment then says so."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


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


def test_a_worker_that_hangs_does_not_outlive_its_instance() -> None:
    done = subprocess.run([sys.executable, "-c", _STUCK], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE


def test_a_folder_that_others_can_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    usual = tmp_path / f"effir-ray-{os.getuid()}"
    assert private_folder() == usual == private_folder()
    usual.chmod(0o755)
    assert private_folder() != usual


def test_what_a_killed_instance_still_wrote_is_removed_by_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its raylet writes logs, its folder cannot be emptied: its token stays, and says whose it was."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = private_folder()
    for name in ("killed", "living", "being-made", "never-made"):
        (folder / name).mkdir()
    for name in ("killed", "living"):
        (folder / name / "token").touch()
        (folder / name / "session").mkdir()
        (folder / name / "session" / "raylet.out").touch()
    os.utime(folder / "never-made", (0, 0))
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda place, **options: None)  # what is written anew meanwhile
    with (folder / "living" / "token").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        private_folder()
        assert (folder / "killed" / "token").exists()
        monkeypatch.setattr(shutil, "rmtree", remove)
        private_folder()
        assert sorted(place.name for place in folder.iterdir()) == ["being-made", "living"]
        assert (folder / "living" / "session" / "raylet.out").exists()
    private_folder()
    assert [place.name for place in folder.iterdir()] == ["being-made"]


@contextmanager
def _control_service(answer: Callable[[grpc.ServicerContext], object]) -> Iterator[str]:
    """A control service of a cluster that has nothing else; yields its address.

    It listens everywhere: Ray makes this machine's outer address of 127.0.0.1, except while it runs on
    loopback alone.
    """

    class Service(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def CheckAlive(self, request: object, context: grpc.ServicerContext) -> object:
            return answer(context)

    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def _refusal(address: str, **more: str) -> str:
    """What ``connect`` says, within five seconds."""
    done = _run(_REFUSED, address, **more)
    assert done.stderr == ""
    return done.stdout.rstrip("\n")


def test_another_version_of_ray_on_the_cluster_is_one_line() -> None:
    reply = gcs_service_pb2.CheckAliveReply(ray_version="2.40.0")
    with _control_service(lambda _: reply) as address:
        said = _refusal(address)
    runs = f"runs Ray 2.40.0, this process Ray {ray.__version__}; both must be the same"
    assert said == f"the cluster at '{address}' {runs}"


@pytest.mark.parametrize(
    ("token", "given"), [({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}, "another"), ({}, "none")]
)
def test_a_refused_token_is_one_line_at_once(token: dict[str, str], given: str) -> None:
    """Ray tries again for ten seconds, writes a line each, and then speaks of a failed connection."""

    def refuse(context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

    with _control_service(refuse) as address:
        assert f"token, and {given} was given" in _refusal(address, **token)


def test_another_version_of_python_on_the_cluster_is_one_line() -> None:
    """By Ray's own message, of eight lines."""
    python = sys.version.partition(" ")[0]
    theirs = {"ray_version": ray.__version__, "python_version": "3.8.1"}
    with pytest.raises(RuntimeError, match="Version mismatch") as mismatch:
        check_version_info(theirs, "this node")
    assert str(_no_cluster("head:6379", mismatch.value)) == (
        f"the cluster at 'head:6379' runs Ray {ray.__version__} with Python 3.8.1, this process Ray "
        f"{ray.__version__} with Python {python}; both must be the same"
    )


def test_an_address_where_nobody_answers_is_named_at_once() -> None:
    assert re.match(r"no Ray cluster answers at '127\.0\.0\.1:1'.*refused", _refusal("127.0.0.1:1"))


def test_agents_that_outlived_an_instance_end_with_its_folder(tmp_path: Path) -> None:
    """Those of others stay: of another instance, and what is no process of Ray's."""
    agent = f"{Path(ray.__file__).parent}/dashboard/agent.py"
    words = {
        "its": [agent, f"--session-dir={tmp_path}/mine/session"],
        "other": [agent, f"--session-dir={tmp_path}/other/session"],
        "user": [f"{tmp_path}/mine/session/logs/agent.log"],
    }
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    found = {name: subprocess.Popen([*sleep, *given]) for name, given in words.items()}
    try:
        connection._end_stragglers(tmp_path / "mine")
        assert found["its"].wait(10) == -signal.SIGKILL
        assert found["other"].poll() is found["user"].poll() is None
    finally:
        for process in found.values():
            process.kill()
            process.wait()
