"""How a run is put on DeepSpeed, and what happens where that does not start."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from effir_ray.compression.sparsity.methods import parse_pattern
from effir_ray.compression.sparsity.sparsify import sparsify
from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import LoraConfig, TrainConfig
from effir_ray.training.run.loop import prepare
from effir_ray.training.step import engine
from effir_ray.training.step.engine import adamw, learning_rate
from tests.helpers import checkpoint_worker
from tests.helpers.processes import run_group


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"dataset": "unused", "lora": None, **changes})


@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_passes_are_summed_in_float32(stage: int) -> None:
    """DeepSpeed refuses the setting without ZeRO."""
    found = engine.deepspeed_settings(settings(zero_stage=stage), bfloat16=True)
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["zero_optimization"]["stage"] == max(stage, 1)
    plain = engine.deepspeed_settings(settings(zero_stage=stage), bfloat16=False)
    assert "data_types" not in plain and plain["zero_optimization"]["stage"] == stage


def refuse() -> None:
    raise ImportError("no compiler here")


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, alpha=4)])
def test_without_deepspeed_bfloat16_trains_plainly_and_says_why(
    lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_import_deepspeed", refuse)
    dtype = "bfloat16" if lora else "float32"
    retriever = load_retriever("random:llama", dtype=dtype)
    found = prepare(retriever, settings(lora=lora), torch.device("cpu"), bfloat16=True)
    assert found.name == "DDP (DeepSpeed does not start: ImportError: no compiler here)"
    trained = [parameter for parameter in retriever.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    before = [parameter.detach().clone() for parameter in trained]
    (ids,) = retriever.tokenize(["some words"], "document")
    embeddings = found(torch.tensor([*ids, *ids[:2]]), torch.tensor([len(ids), 2]))
    found.backward(embeddings[0].square().sum() - embeddings[1].sum(), last=True)
    assert found.step(1e-2) > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


def test_zeros_that_are_kept_stay_and_the_other_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_import_deepspeed", refuse)
    retriever = load_retriever("random:llama")
    sparsify(retriever, "magnitude", parse_pattern("2:4"))
    weights = [module.weight for _, module in retriever.family.linears(retriever.model)]
    before = [weight.detach().clone() for weight in weights]
    config = settings(keep_zeros=True, weight_decay=0.1)
    found = prepare(retriever, config, torch.device("cpu"), bfloat16=False)
    (ids,) = retriever.tokenize(["a few words to train on"], "document")
    for _ in range(3):
        embedding = found(torch.tensor(ids), torch.tensor([len(ids)]))
        found.backward((embedding * torch.arange(64)).sum(), last=True)
        found.step(1e-3)
    for old, new in zip(before, weights, strict=True):
        assert ((new.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
        assert torch.equal(new == 0, old == 0)
        assert (new != old)[old != 0].float().mean() > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_zeros": True, "lora": LoraConfig()}, "keep_zeros needs lora: null"),
        ({"split": "test", "dev": {"every": 5}}, "train on split 'train'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_partitioned_models_have_no_plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_import_deepspeed", refuse)
    with pytest.raises(ImportError, match="no compiler"):
        prepare(load_retriever("random:llama"), settings(zero_stage=3), torch.device("cpu"), bfloat16=False)


def test_a_norm_tells_when_a_gradient_is_not_a_number() -> None:
    module = torch.nn.Linear(2, 2)
    module.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert engine.gradient_norm(module) == pytest.approx(5.0)
    module.bias.grad = torch.tensor([0.0, math.nan])
    assert math.isnan(engine.gradient_norm(module))


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_come_back_exactly_and_a_planted_pickle_does_not_run(ranks: int, tmp_path: Path) -> None:
    """At every ZeRO stage, with and without adapters, in float32 and bfloat16; no rank is left waiting."""
    run_group(checkpoint_worker.__file__, ranks, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 16
    assert {case: found["equal"] for case, found in report.items()} == dict.fromkeys(report, True)
    for case, found in report.items():
        if not case.endswith("True"):
            assert found["messages"], case
        assert all("not a training checkpoint" in text and "\n" not in text for text in found["messages"])


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps({"weights": 1})], ids=["", "text", "pickle"]
)
def test_a_damaged_checkpoint_is_named(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_import_deepspeed", refuse)
    found = prepare(load_retriever("random:llama"), settings(), torch.device("cpu"), bfloat16=False)
    found.save(tmp_path)
    found.load(tmp_path)
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"state\.pt: not a training checkpoint"):
        found.load(tmp_path)
    torch.save({"weights": checkpoint_worker.Planted(tmp_path / "mark")}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="it names"):
        found.load(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_rises_to_the_peak_then_falls_and_never_is_zero(schedule: str) -> None:
    rates = [
        learning_rate(step, total=20, peak=2.0, warmup=0.2, schedule=schedule)  # type: ignore[arg-type]  # parametrised
        for step in range(20)
    ]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.2


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, total=1, peak=3.0, warmup=0.0, schedule="linear") == 3.0


def test_weight_decay_is_for_matrices_and_frozen_weights_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    model[2].requires_grad_(False)
    groups = adamw(model.parameters(), rate=1e-3, weight_decay=0.1).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]
