"""A whole run whose number of workers changes with the nodes of its cluster."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from effir_ray.training.config import TrainConfig
from effir_ray.training.run import launcher
from effir_ray.training.run.launcher import train
from tests.helpers.lost_node import come_and_go
from tests.helpers.training_runs import first_steps, ran_with, settings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(580)]

STEPS = 50


def train_and_look_often(config: TrainConfig, out: Path, address: str) -> None:
    launcher.RESIZE_SECONDS = 1.0  # this process is the test's own
    train("random:llama", config, out, address=address)


def test_a_run_grows_with_a_node_that_comes_and_shrinks_with_one_that_is_lost(
    dataset: Path, tmp_path: Path
) -> None:
    """A checkpoint at every step keeps steps slow enough for nodes to come and go."""
    fixed = settings(dataset, steps=STEPS, checkpoint_every=None, learning_rate=1e-4)
    out = tmp_path / "out"
    changes = {"workers": (1, 2), "zero_stage": 0, "checkpoint_every": 1}
    config = TrainConfig.model_validate(fixed.model_dump() | changes)
    come_and_go(
        partial(train_and_look_often, config, out),
        then=partial(ran_with, out, 1),
        until=partial(ran_with, out, 2),
    )
    result = train("random:llama", config, out)
    undisturbed = train("random:llama", fixed, tmp_path / "fixed")
    workers = [row["workers"] for row in result.history]
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    assert workers[0] == workers[-1] == 1 and 2 in workers
    assert sum(a != b for a, b in pairwise(workers)) == 2
    assert first_steps(out) == 1
    assert result.engine == "DDP (the number of workers may change)"
    expected = [row["loss"] for row in undisturbed.history]
    assert [row["loss"] for row in result.history] == pytest.approx(expected, rel=1e-4)
    weights, others = (load_file(run.checkpoint / "model.safetensors") for run in (result, undisturbed))
    assert all(float((weights[name] - others[name]).abs().max()) < 1e-4 for name in others)
    assert json.loads((out / "training.json").read_text())["config"]["workers"] == [1, 2]
