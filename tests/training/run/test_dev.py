"""Dev scores during training: within the token budget, whatever the texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effir_ray.data.datasets import load_dataset
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import DevConfig, TrainConfig
from effir_ray.training.run.dev import DevScore
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.text_encoder import TextEncoder
from tests.helpers.beir_folders import write_graded_folder


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
