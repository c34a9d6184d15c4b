"""The watchers of a training run: curves are written, failure is noticed, a hard start is not failure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from effir_ray.compression.planning import within
from effir_ray.compression.surgery import apply_plan
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import TrialFailure
from effir_ray.models.accounting import flops
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import DevConfig, TrainConfig
from effir_ray.training.run import monitoring
from effir_ray.training.run.monitoring import CollapseDetector, DevScore, Utilization
from effir_ray.training.run.trackers import TensorBoard
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.ladder import Rung
from effir_ray.training.step.text_encoder import TextEncoder
from tests.helpers.beir_folders import write_graded_folder


def test_mfu_counts_the_texts_of_a_step_and_a_backward_as_two_forwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitoring, "gemm_peak", lambda device, dtype: 4e9)
    retriever = load_retriever("random:llama")
    plan = Plan(
        layers=(LayerPlan(mlp=False), LayerPlan(neurons=tuple(range(64))), *retriever.plan.layers[2:])
    )
    full = Utilization(retriever, torch.device("cpu"), torch.float32)([7, 7, 30], 0.5)
    forward = sum(flops(retriever.model.config, retriever.plan, tokens) for tokens in (7, 7, 30))
    assert full == pytest.approx(3 * forward / 0.5 / 4e9)
    frozen = Utilization(retriever, torch.device("cpu"), torch.float32, frozen=True)
    assert frozen([7, 7, 30], 0.5) == pytest.approx(2 / 3 * full)
    small = apply_plan(retriever, plan)
    assert Utilization(small, torch.device("cpu"), torch.float32)([7, 7, 30], 0.5) < full


def test_mfu_counts_every_network_of_an_elastic_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "gemm_peak", lambda device, dtype: 4e9)
    retriever = apply_plan(
        load_retriever("random:llama"), Plan(layers=(LayerPlan(attention=False), *[LayerPlan()] * 3))
    )
    rungs = [Rung(drop_mlp=(1,)), Rung(drop_mlp=(1, 2), width=0.5)]
    plans = [retriever.plan]
    plans += [within(rung.plan([128] * 4), retriever.plan) for rung in rungs]
    found = Utilization(retriever, torch.device("cpu"), torch.float32)([7, 30], 2.0, rungs)
    costs = [flops(retriever.model.config, plan, tokens) for plan in plans for tokens in (7, 30)]
    assert found == pytest.approx(3 * sum(costs) / 2.0 / 4e9)


def row(step: int, loss: float, cosine: float, norm: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": loss, "loss_info_nce": loss, "grad_norm": norm, "mean_cosine": cosine}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (row(1, math.nan, 0.1), "loss nan"),
        (row(1, 1.0, 0.1, math.inf), "grad_norm inf"),
        (row(1, 1.0, math.nan), "mean_cosine nan"),
    ],
)
def test_what_is_not_finite_stops_at_once(bad: dict[str, float], named: str) -> None:
    with pytest.raises(TrialFailure, match=f"step 1: {named}"):
        CollapseDetector(candidates=8, grace=100).on_row(bad)


def test_collapse_stops_after_patience_steps() -> None:
    detector = CollapseDetector(candidates=64, grace=5, patience=3)
    for step in range(1, 8):  # steps 6 and 7 count
        detector.on_row(row(step, math.log(64), 0.9999))
    with pytest.raises(TrialFailure, match=r"step 8: .*collapsed.*lower learning_rate"):
        detector.on_row(row(8, math.log(64), 0.9999))


@pytest.mark.parametrize(("loss", "cosine"), [(math.log(64), 0.5), (1.0, 0.9999)])
def test_one_sign_alone_or_an_interruption_is_no_collapse(loss: float, cosine: float) -> None:
    detector = CollapseDetector(candidates=64, grace=0, patience=3)
    for step in range(1, 20):
        detector.on_row(row(step, loss, cosine))
    for step in range(1, 20):
        detector.on_row(row(step, math.log(64), 0.9999 if step % 3 else 0.5))


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        board.on_row({"step": 1, "steps": 9, "loss": 2.0, "engine": "DDP"})
        board.on_row({"step": 2, "steps": 9, "loss": 1.0, "dev_ndcg_at_10": 0.25})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/dev_ndcg_at_10"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize("budget", [None, 64])
def test_no_pass_is_larger_than_the_budget(budget: int | None, tmp_path: Path) -> None:
    retriever = load_retriever("random:llama")
    config = TrainConfig(dataset="unused", lora=None)
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)
    sizes: list[int] = []
    engine.encoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    dev = DevConfig(every=1, queries=10, documents=30)
    dataset = load_dataset(write_graded_folder(tmp_path / "data"))
    score = DevScore(engine, retriever.tokenize, dataset, dev, seed=0, token_budget=budget)
    assert 0 <= score() <= 1
    assert max(sizes) <= (budget or 2048)
    assert (len(sizes) > 4) == (budget is not None)
