"""How long the rest of a study takes: FLOPs of the stages to come, at the speed the finished ones had."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

from effir_ray.models import accounting
from effir_ray.models.plan import Plan
from effir_ray.search.dry_run import Backbones, expected_plan
from effir_ray.search.stage_graph import KeyedStage, Sources
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore

_FIRST_GUESS = 5e10  # FLOP/s of a small CPU, until a stage has shown the real speed
_TRUST = 60.0
_FRONT_SHARE = 0.5  # trials expected on the front, whose test scores follow


class TimeEstimate:
    """Remaining seconds of a study, from the stages that are not on disk yet."""

    def __init__(self, store: StageStore, backbones: Backbones, sources: Mapping[str, Sources]) -> None:
        """``sources``: of each backbone, by its name."""
        self.store, self.backbones, self.sources = store, backbones, sources
        self.trials: dict[str, dict[str, KeyedStage]] = {}  # trial id -> its stages by key
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
        stages: dict[str, KeyedStage] = {}
        for config in configs:
            stages |= self._stages_of(config)
        self._observe(stages.values())
        return sum(self._predict(*self.expected[key]) for key in stages if key not in self.actual)

    def _stages_of(self, config: TrialConfig) -> dict[str, KeyedStage]:
        """By key; hashed once a trial, because the display asks twice a second."""
        trial = config.id
        if trial not in self.trials:
            stages = trial_stages(config, self.sources[config.backbone], "dev")
            self._learn(config, stages)
            self.trials[trial] = {stage.key: stage for stage in stages}
        return self.trials[trial]

    def _learn(self, config: TrialConfig, stages: Iterable[KeyedStage]) -> None:
        backbone = self.backbones[config.backbone]
        full = accounting.flops(backbone, Plan.full(backbone.num_hidden_layers), 1)
        own = accounting.flops(backbone, expected_plan(config, self.backbones), 1)
        for stage in stages:
            cost = stage.stage.cost
            work = cost.tokens(config) * (full if cost.full_model else own)
            guess = cost.start_seconds + work / _FIRST_GUESS
            self.expected.setdefault(stage.key, (stage.name, guess))

    def _observe(self, stages: Iterable[KeyedStage]) -> None:
        for stage in stages:
            if stage.key not in self.actual and (record := self.store.record(stage.path(self.store))):
                self.actual[stage.key] = float(record["seconds"])

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
        """A trial that shares what most trials share: the mean of what the known ones have of their own."""
        if not self.trials:
            return 0.0
        stages = {key: stage for trial in self.trials.values() for key, stage in trial.items()}
        own = [key for key, stage in stages.items() if not stage.stage.shared]
        return sum(self._predict(*self.expected[key]) for key in own) / len(self.trials)
