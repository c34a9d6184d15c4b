from __future__ import annotations

import itertools

import pytest
import torch

from effir_ray.training.step.optim import adamw, learning_rate


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
