"""How much a study computes: against the ZeRO paper's figures, and by hand."""

import pytest

from effir_ray.models import accounting
from effir_ray.models.loading import load_config
from effir_ray.models.plan import Plan
from effir_ray.search.dry_run import dry_run
from effir_ray.search.work import Work, named_gpus, training_bytes
from effir_ray.training.config import TrainConfig
from tests.helpers.search_examples import small_space

TRAINING = {"dataset": "stdlib", "steps": 10, "batch_size": 64, "lora": None}
TEXTS = {"query_max_length": 16, "document_max_length": 32}


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_training_states_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs."""
    precision = "float32" if stage == 0 else "auto"  # in bfloat16 there is no stage 0
    training = TrainConfig.model_validate(
        TRAINING | {"zero_stage": stage, "workers": 64, "precision": precision}
    )
    assert training_bytes(training, 7_500_000_000) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_workers_whose_number_may_change_share_nothing() -> None:
    training = TrainConfig.model_validate(TRAINING | {"zero_stage": 0, "workers": [1, 64]})
    assert training_bytes(training, 1000) == 16_000


def test_lora_holds_the_weights_alone() -> None:
    training = TrainConfig.model_validate(TRAINING | {"lora": {"r": 4}, "zero_stage": 2})
    assert training_bytes(training, 1000) == 2000


def test_a_training_is_three_passes_over_its_texts() -> None:
    """The study with a recovery does that much more than the one without."""
    recovery = {"steps": 5, "batch_size": 8, "lora": None, "hard_negatives": 2, "negatives": "bm25", **TEXTS}
    without = small_space(schedules=[{"drop_mlp": 1}])
    space = small_space(schedules=[{"drop_mlp": 1, "recover": True}], recovery=recovery)
    backbone = load_config("random:llama")
    found = dry_run(space).work.flops - dry_run(without).work.flops
    tokens = 3 * 5 * 8 * (16 + 32 * 3)
    full = tokens * accounting.flops(backbone, Plan.full(4), 32) / 32
    assert 0.5 * full < found < full
    assert dry_run(space).work.uncounted == ()


def test_epochs_are_not_counted_and_sampled_trials_are() -> None:
    recovery = {"epochs": 2.0, "batch_size": 8, "lora": None, **TEXTS}
    space = small_space(recovery=recovery, parameters={"drop_mlp": [0, 1, 2]}, trials=2)
    work, listed = dry_run(space).work, dry_run(space.model_copy(update={"trials": 0})).work
    assert work.uncounted == ("recovery",)
    untrained = dry_run(small_space(parameters={"drop_mlp": [0, 1, 2]}, trials=2)).work
    assert work.flops == untrained.flops
    assert dry_run(small_space(dev={}, schedules=[{"drop_mlp": 1}])).work.uncounted == ("dev",)
    assert 2 * listed.flops < work.flops <= 3 * listed.flops


def test_hours_are_on_one_gpu() -> None:
    work = Work(flops=0.4 * 989e12 * 7200, uncounted=(), gpu_bytes=0)
    assert work.hours(989e12) == pytest.approx(2)
    assert named_gpus(work) == ["6.3 hours on an A100", "2.0 hours on an H100"]
    assert named_gpus(Work(flops=0.4 * 989e12 * 3600 * 123.4, uncounted=(), gpu_bytes=0))[1].startswith(
        "123 h"
    )
    assert named_gpus(Work(flops=1e12, uncounted=(), gpu_bytes=0))[0] == "less than a minute on an A100"
