"""Schedules of unequal widths that a solver finds in the model which an elastic study trained.

Depth goes first: for each depth that a study tries its trials have measured what is lost if single layers are
narrower besides (stage ``shapes``). The solver finds the best widths for each depth and budget, and of each
budget the best depth (``compression.budget``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effir_ray.compression.budget import Choice, Replacements, choose_within, option_costs
from effir_ray.compression.schedule import Schedule
from effir_ray.config import parse
from effir_ray.models.accounting import count_block_parameters
from effir_ray.models.plan import Plan
from effir_ray.readers import read_json
from effir_ray.search.candidates import Candidate
from effir_ray.search.model_stages import SHAPES
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import Sources
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Solver = Callable[[Sequence[TrialConfig]], list[Candidate]]
"""Trials that are measured -> candidates that were found in what they measured."""


def solver(
    space: SearchSpace,
    backbones: Mapping[str, PreTrainedConfig],
    store: StageStore,
    sources: Mapping[str, Sources],
) -> Solver:
    """``sources``: of each backbone, by its name."""

    def solve(trials: Sequence[TrialConfig]) -> list[Candidate]:
        found: list[Candidate] = []
        for name in space.backbone_names:
            own = [trial for trial in trials if trial.backbone == name]
            places = dict.fromkeys(place for trial in own for place in _places(trial, sources[name], store))
            if not places:
                continue
            measured = [_read(store.small(place, SHAPES)) for place in places]
            like = Schedule(width_method=own[0].ordered_by.width_method)
            one = name if len(space.backbones) > 1 else None
            found += [
                Candidate(**schedule.model_dump(), recover=True, backbone=one)
                for schedule in best_shapes(backbones[name], measured, space.elastic.shapes, like)
            ]
        return found

    return solve


def _places(trial: TrialConfig, sources: Sources, store: StageStore) -> list[Path]:
    """Of its stage, where it has one: trials of one depth share it."""
    return [stage.path(store) for stage in trial_stages(trial, sources, "dev") if stage.name == "shapes"]


def _read(file: Path) -> Replacements:
    return parse(read_json(file), Replacements, source=str(file))


def best_shapes(
    config: PreTrainedConfig, measured: Sequence[Replacements], count: int, like: Schedule
) -> list[Schedule]:
    """The shapes of least loss for ``count`` budgets of block parameters, evenly from the cheapest that any
    of ``measured`` can be to the full model, those left out that narrow nothing. ``like``: their other
    settings."""
    full = count_block_parameters(config, Plan.full(config.num_hidden_layers))
    cheapest = [sum(map(min, option_costs(config, each.options))) / full for each in measured]
    fractions = np.linspace(min(cheapest), 1.0, count + 1)[:-1].tolist()
    best: dict[float, Choice] = {}
    for each, least in zip(measured, cheapest, strict=True):
        possible = [fraction for fraction in fractions if fraction >= least]
        for choice in choose_within(config, each, possible, like=like) if possible else ():
            known = best.get(choice.fraction)
            if known is None or choice.loss < known.loss:
                best[choice.fraction] = choice
    shapes = [best[fraction].schedule for fraction in fractions if fraction in best]
    return [shape for shape in dict.fromkeys(shapes) if shape.layer_widths]
