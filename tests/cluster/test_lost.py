"""Which errors say that a process is gone, and which that the work is wrong."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from ray import exceptions
from ray.train import ControllerError, WorkerGroupError

from effir_ray.cluster import lost
from effir_ray.cluster.lost import (
    UnfitNode,
    _full_place,
    in_one_line,
    is_lost_process,
    own_disks,
    unfit_node,
)
from effir_ray.errors import InputError, LostProcess, TrialFailure


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def task_error(cause: Exception) -> Exception:
    """As ``ray.get`` raises what a task raised."""
    return exceptions.RayTaskError("work", "Traceback ...", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        exceptions.WorkerCrashedError(),
        exceptions.ActorDiedError(),
        ControllerError(exceptions.ActorDiedError()),
        ControllerError(task_error(exceptions.ActorDiedError())),
        WorkerGroupError("rank 1", {0: RuntimeError("connection closed"), 1: exceptions.ActorDiedError()}),
        task_error(exceptions.NodeDiedError("gone")),
        caused(ValueError("encoding"), exceptions.LocalRayletDiedError()),
    ],
)
def test_a_process_that_is_gone_is_found_wherever_the_error_comes_from(error: Exception) -> None:
    assert is_lost_process(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        task_error(ValueError("bad schedule")),
        WorkerGroupError("rank 0", {0: RuntimeError("shape mismatch")}),
        exceptions.ActorDiedError(exceptions.RayTaskError("init", "Traceback ...", ValueError("no"))),
    ],
)
def test_errors_of_the_work_itself_are_not_tried_again(error: Exception) -> None:
    assert not is_lost_process(error)


@pytest.mark.parametrize("cause", [InputError("no file"), TrialFailure("NaN"), LostProcess("taken over")])
def test_our_own_errors_come_out_as_they_were_raised(cause: Exception) -> None:
    with pytest.raises(type(cause)) as raised, in_one_line("searching"):
        raise task_error(cause)
    assert raised.value is cause


def test_of_other_errors_the_cause_is_kept_without_a_remote_traceback() -> None:
    with pytest.raises(ValueError, match=r"^bad shape$"), in_one_line("searching"):
        raise task_error(ValueError("bad shape"))


@pytest.mark.parametrize("error", [exceptions.WorkerCrashedError(), exceptions.NodeDiedError("gone\nmore")])
def test_a_lost_process_is_one_line(error: Exception) -> None:
    with (
        pytest.raises(LostProcess, match=r"^searching: a process was lost") as raised,
        in_one_line("searching"),
    ):
        raise error
    assert "\n" not in str(raised.value)


_WAITS_FOR_EVER = """
import threading
import psutil
from effir_ray.cluster.connection import connect
from effir_ray.cluster.lost import watched
from effir_ray.errors import LostProcess
connect(num_cpus=1)
assert watched(lambda: 3) == 3
for process in psutil.Process().children(recursive=True):
    if "{victim}" in " ".join(process.cmdline()):
        process.kill()
try:
    watched(threading.Event().wait)
except LostProcess as error:
    print(error)
"""


def _alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


@pytest.mark.parametrize("victim", ["raylet/raylet", "gcs_server"])
def test_work_that_waits_for_a_ray_that_is_gone_ends_at_once(victim: str) -> None:
    """Ray would let it wait for ever, or end the process without a word."""
    done = _alone("-c", _WAITS_FOR_EVER.replace("{victim}", victim))
    assert "Ray's own" in done.stdout and victim.rpartition("/")[2] in done.stdout, done.stderr
    assert "terminated" not in done.stdout + done.stderr


def full(place: Path | None = None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(place)] if place else []))


_STOPPED = """
import os, signal, threading, time
from effir_ray.cluster.connection import connect
from effir_ray.cluster.lost import watched
connect(None)
ended, began = threading.Event(), threading.Event()
def work():
    try:
        while True:
            began.set()
            time.sleep(0.05)
    finally:
        ended.set()
threading.Thread(target=lambda: began.wait() and os.kill(os.getpid(), signal.SIGINT)).start()
try:
    watched(work)
except KeyboardInterrupt:
    print(ended.is_set())
"""


def test_what_stops_the_caller_stops_the_work_first() -> None:
    """A loop that goes on beside the end of the program would start another Ray, and talk."""
    done = _alone("-c", _STOPPED)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs another file system")
def test_a_full_disk_is_the_nodes_own_where_the_study_lies_on_another(tmp_path: Path) -> None:
    study, elsewhere = tmp_path / "study" / "stages", Path("/dev/shm/cache/new/file")
    assert _full_place(full(elsewhere), study) == Path("/dev/shm")
    assert _full_place(caused(ValueError("not written"), full(elsewhere)), study) == Path("/dev/shm")
    assert _full_place(full(tmp_path / "study" / "rows"), study) is None


def test_an_error_without_a_name_is_of_a_disk_with_next_to_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost, "_same_disk", lambda place, study: False)
    monkeypatch.setenv("EFFIR_RAY_CACHE", str(tmp_path))
    assert _full_place(full(), tmp_path) is None
    monkeypatch.setattr(lost, "_NEXT_TO_NOTHING", 2**60)
    assert _full_place(full(), tmp_path) is not None


def test_which_node_is_unfit_is_told_to_other_processes() -> None:
    error = pickle.loads(pickle.dumps(UnfitNode("node left: no space in /tmp", "0123")))
    assert str(error) == "node left: no space in /tmp"
    assert unfit_node(task_error(error)) == "0123"
    assert unfit_node(ValueError("bad schedule")) == ""
    assert is_lost_process(error)


def test_without_other_nodes_a_full_disk_is_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), own_disks(tmp_path):
        raise full(Path("/dev/shm/file"))


_KILLED_WHILE_IT_STARTS = """
import threading, time
import psutil
from effir_ray.cluster.connection import connect
from effir_ray.errors import LostProcess
def kill():
    while True:
        children = {" ".join(child.cmdline()): child for child in psutil.Process().children()}
        if any("dashboard.py" in line for line in children):  # Ray's last step but one
            return [child.kill() for line, child in children.items() if "gcs_server" in line]
        time.sleep(0.01)
threading.Thread(target=kill).start()
try:
    connect(num_cpus=1)
except LostProcess as error:
    raise SystemExit(f"effir-ray: {error}")
"""


def test_a_start_whose_process_is_killed_ends_in_one_line() -> None:
    """Ray's control service: without it Ray waits where nothing reaches it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", _KILLED_WHILE_IT_STARTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if "rpc_client.h" not in line]  # Ray's own log
    assert ours == ["effir-ray: Ray's own gcs_server ended while Ray started; run the same again"]
