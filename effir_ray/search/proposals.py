"""Which trial runs next: the listed schedules, then what Optuna proposes, then, with a strategy that stops
trials early, the better ones further on; at last the front and the full model on the test split, and with the
other seeds of a study that has several.

Optuna is driven by ask and tell on a study in the output folder. Rows are written before Optuna is told, so
after a kill at any moment ``Proposals`` brings the two together again: what has a row is told, what was asked
for but has none runs first.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.results.pareto import Mask, costs_of, non_dominated, on_front
from effir_ray.results.schema import ARROW_SCHEMA, Direction, TrialRow
from effir_ray.search.candidates import Axis, Candidate
from effir_ray.search.dry_run import Backbones, allowed_candidates, depths, expected_plan, may_meet
from effir_ray.search.halving import choose
from effir_ray.search.optuna_study import STORAGE, distribution, ended_trial, open_study, readable
from effir_ray.search.priors import suggestions
from effir_ray.search.shapes import Solver
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import Split
from effir_ray.search.trial_config import TrialConfig

_SPLITS: tuple[Split, ...] = ("dev", "test")
_HANDED_OUT = "handed_out"  # user attribute of Optuna's trials that were really run
_STUBBORN = 10  # useless proposals in a row, before an untried combination is taken instead
_DRAWS = 500  # random combinations looked at where they cannot be listed, before the study gives up


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """One thing to do: measure ``config`` on ``split``."""

    config: TrialConfig
    split: Split

    @property
    def key(self) -> tuple[str, Split]:
        return self.config.id, self.split


Parts = tuple[tuple[str, TrialConfig], ...]
"""What is done of a trial one after the other, with the trial id of each; of most trials one whole."""


class Proposals:
    """``next()`` until it gives no more requests; ``finished()`` for every row that comes back."""

    def __init__(
        self,
        space: SearchSpace,
        out: Path,
        rows: Sequence[TrialRow],
        backbones: Backbones,
        solve: Solver | None = None,
    ) -> None:
        """``solve``: what adds shapes to an elastic study, where it asks for some."""
        self.space, self.out, self.backbones = space, out.resolve(), backbones
        self.rows: dict[tuple[str, str], TrialRow] = {}  # with the seed of the search; by trial id and split
        self.repeated: dict[tuple[str, str], TrialRow] = {}  # with the others
        for row in rows:
            self._rows_like(row)[row.trial_id, row.split] = row
        self.running: dict[tuple[str, str], TrialRequest] = {}
        with readable(self.out / STORAGE):
            self.study = open_study(space, self.out)
        self.distributions = {name: distribution(axis) for name, axis in space.axes.items()}
        self.sampled: set[str] = set()
        allowed = allowed_candidates(space, backbones)
        self.listed = deque(self._entry(space.trial(candidate)) for candidate in allowed)
        self.promoted: deque[TrialConfig] = deque()  # what goes on from a rung and has not been handed out
        self.parts: dict[str, Parts] = {}  # trial id of its first part -> all parts of a trial of this study
        for config in self.listed:
            self.parts[config.id] = self._parts(config)
        self.solve = solve if space.strategy == "elastic" and space.elastic.shapes else None
        self.started = time.monotonic()
        self.asked: dict[str, int] = {}  # trial id -> Optuna's number of it, while it waits for values
        self.spent = False  # no combination is left to try: fewer than ``trials`` will be sampled
        with readable(self.out / STORAGE):
            for params in suggestions(space, depths(backbones)):
                self.study.enqueue_trial(params, skip_if_exists=True)
            self._reconcile()
        self.spent = self._lacking > 0 and self._countable and self._untried() is None

    @property
    def shortfall(self) -> str:
        """Why fewer trials ran than asked for; empty when they did not."""
        if self.stopped and not self._all_known:
            return f"{self.done('dev')} of {self.planned} trials ran: {self.stopped}"
        found, asked = len(self.sampled), self.space.trials
        if found >= asked or not self.spent:
            return ""
        possible = "can be built and meets the constraints" if self.space.constraints else "can be built"
        why = f"every combination of 'parameters' that {possible} has been tried"
        if not self._countable:
            why = f"of {_DRAWS} random combinations of 'parameters' none is new and {possible}"
        return f"{found} of {asked} trials were sampled: {why}"

    @property
    def stopped(self) -> str:
        """Which budget is spent; empty while none is."""
        budget = self.space.budget
        if budget.hours is not None and time.monotonic() - self.started >= budget.hours * 3600:
            return f"the budget of {budget.hours:g} hours is spent"
        if budget.device_hours is not None:
            everything = [*list(self.rows.values()), *list(self.repeated.values())]
            used = sum(row.device_seconds or 0.0 for row in everything) / 3600
            if used >= budget.device_hours:
                return f"the budget of {budget.device_hours:g} device-hours is spent ({used:.3g})"
        return ""

    @property
    def planned(self) -> int:
        """Dev trials of the whole study, each part of one that is done in parts."""
        return len(self.parts) + self._lacking + self._unsolved + sum(self._further())

    def done(self, split: Split) -> int:
        return sum(1 for _, place in list(self.rows) if place == split)

    def next(self) -> TrialRequest | None:
        """The next request; None when there is none now. ``exhausted`` tells whether one may come later."""
        config = self._next_dev()
        if config is not None:
            return self._start(TrialRequest(config=config, split="dev"))
        if self._under_way:
            return None
        return next((self._start(left) for left in self._left() if left.key not in self.running), None)

    def to_come(self) -> tuple[list[TrialConfig], int, int | None]:
        """Dev trials known but without a row, how many the sampler will add, and the test scores still to
        come (None while the front is open)."""
        if self.stopped:
            known, unknown = self._under_way, 0
        else:
            known = self.unfinished()
            unknown = self._lacking + self._unsolved + sum(self._further(decided=False))
        if known or unknown:
            return known, unknown, None
        left = list(self._left())
        again = [request.config for request in left if request.split == "dev"]
        return again, 0, len(left) - len(again)

    def unfinished(self) -> list[TrialConfig]:
        """Dev trials known but without a row; those that run are the last."""
        waiting = [config for config in list(self.listed) if not self._known(config)]
        return waiting + list(self.promoted) + self._under_way

    def may_go_on(self) -> list[TrialConfig]:
        """What follows on trials that wait at a rung for the others there."""
        reached = [(rung, pool) for rung, pool in enumerate(self._pools()) if pool]
        if not reached:
            return []
        rung, pool = reached[-1]
        following = [parts[rung + 1] for parts in pool if rung + 1 < len(parts)]
        going_on = {config.id for config in self.promoted}
        if any(part in going_on or self._begun(part) for part, _ in following):
            return []  # it is decided
        return [config for _, config in following]

    @property
    def _under_way(self) -> list[TrialConfig]:
        running = [request.config for request in list(self.running.values()) if request.split == "dev"]
        return [config for config in running if config.seed == self.space.seed]

    @property
    def _lacking(self) -> int:
        """How many trials the sampler still has to add."""
        return 0 if self.spent else max(0, self.space.trials - len(self.sampled))

    @property
    def _unsolved(self) -> int:
        """How many shapes the solver may still add."""
        return self.space.elastic.shapes if self.solve is not None else 0

    @property
    def complete(self) -> bool:
        """Whether the study has all its rows, or all that its budget allows."""
        known = self._all_known or bool(self.stopped)
        return known and not self.running and not any(self._left())

    @property
    def _all_known(self) -> bool:
        """Whether every dev trial has a row or is under way."""
        entered = all(self._known(config) for config in self.listed) and not self._lacking
        return entered and self.solve is None and not self.promoted and not self._due()

    @property
    def exhausted(self) -> bool:
        """After ``next()`` gave None: nothing runs whose result could lead to more work."""
        return not self.running

    def finished(self, row: TrialRow) -> None:
        """Take in a row that is safely on disk."""
        key = (row.trial_id, row.split)
        self.running.pop(key, None)
        rows = self._rows_like(row)
        rows[key] = row
        if row.split == "dev" and rows is self.rows:
            self._tell(row)

    def take_back(self) -> None:
        """What runs is lost with Ray: it is handed out again, first."""
        lost = self._under_way
        self.running.clear()
        self.listed.extendleft(config for config in reversed(lost) if config.id in self.parts)
        self.promoted.extendleft(config for config in reversed(lost) if config.id not in self.parts)

    def front(self) -> list[TrialConfig]:
        """The configurations no other dev trial that meets the constraints beats, the best in the first
        objective first."""
        return self._front(on_front)

    def undefeated(self) -> list[TrialConfig]:
        """``front()`` and those that only noise in their speed keeps off it, which a later trial may bring
        back: what is not among these never will be on the front."""
        return self._front(lambda table, objectives: non_dominated(costs_of(table, objectives)))

    def _front(self, chosen: Callable[[pa.Table, Mapping[str, Direction]], Mask]) -> list[TrialConfig]:
        dev = [row for row in list(self.rows.values()) if row.split == "dev" and self._meets(row)]
        if not dev:
            return []
        directions = self.space.directions
        names = [each for each in ARROW_SCHEMA.names if each.startswith(tuple(directions))]  # and intervals
        schema = pa.schema([ARROW_SCHEMA.field(name) for name in names])
        columns = {name: [getattr(row, name) for row in dev] for name in names}
        table = pa.table(columns, schema=schema)
        best = [row for row, kept in zip(dev, chosen(table, directions), strict=True) if kept]
        first = self.space.objectives[0]
        best.sort(key=lambda row: float(getattr(row, first)), reverse=directions[first] == "max")
        return [TrialConfig.of(row) for row in best]

    def _meets(self, row: TrialRow) -> bool:
        return row.status == "ok" and all(
            wanted.holds(getattr(row, wanted.column)) for wanted in self.space.conditions
        )

    def to_test(self) -> list[TrialConfig]:
        """The front, and the full model of every backbone, which test scores are read beside."""
        found = {config.id: config for config in self.front()}
        for name in self.space.backbone_names:
            full = self.space.trial(Candidate(backbone=name))
            row = self.rows.get((full.id, "dev"))
            if row is not None and row.status == "ok":
                found.setdefault(full.id, full)
        return list(found.values())

    def with_other_seeds(self, config: TrialConfig) -> list[TrialConfig]:
        return [config.with_seed(seed) for seed in self.space.seeds[1:]]

    def _left(self) -> Iterator[TrialRequest]:
        """What is still without a row when all dev trials have theirs: test scores, then the same models with
        the other seeds, unless the budget is spent."""
        chosen = self.to_test()
        requests = [TrialRequest(config=config, split="test") for config in chosen]
        for number in range(0 if self.stopped else len(self.space.seeds) - 1):
            again = [self.with_other_seeds(config)[number] for config in chosen]
            requests += [TrialRequest(config=config, split=split) for split in _SPLITS for config in again]
        return (left for left in requests if left.key not in self.rows and left.key not in self.repeated)

    def _rows_like(self, row: TrialRow) -> dict[tuple[str, str], TrialRow]:
        return self.rows if row.seed == self.space.seed else self.repeated

    def _start(self, request: TrialRequest) -> TrialRequest:
        self.running[request.key] = request
        return request

    def _entry(self, config: TrialConfig) -> TrialConfig:
        """What a trial begins with."""
        return self.space.rungs(config)[0]

    def _known(self, config: TrialConfig) -> bool:
        """Whether the trial, or more of it, has a row or runs."""
        return any(self._begun(part) for part, _ in self._parts(config))

    def _begun(self, part: str) -> bool:
        return (part, "dev") in self.rows or (part, "dev") in self.running

    def _parts(self, config: TrialConfig) -> Parts:
        """Those of the trial that begins with ``config``; by id, which takes time to compute."""
        known = self.parts.get(config.id)
        return known or tuple((part.id, part) for part in self.space.rungs(config))

    def _enter(self, config: TrialConfig) -> None:
        """Count ``config`` among what was sampled, unless it was listed."""
        if config.id not in self.parts:
            self.parts[config.id] = self._parts(config)
            self.sampled.add(config.id)

    def _next_dev(self) -> TrialConfig | None:
        if self.stopped:
            return None
        while self.listed:
            config = self.listed.popleft()
            if not self._known(config):
                return config
        if self._lacking and (sample := self._next_sample()) is not None:
            return sample
        if self.solve is not None and not self._under_way:
            self._add_shapes(self.solve)
            return self._next_dev()
        if not self.promoted and not self._under_way:
            self.promoted.extend(self._due())
        return self.promoted.popleft() if self.promoted else None

    def _add_shapes(self, solve: Solver) -> None:
        """List what the solver finds, once all others have begun."""
        self.solve = None
        begun = [parts[0] for parts in list(self.parts.values())]
        rows = [(config, self.rows.get((part, "dev"))) for part, config in begun]
        for candidate in solve([config for config, row in rows if row is not None and row.status == "ok"]):
            config = self._entry(self.space.trial(candidate))
            if self._possible(config):
                self.parts.setdefault(config.id, self._parts(config))
                if not self._known(config):
                    self.listed.append(config)

    @property
    def _rungs(self) -> int:
        return max((len(parts) for parts in list(self.parts.values())), default=1)

    def _pools(self) -> list[list[Parts]]:
        """Rung -> the trials in parts that have a good row there, and at every rung before."""
        pools: list[list[Parts]] = [[] for _ in range(self._rungs)]
        for parts in list(self.parts.values()):
            if len(parts) == 1:
                continue
            for rung, (part, _) in enumerate(parts):
                row = self.rows.get((part, "dev"))
                if row is None or row.status != "ok":
                    break
                pools[rung].append(parts)
        return pools

    def _further(self, *, decided: bool = True) -> list[int]:
        """How many trials train on from each rung, or are expected to; without the ``decided`` ones only
        those of rungs that are still open."""
        several = [parts for parts in list(self.parts.values()) if len(parts) > 1]
        lacking = self._lacking + self._unsolved if self.space.strategy != "independent" else 0
        counts, pool = [], len(several) + lacking
        waiting = {config.id for config in list(self.promoted)}
        for rung in range(1, self._rungs):
            ids = [parts[rung][0] for parts in several if rung < len(parts)]
            there = sum(self._begun(part) or part in waiting for part in ids)
            counts.append(there * decided if there else self.space.halving.share(pool))
            pool = there or counts[-1]
        return counts

    def _due(self) -> list[TrialConfig]:
        """What goes on from the first rung that has such; to be asked when nothing runs."""
        for rung, pool in enumerate(self._pools()[:-1]):
            pool = [parts for parts in pool if rung + 1 < len(parts)]
            if not pool:
                continue
            rows = [self.rows[parts[rung][0], "dev"] for parts in pool]
            table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=ARROW_SCHEMA)
            count = self.space.halving.share(len(pool))
            meets = np.array([self._meets(row) for row in rows], dtype=np.bool_)
            costs = costs_of(table, self.space.directions)
            chosen = np.flatnonzero(meets)[choose(costs[meets], count)].tolist()
            # What breaks a measured constraint now may meet it once it is trained.
            chosen += np.flatnonzero(~meets)[choose(costs[~meets], count - len(chosen))].tolist()
            following = [pool[place][rung + 1] for place in chosen]
            if due := [config for part, config in following if not self._begun(part)]:
                return due
        return []

    def _next_sample(self) -> TrialConfig | None:
        for _ in range(_STUBBORN):
            proposed = self._ask()
            if proposed is not None:
                return proposed
        untried = self._untried()
        if untried is None:
            self.spent = True
            return None
        self.study.enqueue_trial(untried)
        return self._ask()

    @property
    def _countable(self) -> bool:
        """Whether the combinations can be listed: no range is continuous."""
        return all(axis.values() for axis in self.space.axes.values())

    def _untried(self) -> dict[str, Any] | None:
        """Parameters of a combination that was never tried and can be built, the first in a seeded order;
        None when there is none (or, of endlessly many, none among ``_DRAWS``)."""
        for params in self._combinations():
            config = self.space.trial(Candidate(**params))
            if not self._known(config) and self._possible(config):
                return params
        return None

    def _combinations(self) -> Iterator[dict[str, Any]]:
        axes = self.space.axes
        if self._countable:
            everything = list(itertools.product(*(axis.values() for axis in axes.values())))
            random.Random(self.space.seed).shuffle(everything)
            yield from (dict(zip(axes, values, strict=True)) for values in everything)
            return
        draw = random.Random(f"{self.space.seed}:{len(self.sampled)}")
        for _ in range(_DRAWS):
            yield {name: _drawn(axis, draw) for name, axis in axes.items()}

    def _ask(self) -> TrialConfig | None:
        """One proposal of the sampler; None when it is known already or cannot be built."""
        trial = self.study.ask(self.distributions)
        candidate = Candidate(**trial.params).canonical()
        config = self._entry(self.space.trial(candidate))
        trial.set_user_attr("trial", config.model_dump_json())
        if self._known(config) or not self._possible(config):
            known = self.rows.get((config.id, "dev"))
            self._end(trial, known)
            return None
        trial.set_user_attr(_HANDED_OUT, True)
        trial.set_user_attr("schedule", config.name)
        trial.set_user_attr("trial_id", config.id)
        self.asked[config.id] = trial.number
        self._enter(config)
        return config

    def _possible(self, config: TrialConfig) -> bool:
        """Whether the trial can be built and may meet the constraints."""
        try:
            expected_plan(config, self.backbones)
            return may_meet(self.space.conditions, config, self.backbones)
        except InputError:
            return False

    def _values(self, row: TrialRow | None) -> list[float] | None:
        """The objectives; None where one was not measured."""
        if row is None or row.status == "failed":
            return None
        measured = [getattr(row, name) for name in self.space.objectives]
        return None if None in measured else [float(value) for value in measured]

    def _violations(self, row: TrialRow) -> dict[str, float]:
        """Constraint -> how far the row is from meeting it, 0 or less where it does."""
        return {
            str(wanted): wanted.violation(getattr(row, wanted.column)) for wanted in self.space.conditions
        }

    def _end(self, trial: optuna.Trial, row: TrialRow | None) -> None:
        """Tell Optuna what came of ``trial``; without a row, or values in it, that it failed."""
        values = self._values(row)
        if row is None or values is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        for name, violation in self._violations(row).items():
            trial.set_constraint(name, violation)
        self.study.tell(trial, values)

    def _tell(self, row: TrialRow) -> None:
        """Give Optuna the values of a dev row: to the trial it asked for, or as a new one it can learn
        from."""
        if row.trial_id in self.asked:
            number = self.asked.pop(row.trial_id)
            stored = self.study.get_trials(deepcopy=False)[number]
            self._end(optuna.Trial(self.study, stored._trial_id), row)
            return
        values = self._values(row)
        params = self._params(TrialConfig.of(row))
        if params is not None:
            self.study.add_trial(
                ended_trial(
                    row,
                    values=values,
                    constraints=None if values is None else self._violations(row),
                    params=params,
                    distributions=self.distributions,
                    trial=row.trial,
                )
            )

    def _params(self, config: TrialConfig) -> dict[str, Any] | None:
        """The parameters that would have proposed this trial; None when the parameters cannot express it."""
        unsaid = {"layer_widths": [], "vocabulary": 0, "dimension": 0}
        said = {**unsaid, **config.schedule.model_dump(mode="json")}
        wanted = {**said, "backbone": config.backbone}
        wanted |= {"recover": config.recovery is not None, "precision": config.precision or "auto"}
        params: dict[str, Any] = {}
        for name, axis in self.space.axes.items():
            value = wanted[name]
            if isinstance(value, list):
                value = ",".join(map(str, value)) + "," * (len(value) == 1)
            if not axis.contains(value):
                return None
            params[name] = value
        same = self._entry(self.space.trial(Candidate(**params))).id == config.id
        return params if same else None

    def _reconcile(self) -> None:
        """After a kill: which of Optuna's trials have rows, which still have to run."""
        told: set[str] = set()
        for trial in self.study.get_trials(deepcopy=False):
            text = trial.user_attrs.get("trial")
            if trial.state == optuna.trial.TrialState.RUNNING:
                if text is None:  # killed between asking and noting what for
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    continue
                config = TrialConfig.read(text, str(self.out / STORAGE))
                self.asked[config.id] = trial.number
                self._enter(config)
                if (config.id, "dev") not in self.rows:
                    self.listed.append(config)
            elif text is not None:
                config = TrialConfig.read(text, str(self.out / STORAGE))
                if trial.state == optuna.trial.TrialState.COMPLETE:
                    told.add(config.id)
                elif _HANDED_OUT in trial.user_attrs and (config.id, "dev") not in self.rows:
                    self.listed.append(config)  # it failed, and is tried again as listed ones are
                    self._enter(config)
        for row in [row for row in self.rows.values() if row.split == "dev"]:
            config = TrialConfig.of(row)
            entry = self._entry(config)
            ours = config.elastic == self.space.elastic_of(config.schedule, config.recovery)
            if ours and self._known(entry):  # not where another strategy did a part that this one does not
                self._enter(entry)
            if row.trial_id not in told:
                self._tell(row)


def _drawn(axis: Axis, draw: random.Random) -> Any:
    values = axis.values()
    if values:
        return draw.choice(values)
    assert axis.low is not None and axis.high is not None
    return draw.uniform(axis.low, axis.high)
