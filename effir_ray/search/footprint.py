"""How many bytes a study takes on disk, from its plans and number formats alone.

Weights, optimizer states and embeddings count; indexes, logs and tokenizers are small beside them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effir_ray.data.datasets import official_name
from effir_ray.data.download import BEIR_SETS
from effir_ray.errors import InputError
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import Split
from effir_ray.search.trial_config import StudySettings, TrialConfig
from effir_ray.training.config import TrainConfig

_FLOAT = 4  # bytes: trained weights and embeddings are float32
_TRAINED = 3  # values a trained parameter: itself and Adam's two moments
_SPLITS: tuple[Split, ...] = ("dev", "test")
_FRONT_SHARE = 0.5  # of the trials: how many are expected on the front


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One trial's model: ``parameters``, the width of its hidden states, dimensions of its embeddings, bytes
    of a stored parameter."""

    parameters: int
    width: int
    dimensions: int
    stored: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """``peak``: the most that is there at once; ``end``: what stays."""

    peak: int
    end: int


def study_footprint(
    space: SearchSpace, fulls: Mapping[str, ModelSize], trials: Sequence[tuple[TrialConfig, ModelSize]]
) -> Footprint:
    """For ``fulls``, the full model of each backbone, and the listed ``trials``; those that the sampler adds
    are taken for as large as the largest of them.

    With ``keep: front`` half of the trials are expected to stay.
    """
    based = [
        (full, training)
        for name, full in fulls.items()
        if (training := space.of(name).base_training) is not None
    ]
    if space.strategy == "elastic":
        based += [
            (full, training)
            for name, full in fulls.items()
            if (training := space.of(name).recovery) is not None
        ]
    common = sum(full.parameters * full.stored for full in fulls.values())
    common += sum(full.parameters * _FLOAT for full, _ in based)
    if space.strategy == "elastic":  # with its neurons sorted
        common += sum(full.parameters * full.stored for full in fulls.values())
    kept = [_kept(config, size, every=space.keep == "all") for config, size in trials]
    kept += [max(kept)] * space.added
    share = 1.0 if space.keep == "all" else _FRONT_SHARE
    again = sum(kept) * _FRONT_SHARE * max(0, len(space.seeds) - 1)
    stay = int(sum(kept) * share + again)
    building = max(_building(config, size) for config, size in trials)
    building = max([building, *(_training(training, full) for full, training in based)])
    waiting = [_state(config.recovery, size) for config, size in trials if config.recovery is not None]
    states = sum(waiting) + max(waiting, default=0) * space.added if space.strategy != "independent" else 0
    end = common + (0 if space.keep == "none" else stay)
    return Footprint(peak=common + stay + building * space.concurrency + states, end=end)


def check_space(out: Path, need: Footprint, used: int) -> None:
    """Raise InputError when the disk of ``out``, which holds ``used`` bytes of the study already, is too
    small for the rest of it."""
    there = next(place for place in (out, *out.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if need.peak - used > free:
        raise InputError(
            f"{out}: the study needs about {_gigabytes(need.peak - used)} at its peak "
            f"({_gigabytes(need.end)} in the end), {_gigabytes(free)} are free; free some, choose another "
            "--out, or keep less (keep: front or none, fewer schedules, lower concurrency)"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _kept(config: TrialConfig, size: ModelSize, *, every: bool) -> int:
    """What a trial leaves: its model, and the embeddings of both splits; with ``every`` also the model before
    it was trained."""
    cut = 0 if config == config.full() else size.parameters * size.stored
    trained = 0 if config.recovery is None else size.parameters * _FLOAT
    models = cut + trained if every or not trained else trained
    return models + sum(_embeddings(config, size, split) for split in _SPLITS)


def _building(config: TrialConfig, size: ModelSize) -> int:
    """What is there while a trial runs: everything of it, and its training's checkpoints."""
    training = 0 if config.recovery is None else _training(config.recovery, size)
    return _kept(config, size, every=True) + training


def _training(training: TrainConfig, size: ModelSize) -> int:
    """The checkpoints of a training run, one more while the next is written, and that one put together."""
    return (training.keep_checkpoints + 3) * _state(training, size)


def _state(training: TrainConfig, size: ModelSize) -> int:
    """What a training goes on from."""
    trained = float(size.parameters)
    if training.lora is not None:  # an adapter of a d x d matrix has 2 r d parameters
        trained *= min(1.0, 2 * training.lora.r / size.width)
    return int(trained * _TRAINED * _FLOAT)


def _embeddings(config: TrialConfig, size: ModelSize, split: Split) -> int:
    return _documents(config, split) * size.dimensions * _FLOAT


def _documents(config: StudySettings, split: Split) -> int:
    """How many are encoded for a split; 0 for a whole corpus that is not known by name."""
    sampled: int | None = getattr(config, split).documents
    known = [BEIR_SETS.get(official_name(name)) for name in config.dataset_names]
    return sum(sampled or (corpus.documents if corpus else 0) for corpus in known)
