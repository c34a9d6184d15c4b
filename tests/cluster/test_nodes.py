"""Nodes with folders of their own, and nodes that come later: real machines to Ray, by namespaces."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from effir_ray.cluster.probe import MARK
from effir_ray.results import store
from tests.helpers import autoscaling
from tests.helpers.search_examples import small_space, write_corpus
from tests.helpers.two_nodes import Nodes, several_nodes, unavailable

REASON = unavailable()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]

SHORT_WAIT = """
import sys
from effir_ray.cluster import devices
devices.EMPTY_SECONDS = devices.STATIC_SECONDS = 3.0
from effir_ray.cli import main
main()
"""
"""The command line of somebody in a hurry."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write_corpus(folder / "data")
    write_corpus(folder / "other-data")
    for name in ("data", "other-data"):
        space = small_space(dataset=str(folder / name), dev={}, test={}, threads=1, schedules=[])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(space.model_dump(mode="json")))
    training = {"dataset": str(folder / "data"), "steps": 2, "batch_size": 4, "lora": None}
    (folder / "training.yaml").write_text(yaml.safe_dump(training))
    (folder / "many.yaml").write_text(yaml.safe_dump({**training, "workers": 8, "batch_size": 8}))
    return folder


@pytest.fixture(scope="module")
def cluster(shared: Path) -> Iterator[Nodes]:
    """A head that only schedules, and a worker with an output folder and data of its own."""
    with several_nodes(shared, "--num-cpus=0") as nodes:
        worker = nodes.add("worker", "--num-cpus=2", private=[shared / "own", shared / "other-data"])
        changed = worker.run(
            "bash",
            "-c",
            f"cp -r {shared}/data/. {shared}/other-data && echo >> {shared}/other-data/corpus.jsonl",
        )
        assert changed.returncode == 0, changed.stderr
        yield nodes


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that ended with exit code 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("effir-ray: "))


@pytest.mark.parametrize(
    "command",
    [
        ("search", "{shared}/data.yaml"),
        ("encode", "--model", "random:llama", "--dataset", "{shared}/data", "--workers", "2"),
        ("train", "{shared}/training.yaml", "--model", "random:llama"),
        ("evaluate", "--model", "random:llama", "--dataset", "{shared}/data", "--workers", "2"),
    ],
    ids=lambda command: command[0],
)
def test_an_output_folder_that_a_node_has_for_itself_is_told_before_the_start(
    cluster: Nodes, shared: Path, command: tuple[str, ...]
) -> None:
    out = shared / "own"
    words = [word.format(shared=shared) for word in command]
    said = refusal(cluster.head.run("effir-ray", *words, "--out", str(out), "--address", cluster.address))
    assert re.search(rf"node worker \(10\.\S+\): the output folder {out}\S* is not the one of head", said)
    assert not [file for file in out.rglob("*") if file.name == MARK or file.suffix == ".parquet"]


def test_data_that_differ_on_a_node_are_told_before_the_start(cluster: Nodes, shared: Path) -> None:
    out = shared / "differing"
    said = refusal(
        cluster.head.run(
            "effir-ray",
            "search",
            f"{shared}/other-data.yaml",
            "--out",
            str(out),
            "--address",
            cluster.address,
        )
    )
    assert (
        f"node worker (10.231.77.2): data '{shared}/other-data': corpus.jsonl is not what it is on head"
        in said
    )
    assert not out.exists()


def test_more_workers_than_the_cluster_has_are_one_line_that_lists_it(cluster: Nodes, shared: Path) -> None:
    words = ["train", f"{shared}/many.yaml", "--model", "random:llama", "--out", f"{shared}/many"]
    said = refusal(cluster.head.run("python", "-c", SHORT_WAIT, *words, "--address", cluster.address))
    assert "8 workers need 8 CPUs, and the cluster has 2 CPUs (" in said
    assert "head: none" in said and "worker: 2 CPUs" in said


@pytest.fixture(scope="module")
def empty(shared: Path) -> Iterator[Nodes]:
    """A head without CPUs, alone."""
    with several_nodes(shared, "--num-cpus=0") as nodes:
        yield nodes


def test_nothing_but_a_head_ends_with_one_line_after_a_while(empty: Nodes, shared: Path) -> None:
    words = ["search", f"{shared}/data.yaml", "--out", f"{shared}/alone", "--address", empty.address]
    said = refusal(empty.head.run("python", "-c", SHORT_WAIT, *words))
    assert "a worker needs 1 CPU, and the cluster has none (head: none) after 3 s; start nodes first" in said
    assert not (shared / "alone" / "study.json").exists()


def test_a_node_that_joins_later_and_sees_another_folder_ends_the_study(empty: Nodes, shared: Path) -> None:
    out, log = shared / "late", shared / "late.log"
    words = ["effir-ray", "search", f"{shared}/data.yaml", "--out", str(out), "--address", empty.address]
    search = empty.head.start(*words, log=log)
    until(lambda: "waiting for 1 CPU, 1" in log.read_text(), search)
    empty.add("late", "--num-cpus=2", private=[out])
    assert search.wait(120) == 2, log.read_text()
    assert f"the output folder {out} is not the one of head" in " ".join(log.read_text().split())
    assert not list(out.glob("rows/*"))
    empty.kill("late")


def test_a_study_waits_for_a_gpu_and_computes_on_it(empty: Nodes, shared: Path) -> None:
    """A cluster whose nodes all start from none. Its stages have reserved the GPU, which nobody else has."""
    out, log = shared / "waited", shared / "waited.log"
    words = ["effir-ray", "search", f"{shared}/data.yaml", "--out", str(out), "--address", empty.address]
    search = empty.head.start(*words, log=log)
    until(lambda: "waiting for 1 CPU, 1" in log.read_text(), search)
    empty.add("gpus", "--num-cpus=1", "--num-gpus=1")
    assert search.wait(200) == 0, log.read_text()
    assert {row["status"] for row in store.read([out]).to_pylist()} == {"ok"}


AUTOSCALED = """
import sys, time
from effir_ray.cluster.connection import connect
from effir_ray.cluster.devices import machine, on_device, room, uses_gpus
from effir_ray.errors import InputError
connect(sys.argv[1])
import ray
assert not uses_gpus()
print(room())
print(on_device(lambda: ray.get_runtime_context().get_accelerator_ids()["GPU"]).value)
other = ray.remote(num_gpus=1)(lambda: time.sleep(10)).remote()
while ray.available_resources().get("GPU"):
    time.sleep(0.1)
print(room(2))
try:
    room(9)
except InputError as error:
    print(error)
"""


def test_an_autoscaler_is_asked_for_what_work_needs(shared: Path) -> None:
    """From none. What others use is waited for, and what it has no nodes for is told at once."""
    config = shared / "autoscaler.json"
    options = autoscaling.write_config(config, most=2)
    own = {"setup": autoscaling.setup(config), "environment": autoscaling.ENVIRONMENT}
    with several_nodes(shared, *options, **own) as nodes:
        began = time.monotonic()
        done = nodes.head.run("python", "-c", AUTOSCALED, nodes.address)
        assert time.monotonic() - began < 200
    assert done.returncode == 0, done.stderr
    one, reserved, two, refused = done.stdout.splitlines()
    assert one.startswith("Room(gpus=True, cpus=1")
    assert reserved == "['0']"
    assert two == "Room(gpus=True, cpus=2.0)"
    assert refused.startswith(
        "9 workers need 9 GPUs and 9 CPUs, and the cluster, whose autoscaler starts no such nodes, has 2 GPUs"
    )


def until(happened: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    assert callable(happened)
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
