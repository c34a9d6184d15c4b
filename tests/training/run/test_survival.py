"""What a run keeps and reads back; the runs that are really killed are in ``test_launcher``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from effir_ray import storage
from effir_ray.cluster.connection import connect
from effir_ray.encoding.embedding_shards import ShardFolder
from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.run import survival
from effir_ray.training.run.history import read_history
from effir_ray.training.run.launcher import train
from effir_ray.training.run.survival import (
    OutOfMemory,
    Reporter,
    halved_budget,
    halving,
    note_reservation,
    release,
)
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.text_encoder import TextEncoder


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("too_much", [on_a_gpu, lambda: torch.empty(1 << 50), lambda: bytearray(1 << 50)])
def test_out_of_memory_halves_the_budget_of_the_next_start(
    tmp_path: Path, too_much: Callable[[], object]
) -> None:
    run = str(tmp_path / "run")
    assert halved_budget(run) is None
    with pytest.raises(OutOfMemory, match="token budget of 3000"), halving(run, 3000):
        too_much()
    assert halved_budget(run) == 1500


@pytest.mark.parametrize(
    ("seconds", "every", "expected"),
    [
        (1.0, None, []),  # nothing is lost that five minutes do not bring back
        (40.0, None, [8, 16, 24, 32]),
        (1000.0, None, [4, 8, 12, 16, 20, 24, 28, 32, 36]),
        (1.0, 15, [15, 30]),
    ],
)
def test_checkpoints_are_due_after_a_tenth_of_the_run_and_five_minutes(
    seconds: float, every: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [0.0], []

    def report(metrics: dict[str, Any], checkpoint: Any) -> None:
        if checkpoint is not None:
            assert torch.load(Path(checkpoint.path) / "state.pt")["weights"]
            written.append(metrics["step"])

    monkeypatch.setattr(survival, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ray.train, "report", report)  # there is no Ray Train around this process
    config = TrainConfig(dataset="unused", checkpoint_every=every)
    engine = PlainEngine(TextEncoder(load_retriever("random:llama")), config, torch.device("cpu"), False)
    reporter = Reporter(engine, config)
    for step in range(1, 41):
        now[0] += seconds
        reporter({"step": step, "steps": 40})
    assert written == expected


def test_other_errors_leave_the_budget_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), halving(str(tmp_path), 3000):
        raise RuntimeError("shape mismatch")
    assert halved_budget(str(tmp_path)) is None


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_storage_is_the_same_on_a_path_and_on_a_uri(tmp_path: Path, scheme: str) -> None:
    base = f"{scheme}{tmp_path}/store"
    assert storage.read_json(f"{base}/a.json") is None
    storage.write_json(f"{base}/a.json", {"b": 1})
    assert storage.read_json(f"{base}/a.json") == {"b": 1}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w")

    storage.upload(f"{base}/model", write)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    storage.fetch(f"{base}/model", tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["weights"]
    storage.remove(base)
    assert not storage.exists(base)
    storage.remove(base)


@pytest.mark.integration
def test_what_a_failed_start_reserved_is_given_back(tmp_path: Path) -> None:
    connect(None)
    group = placement_group([{"CPU": 0.1}])
    inside = PlacementGroupSchedulingStrategy(placement_group=group)
    note = ray.remote(note_reservation).options(num_cpus=0.1, scheduling_strategy=inside)
    release(str(tmp_path))  # nothing was written down: nothing to do
    ray.get(note.remote(str(tmp_path)))
    assert placement_group_table(group)["state"] == "CREATED"
    release(str(tmp_path))
    assert placement_group_table(group)["state"] == "REMOVED"


def test_steps_done_again_after_a_restart_replace_the_first(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 2.5}\n{"step": 3')
    assert read_history(file) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.5}]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"model": "another", "config": {}}')
    with pytest.raises(InputError, match="another model or other settings"):
        train("random:llama", TrainConfig(dataset="stdlib"), tmp_path)


def test_options_of_a_uri_stay_at_its_end() -> None:
    assert storage.join("/runs/", "a") == "/runs/a"
    assert storage.join("s3://bucket/runs", "a") == "s3://bucket/runs/a"
    assert storage.join("s3://b/runs/?scheme=http", "a") == "s3://b/runs/a?scheme=http"


def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    storage.check(tmp_path.as_uri())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"^s4://bucket cannot be used: Unrecognized"):
        storage.check("s4://bucket")


@pytest.mark.integration
def test_an_object_store_that_does_not_answer_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    nobody = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=x"
    with pytest.raises(InputError, match=r"cannot be used: .*connect"):
        storage.check(nobody)
    with pytest.raises(InputError, match=r"cannot be used: .*connect"):
        ShardFolder(nobody).header()
