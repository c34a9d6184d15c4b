"""Studies on a cluster of several machines to which something happens end with the rows and scores of one to
which nothing does."""

from __future__ import annotations

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
    space = small_space(
        dataset=str(write_corpus(folder / "data")),
        dev={},
        test={},
        schedules=[{"drop_mlp": 1}, {"drop_attention": 1}],
        objectives=["ndcg_at_10", "parameters"],  # speeds are no two runs' the same
    )
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space.model_dump(mode="json")))
    return file


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
    assert len([name for name in expected if name.endswith("dev")]) == 3
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
    """All its processes end at once. The study waits for another one."""
    study = Study.submit(cluster, space, "node")
    study.begun()
    cluster.kill(WORKER)
    study.until(lambda: "waiting for a node of the cluster" in study.log)
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
