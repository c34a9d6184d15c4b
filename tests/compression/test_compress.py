"""Compression in one call, and its dry run."""

from pathlib import Path

import pytest

from effir_ray.backbones import retriever as retrievers
from effir_ray.backbones.retriever import load_retriever
from effir_ray.compression.compress import compress
from effir_ray.compression.plan import LayerPlan
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import InputError


def test_named_layers_need_no_data_and_no_training(tmp_path: Path) -> None:
    done = compress("random:qwen3", Schedule(drop_mlp=(0,), drop_attention=(3,)), tmp_path / "model")
    saved = load_retriever(tmp_path / "model")
    assert done.checkpoint == tmp_path / "model"
    assert saved.plan == done.plan
    assert done.parameters == sum(p.numel() for p in saved.model.parameters()) < done.full_parameters
    assert done.flops_per_document < done.full_flops_per_document


def test_a_dry_run_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(retrievers, "load_retriever", refuse)
    schedule = Schedule(drop_mlp=tuple(range(16)), width_reduction=0.3)
    preview = compress("mistralai/Mistral-7B-v0.1", schedule, None)
    assert round(preview.parameters / 1e9, 2) == 3.45
    assert preview.checkpoint is None


def test_a_compressed_model_can_be_compressed_again(tmp_path: Path) -> None:
    compress("random:llama", Schedule(drop_mlp=(0,)), tmp_path / "once")
    preview = compress(str(tmp_path / "once"), Schedule(drop_attention=(2,)), None)
    twice = compress(str(tmp_path / "once"), Schedule(drop_attention=(2,)), tmp_path / "twice")
    assert twice.plan.layers == (LayerPlan(mlp=False), LayerPlan(), LayerPlan(attention=False), LayerPlan())
    assert (preview.plan, preview.parameters) == (twice.plan, twice.parameters)


def test_more_than_there_is_fails_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="drop_mlp is 33; only 32 of 32 layers"):
        compress("mistralai/Mistral-7B-v0.1", Schedule(drop_mlp=33), None)
