"""How much computing a study is, from its configurations alone, and how long that takes on known GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from effir_ray.config import Config
from effir_ray.models import accounting
from effir_ray.models.plan import Plan
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import KeyedStage
from effir_ray.search.trial_config import TrialConfig
from effir_ray.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BFLOAT16_PEAKS = {"A100": 312e12, "H100": 989e12}
"""FLOP/s of dense bfloat16 products, by NVIDIA's data sheets."""

REACHED = 0.4
"""The share of a peak that encoding and training of large models are taken to reach."""

_WEIGHT, _GRADIENT = 2, 2  # bytes of a parameter that computes, in bfloat16
_STATES = 12  # of a trained one: its float32 copy and Adam's two moments


class Work(Config):
    """``flops`` of all stages of the listed dev trials and as much for each that the sampler adds, every text
    as long as it may be; test scores come on top. ``uncounted``: fields of trainings of whole epochs, whose
    steps, and of whole data sets, whose documents nobody has counted. ``gpu_bytes``: weights, gradients and
    optimizer states of the largest training on each of its GPUs; activations come on top."""

    flops: float
    uncounted: tuple[str, ...]
    gpu_bytes: int

    def hours(self, peak: float) -> float:
        """On one GPU of so many FLOP/s at its peak."""
        return self.flops / (REACHED * peak) / 3600


def study_work(
    space: SearchSpace,
    backbones: Mapping[str, PreTrainedConfig],
    stages: Iterable[tuple[KeyedStage, TrialConfig, Plan, float]],
    listed: int,
) -> Work:
    """``stages``: every stage of the ``listed`` trials once, with the trial that needs it first, and what
    part of it is expected to run."""
    shared, own = 0.0, 0.0
    for keyed, config, plan, part in stages:
        cost, backbone = keyed.stage.cost, backbones[config.backbone]
        used = Plan.full(backbone.num_hidden_layers) if cost.full_model else plan
        if _is_uncounted(keyed.name, space.of(config.backbone)):
            continue
        tokens = config.document_max_length
        flops = part * cost.tokens(config) * accounting.flops(backbone, used, tokens) / tokens
        if keyed.stage.shared:
            shared += flops
        else:
            own += flops
    trainings = [
        (name, training, backbones[backbone])
        for backbone in backbones
        for name, training in space.of(backbone).trainings.items()
    ]
    return Work(
        flops=shared + own * (1 + space.added / max(1, listed)),
        uncounted=(
            *dict.fromkeys(name for name, training, _ in trainings if training.steps is None),
            *(["dev"] if space.dev.documents is None else []),
        ),
        gpu_bytes=max(
            (training_bytes(training, _parameters(of)) for _, training, of in trainings), default=0
        ),
    )


def _parameters(backbone: PreTrainedConfig) -> int:
    return accounting.count_parameters(backbone, Plan.full(backbone.num_hidden_layers))


def _is_uncounted(stage: str, space: SearchSpace) -> bool:
    trainings = {"base": space.base_training, "recovered": space.recovery}
    training = trainings.get(stage)
    if training is not None:
        return training.steps is None
    return stage == "embeddings" and space.dev.documents is None


def training_bytes(training: TrainConfig, parameters: int) -> int:
    """Of weights, gradients and optimizer states on each GPU, with Adam (ZeRO, Rajbhandari et al. 2020,
    figure 1): stage 1 shares the states, 2 the gradients too, 3 the weights too. Stage 0 in bfloat16 runs
    as 1, but where the number of workers may change."""
    shares = [1, 1, 1]  # by how many the weights, gradients, states are shared
    whole = training.precision == "float32" or isinstance(training.workers, tuple)
    stage = training.zero_stage if whole else max(1, training.zero_stage)
    for part in range(min(stage, 3)):
        shares[2 - part] = training.most_workers
    if training.lora is not None:  # the few trained parameters do not count
        return parameters * _WEIGHT // shares[0]
    parts = zip((_WEIGHT, _GRADIENT, _STATES), shares, strict=True)
    return sum(parameters * size // share for size, share in parts)


def named_gpus(work: Work) -> Sequence[str]:
    """``"2.1 hours on an H100"``, for each GPU known here."""
    return [f"{_in_words(work.hours(peak))} on an {name}" for name, peak in BFLOAT16_PEAKS.items()]


def _in_words(hours: float) -> str:
    if hours < 1 / 60:
        return "less than a minute"
    number, unit = (hours * 60, "minutes") if hours * 60 < 59.5 else (hours, "hours")
    return f"{number:.0f} {unit}" if number >= 9.95 else f"{number:.1f} {unit}"
