"""Studies on a cluster of several machines to which something happens end with the rows and scores of one to
which nothing does."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from effir_ray.results import query_scores, store
from tests.helpers.search_examples import small_space, write_corpus
from tests.helpers.two_nodes import Nodes, several_nodes, unavailable

REASON = unavailable()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]

WORKER = "worker"
TRIAL = "ImplicitFunc"  # in the command line of a trial's process
PARTITION, WARNING = 30, 10  # seconds


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    texts = folder / "texts.jsonl"
    with texts.open("w") as file:  # a content hash of what is larger than 1 MiB is noted in a node's cache
        for number in range(4000):
            file.write(json.dumps({"_id": str(number), "title": "", "text": f"text {number} " * 30}) + "\n")
    space = small_space(
        dataset=str(write_corpus(folder / "data")),
        calibration_from=str(texts),
        dev={},
        test={},
        schedules=[{"drop_mlp": 1}],
        objectives=["ndcg_at_10", "parameters"],  # speeds are no two runs' the same
    )
    place = folder / "space.yaml"
    place.write_text(yaml.safe_dump(space.model_dump(mode="json")))
    return place


@pytest.fixture(scope="module")
def nodes(space: Path) -> Iterator[Nodes]:
    with several_nodes(space.parent, "--num-cpus=0") as nodes:
        yield nodes


@pytest.fixture
def cluster(nodes: Nodes) -> Nodes:
    """A head that only schedules, and one worker, whatever became of those of the test before."""
    for name, node in list(nodes.nodes.items()):
        if node.process.poll() is not None or name not in ("head", WORKER):
            nodes.kill(name)
    for name, cpus in (("head", 0), (WORKER, 2)):
        if name not in nodes.nodes:
            nodes.add(name, f"--num-cpus={cpus}")
    return nodes


@dataclass
class Study:
    """A study that was submitted; ``job`` ends with it."""

    cluster: Nodes
    out: Path
    job: subprocess.Popen[bytes]

    @classmethod
    def submit(cls, cluster: Nodes, space: Path, name: str, *options: str) -> Self:
        out = space.parent / name
        words = ["effir-ray", "submit", str(space), "--out", str(out), "--address", cluster.jobs_address]
        job = cluster.head.start(*words, "--follow", *options, log=out.with_suffix(".log"))
        return cls(cluster, out, job)

    @property
    def log(self) -> str:
        return self.out.with_suffix(".log").read_text()

    def ends(self) -> None:
        assert self.job.wait(500) == 0, self.log

    def until(self, happened: Callable[[], Any]) -> Any:
        """What it tells once it happens, while the study runs."""
        deadline = time.monotonic() + 300
        while not (found := happened()):
            assert self.job.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.1)
        return found

    def begun(self) -> None:
        """Wait until there are some rows, and a trial runs."""
        self.until(lambda: list(self.out.glob("rows/*.parquet")))
        self.until(lambda: self.cluster.nodes[WORKER].processes(TRIAL))

    def is_as(self, expected: dict[str, float]) -> None:
        """All rows are there once, with these scores, and nothing was done twice."""
        assert scores(self.out) == pytest.approx(expected, abs=1e-6)
        found = store.read([self.out]).to_pylist()
        assert {row["status"] for row in found} == {"ok"}
        assert len(found) == len(expected)
        assert len(query_scores.read(self.out)) == sum(row["n_queries"] for row in found)
        builds = Counter(
            line.split()[1] for line in (self.out / "stages" / "runs.log").read_text().splitlines()
        )
        assert max(builds.values()) == 1
        assert not list(self.out.rglob("*.tmp*"))


def scores(out: Path) -> dict[str, float]:
    """Schedule and split -> nDCG@10."""
    return {f"{row['schedule']} {row['split']}": row["ndcg_at_10"] for row in store.read([out]).to_pylist()}


@pytest.fixture(scope="module")
def undisturbed(space: Path, nodes: Nodes) -> dict[str, float]:
    nodes.add(WORKER, "--num-cpus=2")
    study = Study.submit(nodes, space, "undisturbed")
    study.ends()
    expected = scores(study.out)
    assert sorted(expected) == ["1M dev", "1M test", "full dev", "full test"]
    return expected


def test_a_driver_that_is_killed(undisturbed: dict[str, float], cluster: Nodes, space: Path) -> None:
    study = Study.submit(cluster, space, "driver")
    study.begun()
    for process in cluster.head.processes("-m effir_ray search"):  # the job's shell too
        process.kill()
    assert study.job.wait(100) != 0
    Study.submit(cluster, space, "driver", "--resume").ends()
    study.is_as(undisturbed)


def test_a_partition(undisturbed: dict[str, float], cluster: Nodes, space: Path) -> None:
    study = Study.submit(cluster, space, "partition")
    study.begun()
    cluster.cut(WORKER)
    time.sleep(PARTITION)
    cluster.mend(WORKER)
    study.ends()
    study.is_as(undisturbed)


def test_a_node_that_is_lost(undisturbed: dict[str, float], cluster: Nodes, space: Path) -> None:
    """All its processes end at once. The study goes on on another one."""
    study = Study.submit(cluster, space, "node")
    study.begun()
    cluster.kill(WORKER)
    cluster.add("spare", "--num-cpus=2")
    study.ends()
    study.is_as(undisturbed)


def test_a_node_that_is_taken_away_with_a_warning(
    undisturbed: dict[str, float], cluster: Nodes, space: Path
) -> None:
    study = Study.submit(cluster, space, "preempted")
    study.begun()
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", str(WARNING)]
    warned = cluster.nodes[WORKER].run("ray", "drain-node", "--address", cluster.address, *reason, *deadline)
    assert warned.returncode == 0, warned.stderr
    cluster.add("spare", "--num-cpus=2")
    time.sleep(WARNING)
    cluster.kill(WORKER)
    study.ends()
    study.is_as(undisturbed)


def test_a_node_whose_own_disk_is_full(undisturbed: dict[str, float], cluster: Nodes, space: Path) -> None:
    """The first trial goes to the node with more CPUs, which has no room to note anything."""
    full = cluster.add("full", "--num-cpus=8", sizes={"tmp": "1m", "cache": "1m"})
    place = cluster.scratch / "full"
    for part in ("tmp", "cache"):
        full.run("dd", "if=/dev/zero", f"of={place}/{part}/filled", "bs=4k")
    study = Study.submit(cluster, space, "full")
    study.ends()
    study.is_as(undisturbed)
    attempts = {row["attempt"] for row in store.read([study.out]).to_pylist()}
    assert max(attempts) == 2, "it never went to the full node"


def test_a_study_on_nodes_of_different_kinds(
    undisturbed: dict[str, float], cluster: Nodes, space: Path
) -> None:
    """One has a GPU, on which stages compute; trials run anywhere."""
    cluster.add("gpu", "--num-cpus=1", "--num-gpus=1")
    alone = yaml.safe_load(space.read_text()) | {"schedules": []}
    file = space.with_name("alone.yaml")
    file.write_text(yaml.safe_dump(alone))
    study = Study.submit(cluster, file, "kinds")
    study.ends()
    study.is_as({name: score for name, score in undisturbed.items() if name.startswith("full ")})


def test_a_head_that_is_lost(undisturbed: dict[str, float], cluster: Nodes, space: Path) -> None:
    """With it goes the cluster; another one goes on with the study."""
    study = Study.submit(cluster, space, "head")
    study.begun()
    for name in ("head", WORKER):
        cluster.kill(name)
    study.job.wait(100)
    cluster.add("head", "--num-cpus=0")
    cluster.add(WORKER, "--num-cpus=2")
    Study.submit(cluster, space, "head", "--resume").ends()
    study.is_as(undisturbed)
