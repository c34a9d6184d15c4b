"""The nearest ordinary shape: whole blocks by importance, one width by the parameters that remain."""

from pathlib import Path

import numpy as np
import pytest

from effir_ray.compression.pipeline import compress
from effir_ray.compression.planning import ImportanceScores, make_plan
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.uniform import narrow_to, nearest_width, round_to_blocks, uniform_shape
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_parameters
from effir_ray.models.loading import load_config
from effir_ray.models.ordinary import choose_layout, kept_blocks
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import load_retriever

FULL = Plan.full(4)
SCORES = ImportanceScores(
    criterion="cosine",
    attention=(0.4, 0.1, 0.2, 0.3),
    mlp=(0.1, 0.2, 0.3, 0.4),
    block=(0.1, 0.4, 0.2, 0.3),
)


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [
        (Schedule(), [0, 1, 2, 3]),
        (
            Schedule(drop_mlp=4, drop_attention=(1,)),
            [3],
        ),  # the weight of 3 blocks; layer 1 first
        (Schedule(drop_mlp=2, drop_attention=2), [2, 3]),
        (Schedule(drop_block=(1,), drop_mlp=(0,), drop_attention=(0,)), [2, 3]),
        (Schedule(drop_attention=1), [0, 1, 2, 3]),  # less than half a block
    ],
)
def test_as_many_blocks_go_as_the_dropped_sublayers_weigh(schedule: Schedule, kept: list[int]) -> None:
    config = load_config("random:llama")
    plan = round_to_blocks(config, make_plan(schedule, 4, SCORES), FULL, SCORES)
    assert kept_blocks(plan) == kept
    assert choose_layout(config, plan).ordinary


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_the_width_makes_up_for_the_rest(kind: str) -> None:
    """Fewer parameters than a step of one neuron group away from the plan's own."""
    config, schedule = load_config(f"random:{kind}"), Schedule(drop_mlp=1, width_reduction=0.4)
    asked = make_plan(schedule, 4, SCORES)
    plan, size = uniform_shape(config, schedule, asked, FULL, SCORES)
    assert size is not None and size % 8 == 0
    random = np.random.default_rng(0)
    neurons = {layer: random.random(128) for layer in kept_blocks(plan)}
    cut = narrow_to(config, plan, size, neurons)
    assert choose_layout(config, cut).ordinary
    target = 4 * 128 - 128 - round(3 * 128 * 0.4 / 8) * 8
    assert abs(len(kept_blocks(plan)) * size - target) < 128
    for layer in kept_blocks(plan):
        best = np.argsort(-neurons[layer])[:size]
        assert cut.layers[layer].neurons == tuple(sorted(best.tolist()))
    wider, narrower = (
        count_parameters(config, narrow_to(config, plan, size + step, None)) for step in (8, -8)
    )
    wanted = count_parameters(config, narrow_to(config, plan, size, None))
    assert narrower < wanted < wider
    assert nearest_width(config, plan, wanted, None) == size


def test_what_stays_first_and_what_is_gone_already() -> None:
    gone = LayerPlan(attention=False, mlp=False)
    config = load_config("random:modernbert")
    plan = round_to_blocks(config, Plan(layers=(gone, *FULL.layers[1:])), FULL, SCORES)
    assert kept_blocks(plan) == [0, 1, 3]  # the first cannot go: the least important other one does
    half = Plan(layers=(LayerPlan(mlp=False), *FULL.layers[1:]))
    assert kept_blocks(round_to_blocks(load_config("random:llama"), half, half, SCORES)) == [1, 2, 3]
    with pytest.raises(InputError, match="the first block is not whole"):
        round_to_blocks(config, half, half, SCORES)
    with pytest.raises(InputError, match="no whole block left"):
        round_to_blocks(load_config("random:llama"), FULL, Plan(layers=(LayerPlan(mlp=False),) * 4), SCORES)
    uneven = Plan(layers=(LayerPlan(neurons=tuple(range(64))), *FULL.layers[1:]))
    with pytest.raises(InputError, match="have 64 to 128 neurons already"):
        uniform_shape(load_config("random:llama"), Schedule(), uneven, uneven, SCORES)


def test_widths_of_layers_are_rounded_to_one() -> None:
    config = load_config("random:llama")
    schedule = Schedule(layer_widths=(128, 16, 64, 48))
    plan, size = uniform_shape(config, schedule, FULL, FULL, SCORES)
    assert (plan, size) == (FULL, 64)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_compress_writes_the_shape_its_dry_run_announced(
    kind: str, tmp_path: Path, write_folder: object
) -> None:
    data = str(write_folder(tmp_path / "data"))  # type: ignore[operator]
    schedule = Schedule(drop_mlp=1, drop_attention=(2,), width_reduction=0.3, width_method="magnitude")
    announced = compress(
        f"random:{kind}", schedule, None, calibration=Calibration(dataset=data), uniform=True
    )
    made = compress(
        f"random:{kind}", schedule, tmp_path / "small", calibration=Calibration(dataset=data), uniform=True
    )
    assert made.layout is not None and made.layout.ordinary, made.layout
    assert made.parameters == announced.parameters
    loaded = load_retriever(tmp_path / "small")
    assert loaded.plan == made.plan
    assert sum(p.numel() for p in loaded.model.parameters()) == made.parameters
