"""What computes on a GPU has reserved it: logical GPUs of Ray, on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from effir_ray.cluster.devices import WAITING
from effir_ray.results import store
from effir_ray.search.candidates import Candidate
from tests.helpers.search_examples import small_space, write_corpus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CALLS = """
import json, sys, time
from pathlib import Path
import ray
from effir_ray.cluster.devices import machine, on_device
from effir_ray.errors import InputError
from effir_ray.progress import progress, show_progress

def used():
    return ray.get_runtime_context().get_accelerator_ids()["GPU"]

def nested():
    return used(), on_device(used).value

def slow():
    with progress("Working", total=1, unit="steps") as bar:
        bar.advance(1)
    time.sleep(3)
    return time.time()

def wrong():
    raise InputError("no such file")

before = on_device(used).value if ray.is_initialized() else "here"
ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
found = dict(before=before, outside=used(), inside=on_device(used).value, machine=machine().device)
found["nested"] = on_device(nested).value
try:
    on_device(wrong)
except InputError as error:
    found["error"] = str(error)
log = Path(sys.argv[1])
with log.open("a", buffering=1) as stream, show_progress(stream):
    first = ray.remote(num_cpus=0, num_gpus=1)(slow).remote()
    while ray.available_resources().get("GPU", 0) == 1:
        time.sleep(0.05)
    second = on_device(slow)
found["seconds"], found["apart"] = second.seconds, second.value - ray.get(first)
print(json.dumps(found))
"""


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_function_runs_where_a_gpu_is_reserved_for_it_and_waits_for_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = json.loads(run(CALLS, log).splitlines()[-1])
    assert found["before"] == "here" and found["outside"] == []
    assert found["inside"] == ["0"]
    assert found["nested"] == [["0"], ["0"]], "a second one would wait for ever"
    assert found["error"] == "no such file"
    assert found["machine"] == "cpu", "no GPU of Ray's is a GPU here"
    assert found["apart"] >= 3 and 3 <= found["seconds"] < 5, "waiting is not computing"
    lines = log.read_text()
    assert lines.startswith(WAITING) and "Working 1/1 steps" in lines


SHARED = """
import json, os, sys, time
from pathlib import Path
import ray
from effir_ray.cluster.connection import worker_environment
from effir_ray.cluster.devices import machine, on_device, reserving, sharing

def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES")

def meet(place, seconds):
    # Whether another one runs within so many seconds.
    Path(place, str(os.getpid())).touch()
    deadline = time.time() + seconds
    while (met := len(list(Path(place).iterdir()))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    if met < 2:
        Path(place, str(os.getpid())).unlink()
    return met >= 2

def share(gpus, *arguments):
    with sharing(0.5), sharing(gpus):
        return on_device(meet, *arguments).value

def overlap(gpus, place, seconds):
    Path(place).mkdir()
    task = ray.remote(num_cpus=0)(share)
    return ray.get([task.remote(gpus, place, seconds) for _ in range(2)])

ray.init(
    "local",
    num_cpus=1,
    num_gpus=1,
    include_dashboard=False,
    log_to_driver=False,
    runtime_env={"env_vars": worker_environment(local=True)},
)
found = {"without": ray.get(ray.remote(num_cpus=0)(seen).remote()), "with": on_device(seen).value}
found |= {"halves": overlap(0.5, sys.argv[1] + "/a", 100), "wholes": overlap(1, sys.argv[1] + "/b", 3)}
with reserving(False):
    found |= {"on a CPU": on_device(os.getpid).value == os.getpid(), "machine": machine().device}
print(json.dumps(found))
"""


def test_a_gpu_is_seen_by_those_that_reserved_it_and_shared_by_those_that_say_so(tmp_path: Path) -> None:
    assert json.loads(run(SHARED, tmp_path).splitlines()[-1]) == {
        "without": "",
        "with": "0",
        "halves": [True, True],
        "wholes": [False, False],
        "on a CPU": True,
        "machine": "cpu",
    }


TRIAL = """
import dataclasses, functools, json, sys
from pathlib import Path
import ray
from effir_ray.search import trial_stages
from effir_ray.search.space import SearchSpace
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial import run_trial
from effir_ray.stages import StageStore
from effir_ray.training.run import launcher

def told(name, build, *arguments):
    with open(sys_argv[2] + "/" + name, "a") as file:
        file.write(json.dumps(ray.get_runtime_context().get_accelerator_ids()["GPU"]))
    return build(*arguments)

sys_argv = sys.argv
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
trial_stages.STAGES = tuple(
    dataclasses.replace(stage, build=functools.partial(told, stage.name, stage.build))
    for stage in trial_stages.STAGES
)
launcher.prepare = functools.partial(told, "prepare", launcher.prepare)
config = TrialConfig.model_validate_json(sys.argv[1])
run_trial(config, StageStore(Path(sys.argv[2]) / "study" / "stages"))
"""


def test_every_stage_of_a_trial_that_computes_in_one_process_has_reserved_a_gpu(tmp_path: Path) -> None:
    """Those that start workers of their own leave the GPU to them: there is one."""
    training = {
        "steps": 2,
        "batch_size": 4,
        "lora": None,
        "info_nce": 0,
        "distillation": {"teacher": "base", "embedding": 1.0},
        "hard_negatives": 0,
        "query_max_length": 16,
        "document_max_length": 32,
        "cpus_per_worker": 1,
    }
    space = small_space(
        dataset=str(write_corpus(tmp_path / "data")), dev={}, test={}, recovery=training, schedules=[]
    )
    candidate = Candidate(drop_mlp=1, width_reduction=0.3, recover=True)
    run(TRIAL, space.trial(candidate).model_dump_json(), tmp_path)
    told = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir() if path.is_file()}
    computing = {"importance", "neurons", "embeddings", "scores", "timing", "prepare"}
    assert {name for name, gpus in told.items() if gpus == ["0"]} == computing
    left = {name for name, gpus in told.items() if gpus == []}
    assert left >= {"pruned", "recovered", "bm25"}


STUDY = """
import sys
from pathlib import Path
import ray
from effir_ray.search.space import SearchSpace
from effir_ray.search.study import search
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
others = ray.remote(num_cpus=0, num_gpus=1)(type("Other", (), {"ping": lambda self: None})).remote()
ray.get(others.ping.remote())  # who waited for the GPU would wait for ever
search(SearchSpace.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_study_on_cpus_leaves_gpus_alone_and_one_on_gpus_does_not_begin_without(tmp_path: Path) -> None:
    data = str(write_corpus(tmp_path / "data"))
    spaces = {
        device: small_space(dataset=data, dev={}, test={}, schedules=[{"drop_mlp": [1]}], device=device)
        for device in ("cpu", "cuda")
    }
    run(STUDY, spaces["cpu"].model_dump_json(), tmp_path / "cpu")
    assert {row["schedule"] for row in store.read([tmp_path / "cpu"]).to_pylist()} == {"full", "M[1]"}
    file = tmp_path / "space.yaml"
    file.write_text(spaces["cuda"].model_dump_json())
    command = [sys.executable, "-m", "effir_ray", "search", str(file), "--out", str(tmp_path / "cuda")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("effir-ray: device is cuda, and Ray finds no GPU")
    assert not (tmp_path / "cuda").exists()


SEARCHES = """
import json, shutil, sys
from pathlib import Path
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from effir_ray.encoding.corpus_encoding import encode_corpus
from effir_ray.evaluation import corpus_search
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search import measurement_stages
from effir_ray.search.trial import run_trial
from effir_ray.stages import StageStore

def work(config, root):
    searched, search = [], corpus_search.search_on_ray
    def told(*arguments, **options):
        searched.append(options["workers"])
        return search(*arguments, **options)
    corpus_search.search_on_ray = told
    measurement_stages.SEARCHED_A_WORKER = 1000
    encode_corpus.__kwdefaults__["shard_size"] = 8
    (row,) = run_trial(TrialConfig.model_validate_json(config), StageStore(root))
    (scores,) = root.glob("scores/*/scores.json")
    return searched, row.isotropy, scores.read_text()

ray.init("local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False)
root, found = Path(sys.argv[3]), []
for config in sys.argv[1:3]:
    group = placement_group([{"CPU": 0.01}])  # what Tune reserves for a trial, and keeps its tasks in
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    task = ray.remote(num_cpus=0.01, scheduling_strategy=strategy)(work)
    found.append(ray.get(task.remote(config, root), timeout=200))
    shutil.rmtree(root / "scores")
print(json.dumps(found))
"""


def test_a_trial_searches_with_as_many_workers_as_encode_and_finds_the_same(tmp_path: Path) -> None:
    """The GPU that encodes the queries is given back before: the workers that search wait for both."""
    data = str(write_corpus(tmp_path / "data"))
    configs = [
        small_space(dataset=data, dev={}, test={}, encoding_workers=workers).trial(Candidate())
        for workers in (2, 1)
    ]
    out = run(SEARCHES, *(config.model_dump_json() for config in configs), tmp_path / "stages")
    shared, alone = json.loads(out.splitlines()[-1])
    assert (shared[0], alone[0]) == ([2], [])
    assert shared[1:] == alone[1:]
