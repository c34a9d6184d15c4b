"""What a study keeps on disk: models and embeddings that no row to come needs are deleted on the way.

A trial that another one beats once stays beaten, so what only such trials need can go at once. Should a
later proposal need one of those stages after all (the pruned model of a trial that is now trained again),
it is built anew, to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from effir_ray.results.schema import TrialRow
from effir_ray.search.proposals import Proposals
from effir_ray.search.stage_graph import KeyedStage, Sources, Split
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import GONE, StageStore
from effir_ray.training.config import STATE

_SPLITS: tuple[Split, ...] = ("dev", "test")


class Collector:
    """Frees what ``space.keep`` does not keep. To be called by the driver alone, between two requests."""

    def __init__(self, proposals: Proposals, store: StageStore, sources: Mapping[str, Sources]) -> None:
        """``sources``: of each backbone, by its name."""
        self.proposals, self.store, self.sources = proposals, store, sources
        self._stages: dict[tuple[str, str], list[KeyedStage]] = {}
        self._taken: set[tuple[str, str, Any]] = set()  # rows whose stages are among those that can go
        self._can_go: dict[str, KeyedStage] = {}  # large stages that rows lead to, by key

    def collect(self) -> None:
        """Delete the models and embeddings of trials that have their rows, and that nothing to come needs."""
        self._collect_states()
        if self.proposals.space.keep == "all":
            return
        wanted = {stage.key for stage in self._wanted()}
        self._take_rows()
        for key, stage in list(self._can_go.items()):
            if key not in wanted and stage.stage.bulk is not None:
                self.store.free(stage.path(self.store), stage.stage.bulk)
                del self._can_go[key]

    def _take_rows(self) -> None:
        """A stage that went and was built again has a row that is new."""
        for (trial, split), row in self._rows():
            name = (trial, split, row.created_at)
            if name not in self._taken:
                self._taken.add(name)
                stages = self._of(TrialConfig.of(row), "test" if split == "test" else "dev")
                self._can_go |= {stage.key: stage for stage in stages if stage.stage.bulk is not None}

    def _collect_states(self) -> None:
        """What stopped trainings would go on from, where they do not: their models are whole without."""
        parts = (STATE, f"{STATE}{GONE}")
        trained = [place for place, _ in self.store.finished("recovered")]
        there = [place for place in trained if any(self.store.holds(place, part) for part in parts)]
        if not there:
            return
        rungs, going_on = self.proposals.space.rungs, self._to_come()
        stages = [stage for config in going_on for part in rungs(config) for stage in self._of(part, "dev")]
        kept = {stage.path(self.store) for stage in stages}
        for place in there:
            if place not in kept:
                self.store.drop(place, STATE)

    def kept_bytes(self) -> int:
        """Of the models and embeddings of trials that are there."""
        places = {(stage.path(self.store), stage.stage.bulk) for stage in self._finished()}
        return sum(self.store.bytes_of(place, bulk) for place, bulk in places if bulk)

    def _finished(self) -> Iterator[KeyedStage]:
        for (_, split), row in self._rows():
            yield from self._of(TrialConfig.of(row), "test" if split == "test" else "dev")

    def _rows(self) -> list[tuple[tuple[str, str], TrialRow]]:
        return [*list(self.proposals.rows.items()), *list(self.proposals.repeated.items())]

    def _wanted(self) -> Iterator[KeyedStage]:
        """Everything that leads to a row to come, and what the scores of the front's rows are of."""
        for config in self._to_come():
            yield from self._of(config, "dev")
        best = self.proposals.undefeated()
        again = (other for config in best for other in self.proposals.with_other_seeds(config))
        for config in (*best, *again):
            key = (config.id, "test")
            tested = key in self.proposals.rows or key in self.proposals.repeated
            if self.proposals.space.keep == "none" and tested:
                continue
            for split in _SPLITS:
                for end in self._of(config, split):
                    if end.stage.query_scores is not None:
                        yield from end.parents.values()

    def _to_come(self) -> list[TrialConfig]:
        return [*self.proposals.unfinished(), *self.proposals.may_go_on()]

    def _of(self, config: TrialConfig, split: Split) -> list[KeyedStage]:
        """The trial's stages; keyed once, because every row asks for all."""
        key = (config.id, split)
        if key not in self._stages:
            self._stages[key] = trial_stages(config, self.sources[config.backbone], split)
        return self._stages[key]
