"""Whole runs through Ray Train and DeepSpeed."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from effir_ray.compression.dimension import embedding_axes, shorten
from effir_ray.data.pairs import load_pairs, write_pairs
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.training.run import fault_tolerance, launcher, loop
from effir_ray.training.run.launcher import TrainResult, train
from effir_ray.training.step.gradcache import ContrastiveStep
from tests.helpers.training_runs import (
    first_steps,
    has_step,
    kill_a_worker,
    losses,
    rows,
    settings,
    when,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_a_run_learns_and_leaves_an_ordinary_checkpoint(uninterrupted: TrainResult) -> None:
    assert uninterrupted.engine == "DeepSpeed ZeRO-2"
    curve = losses(uninterrupted)
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    assert load_retriever(str(uninterrupted.checkpoint)).plan.layers
    assert not list(uninterrupted.checkpoint.parent.glob("run/*")), "the run's own checkpoints are left over"


def test_a_run_goes_on_from_the_state_of_a_shorter_one_to_the_same_weights(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    begun = train("random:llama", settings(dataset, stop_after=9), tmp_path / "begun")
    assert begun.step == 9 and len(begun.history) == 9
    weights = [load_file(result.checkpoint / "model.safetensors") for result in (begun, uninterrupted)]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0]), "it is on the way"
    whole = train("random:llama", settings(dataset), tmp_path / "whole", begun=tmp_path / "begun")
    assert losses(whole) == losses(uninterrupted)
    assert [row["step"] for row in rows(tmp_path / "whole")][:10] == [*range(1, 10), 10], (
        "nothing is done again"
    )
    found = load_file(whole.checkpoint / "model.safetensors")
    assert all((found[name] == weights[1][name]).all() for name in weights[1])


def test_out_of_memory_goes_on_with_half_the_budget(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a step, and Ray Train starts the worker again; once in the dev score, past ``max_failures``."""

    def worker(job: dict[str, Any]) -> dict[str, Any]:
        from effir_ray.training.run.monitoring import DevScore

        fault_tolerance.CHECKPOINT_SECONDS = 0.0
        exhausted_once(ContrastiveStep, 6)
        exhausted_once(DevScore, 1)
        return loop.train_worker(job)

    def exhausted_once(kind: Any, call: int) -> None:
        calls, plain, flag = itertools.count(1), kind.__call__, tmp_path / kind.__name__

        def __call__(self: Any, *arguments: Any) -> Any:
            if next(calls) == call and not flag.exists():
                flag.touch()
                torch.empty(1 << 50)
            return plain(self, *arguments)

        kind.__call__ = __call__

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "train_worker", worker)  # pickled by value: the worker's module has its own
        config = settings(
            dataset,
            token_budget=1024,
            max_failures=1,
            checkpoint_every=None,
            dev={"every": 8, "queries": 10, "documents": 40},
        )
        result = train("random:llama", config, tmp_path / "out")
    notes = {row["step"]: row["note"] for row in result.history if "note" in row}
    assert notes == {
        5: "out of memory: token budget halved to 512",
        7: "out of memory: token budget halved to 256",
    }
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert first_steps(tmp_path / "out") == 1


def test_names_of_files_are_relative_to_where_the_call_is_made(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(load_retriever("random:llama"), tmp_path / "model")
    (tmp_path / "data").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    config = settings(Path("data"), steps=2, storage_path="kept", dev={"every": 2, "dataset": "data"})
    result = train("model", config, Path("out"))
    assert result.checkpoint == tmp_path / "out" / "checkpoint"
    assert result.history[-1]["dev_ndcg_at_10"] >= 0
    assert not list((tmp_path / "kept").glob("*/model"))


def test_two_workers_zero3_lora_mined_negatives_and_the_best_dev_score(dataset: Path, tmp_path: Path) -> None:
    """And once more with a rank killed on the way."""
    config = settings(
        dataset,
        workers=2,
        zero_stage=3,
        lora={"r": 4, "alpha": 8},
        negatives="bm25",
        hard_negatives=2,
        token_budget=128,
        dev={"every": 6, "queries": 10, "documents": 40},
        prompts={"query": "search query: "},
        checkpoint_every=None,
        keep_checkpoints=2,
    )
    whole = train("random:llama", config, tmp_path / "whole")
    assert whole.engine == "DeepSpeed ZeRO-3"
    scores = {row["step"]: row["dev_ndcg_at_10"] for row in whole.history if "dev_ndcg_at_10" in row}
    assert list(scores) == [6, 12, 18, 24]
    assert scores[whole.step] == max(scores.values())
    assert load_retriever(str(whole.checkpoint)).spec.query_prompt == "search query: "
    with when(partial(has_step, tmp_path / "killed", 8), kill_a_worker):
        killed = train("random:llama", config, tmp_path / "killed")
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-4)
    assert first_steps(tmp_path / "killed") == 1


def test_a_teachers_embeddings_of_a_stream_pull_the_student_to_them(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    pairs = load_pairs(dataset)
    (tmp_path / "pairs").mkdir()
    write_pairs(pairs[:25], tmp_path / "pairs" / "a.jsonl")
    write_pairs(pairs[25:], tmp_path / "pairs" / "b.jsonl")
    config = settings(
        tmp_path / "pairs",
        held_out=str(dataset),
        workers=2,
        distillation={"teacher": str(uninterrupted.checkpoint), "embedding": 20.0, "similarity": 1.0},
    )
    student = train("random:llama", config, tmp_path / "student")
    queries = [pair.query for pair in pairs]
    teacher, before, after = (
        Encoder(load_retriever(str(model))).encode(queries, "query")
        for model in (uninterrupted.checkpoint, "random:llama", student.checkpoint)
    )
    distance = np.linalg.norm(before - teacher, axis=1).mean()
    assert np.linalg.norm(after - teacher, axis=1).mean() < 0.6 * distance


def test_shorter_embeddings_learn_those_of_the_full_model(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    """The teacher's, projected as the student's were at the start; the matrix is gathered and learns too."""
    pairs = load_pairs(dataset)
    axes = embedding_axes(load_retriever(str(uninterrupted.checkpoint)), pairs, max_length=32)
    save_checkpoint(shorten(load_retriever("random:llama"), axes, 16), tmp_path / "model")
    config = settings(
        dataset,
        info_nce=0.0,
        workers=2,
        zero_stage=3,
        distillation={"teacher": str(uninterrupted.checkpoint), "embedding": 20.0},
    )
    student = train(tmp_path / "model", config, tmp_path / "student")
    assert student.engine == "DeepSpeed ZeRO-3"
    queries = [pair.query for pair in pairs]
    teacher, before, after = (
        Encoder(load_retriever(str(model))).encode(queries, "query")
        for model in (uninterrupted.checkpoint, tmp_path / "model", student.checkpoint)
    )
    wanted = teacher @ axes[:16].T
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    distance = np.linalg.norm(before - wanted, axis=1).mean()
    assert np.linalg.norm(after - wanted, axis=1).mean() < 0.6 * distance
    trained = load_file(student.checkpoint / "2_Dense" / "model.safetensors")["linear.weight"].numpy()
    assert 1e-4 < np.abs(trained - axes[:16]).max() < 0.1


def test_a_diverging_run_fails_with_its_reason_and_is_not_repeated(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, learning_rate=1e3, weight_decay=1e3)  # each step a millionfold the weights
    with pytest.raises(TrialFailure, match=r"step .*loss"):
        train("random:llama", config, tmp_path / "out")


def test_more_than_the_cluster_has_is_said_at_once(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="and the cluster has"):
        train("random:llama", settings(dataset, cpus_per_worker=4000), tmp_path / "out")
