"""How long the rest of a study takes: FLOPs of the stages to come, at the speed the finished ones had."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from effir_ray.models import accounting
from effir_ray.models.plan import Plan
from effir_ray.search.dry_run import expected_plan
from effir_ray.search.recipe import Recipe, Sources, Stage, recipe
from effir_ray.search.space import TrialConfig
from effir_ray.stages import StageStore
from effir_ray.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FIRST_GUESS = 5e10  # FLOP/s of a small CPU, until a stage has shown the real speed
_START_SECONDS = {
    "base": 30.0,
    "recovered": 30.0,
    "embeddings": 8.0,
}  # starting Ray Train and Ray Data workers
_OTHER_START_SECONDS = 2.0
_TRUST = 60.0
_FRONT_SHARE = 0.5  # trials expected on the front, whose test scores follow


class Outlook:
    """Remaining seconds of a study, from the stages that are not on disk yet."""

    def __init__(self, store: StageStore, backbone: PreTrainedConfig, sources: Sources) -> None:
        self.store, self.backbone, self.sources = store, backbone, sources
        self.recipes: dict[str, dict[str, Stage]] = {}  # trial id -> its stages by key
        self.expected: dict[str, tuple[str, float]] = {}  # stage key -> (name, first guess in seconds)
        self.actual: dict[str, float] = {}  # stage key -> seconds it took

    def seconds_left(
        self,
        known: Sequence[TrialConfig],
        unknown: int,
        tests: int | None,
        running: Iterable[tuple[str, float]],
    ) -> float:
        """``known`` dev trials without a row, ``unknown`` ones the sampler will propose, ``tests`` test
        scores to come (None: not known yet), and the (stage name, begin) of what runs now."""
        dev = self._missing(known)
        each = self._typical()
        expected_tests = math.ceil(_FRONT_SHARE * (len(known) + unknown)) if tests is None else tests
        total = dev + each * unknown + each * expected_tests
        spent = sum(
            min(time.time() - since, 0.95 * self._predict(name, guess))
            for name, since in running
            if (guess := self._guess_of(name)) is not None
        )
        return max(total - spent, 0.0)

    def _missing(self, configs: Sequence[TrialConfig]) -> float:
        stages: dict[str, Stage] = {}
        for config in configs:
            stages |= self._stages_of(config)
        self._observe(stages.values())
        return sum(self._predict(*self.expected[key]) for key in stages if key not in self.actual)

    def _stages_of(self, config: TrialConfig) -> dict[str, Stage]:
        """By key; hashed once a trial, because the display asks twice a second."""
        trial = config.id
        if trial not in self.recipes:
            plan = recipe(config, self.sources, "dev")
            self._learn(config, plan)
            self.recipes[trial] = {stage.key: stage for stage in plan.stages()}
        return self.recipes[trial]

    def _learn(self, config: TrialConfig, plan: Recipe) -> None:
        if plan.scores.key in self.expected:
            return
        full = accounting.flops(self.backbone, Plan.full(self.backbone.num_hidden_layers), 1)
        own = accounting.flops(self.backbone, expected_plan(config, self.backbone), 1)
        for stage in plan.stages():
            work = _tokens(stage.name, config) * (full if stage.name in ("base", "importance") else own)
            guess = _START_SECONDS.get(stage.name, _OTHER_START_SECONDS) + work / _FIRST_GUESS
            self.expected.setdefault(stage.key, (stage.name, guess))

    def _observe(self, stages: Iterable[Stage]) -> None:
        for stage in stages:
            record = self.store.path(stage.name, stage.inputs) / "stage.json"
            if stage.key not in self.actual and record.exists():
                self.actual[stage.key] = float(json.loads(record.read_text())["seconds"])

    def _predict(self, name: str, guess: float) -> float:
        """The first guess, scaled as the guesses for finished stages of this kind had to be; without any, as
        those for all finished stages, which count little until they add up to more than ``_TRUST``
        seconds."""
        done = [key for key in self.actual if key in self.expected]
        same = [key for key in done if self.expected[key][0] == name]
        trust = 0.0 if same else _TRUST
        actual = trust + sum(self.actual[key] for key in same or done)
        expected = trust + sum(self.expected[key][1] for key in same or done)
        return guess * actual / expected

    def _guess_of(self, name: str) -> float | None:
        guesses = [
            guess for key, (kind, guess) in self.expected.items() if kind == name and key not in self.actual
        ]
        return guesses[0] if guesses else None

    def _typical(self) -> float:
        """A trial that shares everything but the measurement of its own model."""
        total = 0.0
        for name in ("pruned", "embeddings", "scores", "timing"):
            guesses = [guess for kind, guess in self.expected.values() if kind == name]
            total += self._predict(name, sum(guesses) / len(guesses)) if guesses else 0.0
        return total


def _tokens(name: str, config: TrialConfig) -> float:
    """Tokens through the model, forward; training counts three times (forward, and twice that backward)."""
    training: TrainConfig | None = {"base": config.base_training, "recovered": config.recovery}.get(name)
    if training is not None:
        steps = training.steps or 100
        return 3.0 * steps * training.batch_size * (training.query_max_length + training.document_max_length)
    lengths = config.query_max_length + config.document_max_length
    timed = 2 * config.timing.rounds * max(config.timing.documents, config.timing.queries)
    return {
        "importance": config.calibration_texts * config.document_max_length,
        "neurons": 3.0 * config.gates.steps * config.gates.batch_size * lengths,
        "embeddings": (config.dev.documents or 10_000) * config.document_max_length,
        "scores": (config.dev.queries or 1_000) * config.query_max_length,
        "timing": timed * lengths,
    }.get(name, 0.0)
