"""What makes a training run the same run, where it reads, what it asks of the cluster; Ray is not started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from effir_ray.cluster import devices
from effir_ray.errors import InputError
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.run import fault_tolerance, launcher, loop
from effir_ray.training.step.ladder import Rung


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    lines = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def settings(pairs: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"dataset": str(pairs), "batch_size": 2, **changes})


def claim(out: Path, model: str, config: TrainConfig, *, resume: bool = True) -> dict[str, Any]:
    return launcher._open(out, model, config, resume)


def test_existing_paths_become_absolute_and_names_stay(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stdlib", "teacher"):
        (tmp_path / name).mkdir()
    config = settings(
        Path("pairs.jsonl"),
        dev={"every": 1, "dataset": "stdlib"},
        distillation={"teacher": "teacher", "embedding": 1},
        storage_path="kept",
    )
    found = launcher.with_absolute_paths(config)
    assert (found.dataset, found.storage_path) == (str(pairs), str(tmp_path / "kept"))
    assert found.distillation.teacher == str(tmp_path / "teacher")
    assert found.dev is not None and found.dev.dataset == "stdlib"
    elsewhere = settings(Path("msmarco"), storage_path="s3://bucket/runs")
    assert launcher.with_absolute_paths(elsewhere) == elsewhere


def test_changed_data_or_weights_under_the_same_name_are_another_run(pairs: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    save_checkpoint(load_retriever("random:llama"), model)
    first = claim(out, str(model), settings(pairs))
    assert claim(out, str(model), settings(pairs)) == first
    with pytest.raises(InputError, match=r"training\.json: seed"):
        claim(out, str(model), settings(pairs, seed=1))
    save_checkpoint(load_retriever("random:llama:1"), model)
    with pytest.raises(InputError, match=r"contents of model.*resume=False"):
        claim(out, str(model), settings(pairs))
    save_checkpoint(load_retriever("random:llama"), model)
    pairs.write_text(pairs.read_text().replace("p3", "p4"))
    with pytest.raises(InputError, match="contents of dataset"):
        claim(out, str(model), settings(pairs))


def test_starting_over_removes_the_checkpoints_of_other_settings_too(pairs: Path, tmp_path: Path) -> None:
    for number, place in enumerate((None, str(tmp_path / "elsewhere"))):
        out = tmp_path / f"out{number}"
        run = Path(claim(out, "random:llama", settings(pairs, storage_path=place))["run"])
        (run / "checkpoint_0").mkdir(parents=True)
        again = claim(out, "random:llama", settings(pairs, seed=1), resume=False)
        assert again["run"] != str(run)
        assert not run.exists()


def test_a_rung_that_drops_what_the_model_has_not_got_is_refused_before_training(
    pairs: Path, tmp_path: Path
) -> None:
    config = settings(pairs, elastic=(Rung(drop_mlp=(99,)),))
    with pytest.raises(InputError, match="drops layer 99; the model has layers 0 to 3"):
        launcher.train("random:llama", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Rung.model_validate({"drop_mlp": [-1]})


@pytest.mark.parametrize("gpus", [0, 2, 8])
def test_workers_get_a_gpu_each_or_none_at_all(
    gpus: int, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    monkeypatch.setattr(devices, "is_private", lambda: True)
    monkeypatch.setattr(launcher, "_in_worker", lambda: False)
    node = {"Alive": True, "Resources": {"CPU": 1.5, "GPU": float(gpus)}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    scaling = launcher._scaling(settings(pairs, workers=2))
    assert scaling.use_gpu == (gpus > 0)
    assert scaling.resources_per_worker.get("GPU", 0) == (gpus > 0)
    # No more than there are on the node of a GPU: for that a worker would wait for ever.
    assert scaling.resources_per_worker["CPU"] == {0: 1.0, 2: 0.75, 8: 0.18}[gpus]


def test_fewer_gpus_than_workers_is_said(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(devices, "is_private", lambda: True)
    with pytest.raises(InputError, match="2 workers need 2 GPUs and 2 CPUs, and the cluster has 1 GPU and"):
        launcher._scaling(settings(pairs, workers=2))


@pytest.mark.parametrize(("cpus", "share"), [(1.0, 0.99), (3.0, 0.99), (16.0, 1.0)])
def test_a_range_of_workers_needs_room_for_the_fewest(
    cpus: float, share: float, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that there is room for now share what the trial itself leaves; more come with nodes of their
    own."""
    context = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 0.01})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(devices, "is_private", lambda: True)
    monkeypatch.setattr(launcher, "_in_worker", lambda: True)
    scaling = launcher._scaling(settings(pairs, batch_size=8, workers=[1, 8], zero_stage=0))
    assert (scaling.min_workers, scaling.max_workers) == (1, 8)
    assert scaling.resources_per_worker == {"CPU": share}


def test_too_little_room_for_the_fewest_workers_is_said(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(devices, "is_private", lambda: True)
    with pytest.raises(InputError, match="2 workers need 2 GPUs and 2 CPUs, and the cluster has 1 GPU and"):
        launcher._scaling(settings(pairs, batch_size=8, workers=[2, 8], zero_stage=0))


def test_a_gpu_that_was_out_of_memory_halves_the_budget_once(pairs: Path, tmp_path: Path) -> None:
    job, config = {"run": str(tmp_path / "run")}, settings(pairs, token_budget=4096)
    fault_tolerance.halve(job["run"], 4096)  # the worker's own doing
    error = RuntimeError("OutOfMemory: ... torch.OutOfMemoryError: CUDA out of memory")
    assert launcher._budget_after(error, job, config) == 2048
    killed = RuntimeError("4 worker(s) were killed due to the node running low on memory. Memory on")
    assert launcher._budget_after(killed, job, config) == 1024
    assert launcher._budget_after(RuntimeError("something else"), job, config) is None


def test_a_gpu_that_ray_did_not_assign_is_left_alone(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    threads = torch.get_num_threads()
    try:
        assert loop._device(settings(pairs)) == (torch.device("cpu"), False)
        assert loop._device(settings(pairs, precision="bfloat16")) == (torch.device("cpu"), True)
    finally:
        torch.set_num_threads(threads)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"model": "another", "config": {}}')
    with pytest.raises(InputError, match="another model or other settings"):
        launcher.train("random:llama", TrainConfig(dataset="stdlib"), tmp_path)


def test_starting_over_needs_no_readable_record(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out, "random:llama", settings(pairs))
    (out / "training.json").write_text("{}")
    with pytest.raises(InputError, match=r"training\.json: .*start over with resume=False"):
        claim(out, "random:llama", settings(pairs))
    claim(out, "random:llama", settings(pairs), resume=False)
    claim(out, "random:llama", settings(pairs))
