"""One trial: run the stages of its recipe that do not exist yet, and make its row of what they left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from effir_ray.data.pair_stream import source_fingerprint
from effir_ray.errors import InputError, TrialFailure
from effir_ray.hardware import detect
from effir_ray.models import accounting
from effir_ray.models.loading import load_config
from effir_ray.models.names import backbone_fingerprint
from effir_ray.models.plan import Plan
from effir_ray.provenance import git_commit, package_versions
from effir_ray.results.schema import TrialRow
from effir_ray.search.recipe import Recipe, Sources, Split, Stage, recipe
from effir_ray.search.space import StudySettings, TrialConfig
from effir_ray.search.steps import RESUMABLE, SCORES, STEPS, TIMING, read_plan
from effir_ray.stages import StageStore

Listener = Callable[[str], None]


class _Kitchen:
    """Builds stages of one trial, parents only when they are really needed; adds up the device seconds."""

    def __init__(self, config: TrialConfig, split: Split, store: StageStore, listener: Listener) -> None:
        self.config, self.split, self.store, self.listener = config, split, store, listener
        self.device_seconds = 0.0

    def make(self, stage: Stage) -> Path:
        place = self.store.path(stage.name, stage.inputs)
        if (place / "stage.json").exists():
            return place
        parents = {role: self.make(parent) for role, parent in stage.parents.items()}
        build = partial(self._build, stage, parents)
        return self.store.run(stage.name, stage.inputs, build, resumable=stage.name in RESUMABLE)

    def _build(self, stage: Stage, parents: Mapping[str, Path], out: Path) -> None:
        self.listener(stage.name)
        started = time.monotonic()
        STEPS[stage.name](self.config, self.split, parents, out, self.store)
        self.device_seconds += (time.monotonic() - started) * workers(stage.name, self.config)


def workers(stage: str, config: TrialConfig) -> int:
    """How many workers a stage keeps busy."""
    training = {"base": config.base_training, "recovered": config.recovery}.get(stage)
    if training is not None:
        return training.workers
    return config.encoding_workers if stage == "embeddings" else 1


def run_trial(
    config: TrialConfig,
    stages: StageStore,
    *,
    split: Split = "dev",
    study: str = "",
    listener: Listener = lambda stage: None,
) -> TrialRow:
    """Score ``config`` on ``split``. ``listener`` hears the name of every stage that is really run.

    Raises InputError when the configuration cannot be (more dropped than there is, ...) and TrialFailure when
    the result cannot be trusted. The number of compute threads is fixed first: sums depend on it.
    """
    import torch

    torch.set_num_threads(config.threads or detect().threads)
    torch.manual_seed(config.seed)
    started = time.monotonic()
    plan = recipe(config, sources_of(config), split)
    kitchen = _Kitchen(config, split, stages, listener)
    for last in (plan.scores, plan.timing):  # they pull in the rest
        kitchen.make(last)
    measured = _measured(config, plan, stages)
    return TrialRow(
        **describe(config, split, study),
        **measured,
        wall_seconds=time.monotonic() - started,
        device_seconds=kitchen.device_seconds,
    )


def failed_row(config: TrialConfig, split: Split, study: str, error: BaseException | str) -> TrialRow:
    """The row of a trial that could not be measured."""
    reason = error if isinstance(error, str) else _reason(error)
    return TrialRow(**describe(config, split, study), status="failed", reason=reason)


def sources_of(config: StudySettings) -> Sources:
    """Fingerprints of everything from outside that a trial or a whole study reads. Raises InputError for
    what is not there."""
    trainings = [training for training in (config.base_training, config.recovery) if training is not None]
    names = {config.dataset, *(training.dataset for training in trainings)}
    return Sources(
        backbone=backbone_fingerprint(config.backbone),
        datasets={name: source_fingerprint(name) for name in sorted(names)},
    )


def describe(config: TrialConfig, split: Split, study: str) -> dict[str, Any]:
    """The columns that are known before anything ran."""
    return {
        "study": study,
        "trial_id": config.id,
        "trial": config.model_dump_json(),
        "schedule": config.name,
        "backbone": config.backbone,
        "dataset": config.dataset,
        "split": split,
        "seed": config.seed,
        "recovered": config.recovery is not None,
        "git_commit": git_commit(),
        "versions": json.dumps(package_versions()),
        "hardware": detect().name,
    }


_TIMED = (
    *("document_ms", "document_speedup", "query_speedup", "query_ms_p95"),
    *("tokens_per_s", "mfu", "peak_memory_bytes", "isotropy"),
)


def sizes(config: TrialConfig, plan: Plan) -> dict[str, Any]:
    """The columns that follow from backbone and plan alone: no weights are needed."""
    model = load_config(config.backbone, first_blocks=config.first_blocks)
    parameters = accounting.count_parameters(model, plan)
    full = accounting.count_parameters(model, Plan.full(len(plan.layers)))
    return {
        "plan": json.dumps(plan.per_layer_config()),
        "parameters": parameters,
        "parameter_ratio": parameters / full,
        "flops_per_document": accounting.flops(model, plan, config.document_max_length) or None,
        "bytes": accounting.model_bytes(model, plan, detect().dtype),
    }


def _measured(config: TrialConfig, plan: Recipe, store: StageStore) -> dict[str, Any]:
    def folder(stage: Stage) -> Path:
        return store.path(stage.name, stage.inputs)

    scores = json.loads((folder(plan.scores) / SCORES).read_text())
    timing = json.loads((folder(plan.timing) / TIMING).read_text())
    return {
        **sizes(config, read_plan(folder(plan.model))),
        "ndcg_at_10": scores["ndcg@10"],
        "recall_at_100": scores["recall@100"],
        "mrr_at_10": scores["mrr@10"],
        "map_at_100": scores["map@100"],
        **{name: timing[name] for name in _TIMED},
        "query_ms": timing["query_ms_p50"],
    }


@lru_cache(maxsize=16)
def _reason(error: BaseException) -> str:
    """One line. Our own errors speak for themselves; others are named by their class, and of a traceback
    that came from another process only its last line, the error there, is kept."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if isinstance(error, InputError | TrialFailure):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[-1] if len(lines) > 2 else ' '.join(lines)}"
