"""The best shape for a budget: of every layer one option, with the least total loss that the budget allows.

An option is a layer with or without its attention, and with so many neurons of its MLP. What it does to the
model is measured once, alone, in a model that is otherwise whole (``replacements``); losses of layers are
taken to add up. The choice then is a multiple-choice knapsack, solved exactly as an integer program, as in
Puzzle (arXiv 2411.19146, section 4).

Losses that were measured alone do not say what two layers lose together: whole layers should not go by them.
Depth goes first therefore, by a criterion that scores again after each layer (``pooled``); with the plan that
it leaves as ``plan``, losses are measured, and the budget decides on what remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from effir_ray.compression.planning import grain
from effir_ray.compression.schedule import Schedule
from effir_ray.config import Config
from effir_ray.errors import InputError
from effir_ray.models.accounting import (
    anatomy_of,
    check_plan,
    count_block_parameters,
    flops,
    layer_flops,
    layer_parameters,
    width,
)
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LEVELS = (0.75, 0.5, 0.25, 0.0)


class LayerOption(Config):
    """What a layer may be. ``width``: neurons that its MLP keeps; 0: none, and no MLP."""

    attention: bool
    width: int = Field(ge=0)

    @property
    def plan(self) -> LayerPlan:
        """For counting: which neurons stay is not said."""
        neurons = tuple(range(self.width)) if self.width else None
        return LayerPlan(attention=self.attention, mlp=self.width > 0, neurons=neurons)


Options = tuple[tuple[LayerOption, ...], ...]
"""The options of every layer of the backbone."""


class Replacements(Config):
    """What every option was measured to lose, see ``replacements.measure_replacements``. ``plan``: what depth
    had left of the model before, which by itself loses ``loss``; ``losses``: of each layer one an option,
    what it loses beyond that."""

    plan: Plan
    loss: float
    options: Options
    losses: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _one_loss_an_option(self) -> Replacements:
        if not len(self.plan.layers) == len(self.options) == len(self.losses):
            raise ValueError("plan, options and losses are of one number of layers")
        if [len(each) for each in self.options] != [len(each) for each in self.losses]:
            raise ValueError("every option of a layer needs one loss")
        return self


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best shape within ``fraction`` of the uncompressed backbone's cost. ``cost``: of its blocks;
    ``loss``: what the plan loses by itself, and what its layers were measured to lose, added up: to compare
    choices of different plans by."""

    fraction: float
    schedule: Schedule
    cost: int
    loss: float


def layer_options(
    config: PreTrainedConfig,
    plan: Plan,
    levels: Sequence[float] = LEVELS,
    *,
    multiple: int | None = None,
    attention: bool = True,
) -> Options:
    """What each layer of ``plan`` may be: as it is, and with shares ``levels`` of its neurons (0: no MLP).

    Widths are rounded to multiples of ``multiple`` (see ``planning.grain``), at least one. With ``attention``
    every width is there without the layer's attention too. What ``plan`` has dropped already stays dropped.
    Raises InputError for a level that is no share.
    """
    if wrong := [level for level in levels if not 0 <= level <= 1]:
        raise InputError(f"level {wrong[0]:g} of a width; expected shares between 0 and 1")
    anatomy = anatomy_of(config)
    check_plan(anatomy, plan)
    layers = list(zip(anatomy.layers, plan.layers, strict=True))
    step = grain(multiple, [width(parts, kept) for parts, kept in layers if kept.mlp])

    def widths(present: int) -> list[int]:
        rounded = [
            min(present, max(step, round(level * present / step) * step)) if level else 0 for level in levels
        ]
        return sorted({present, *rounded}, reverse=True)

    return tuple(
        tuple(
            LayerOption(attention=there, width=size)
            for there in ([True, False] if kept.attention and attention else [kept.attention])
            for size in (widths(width(parts, kept)) if kept.mlp else [0])
        )
        for parts, kept in layers
    )


def option_costs(
    config: PreTrainedConfig, options: Options, *, tokens: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """What every option costs: parameters, or FLOPs of a document of ``tokens`` tokens. The costs of layers
    add up to those of their blocks exactly (``accounting``)."""
    return tuple(
        tuple(
            layer_parameters(parts, option.plan)
            if tokens is None
            else layer_flops(parts, option.plan, tokens)
            for option in choices
        )
        for parts, choices in zip(anatomy_of(config).layers, options, strict=True)
    )


def solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> tuple[int, ...]:
    """Which option each layer takes, (layers,), so that the sum of ``losses`` is the least of all choices
    whose ``costs`` are at most ``budget``.

    losses, costs: of each layer one an option. min sum x_lo loss_lo, sum_o x_lo = 1 for every layer l,
    sum x_lo cost_lo <= budget, x in {0, 1}: solved by HiGHS. Raises InputError when no choice is so cheap, or
    when losses and costs are not of the same options.
    """
    if not losses or [len(each) for each in losses] != [len(each) for each in costs] or not all(losses):
        raise InputError("every layer needs options, and every option one loss and one cost")
    if not np.isfinite([loss for layer in losses for loss in layer]).all():
        raise InputError("the losses of options are not all finite numbers")
    least = sum(min(layer) for layer in costs)
    if budget < least:
        raise InputError(
            f"a budget of {budget:,} is less than the cheapest choice costs; expected {least:,} or more"
        )
    return _solve(losses, [[cost - min(layer) for cost in layer] for layer in costs], budget - least)


def _solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> tuple[int, ...]:
    """``costs``: what an option costs more than the layer's cheapest one."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    layer_of = np.repeat(np.arange(len(losses)), [len(layer) for layer in losses])  # (options,)
    first = np.searchsorted(layer_of, np.arange(len(losses)))  # (layers,)
    # HiGHS stops at a gap of 1e-6, and losses of 1e-3 differ by less: what is lost most becomes 10,000.
    lost = np.concatenate([np.array(layer, dtype=np.float64) - min(layer) for layer in losses])
    lost *= 1e4 / max(lost.max(), 1e-300)
    flat = [cost for layer in costs for cost in layer]
    divisor = math.gcd(*flat) or 1
    one_a_layer = (np.arange(len(losses))[:, None] == layer_of[None, :]).astype(np.float64)
    weights = np.array([cost // divisor for cost in flat], dtype=np.float64)
    constraints = [
        LinearConstraint(one_a_layer, 1, 1),
        LinearConstraint(weights[None, :], -np.inf, budget // divisor),
    ]
    while True:
        found = milp(
            lost,
            integrality=np.ones(len(lost)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        assert found.success, found.message  # the cheapest choice is within the budget
        taken = np.flatnonzero(found.x > 0.5)
        if sum(flat[place] for place in taken.tolist()) <= budget:
            return tuple((taken - first).tolist())
        # Its tolerances let through what costs a little too much: anything but that.
        constraints.append(LinearConstraint(np.isin(np.arange(len(lost)), taken)[None, :], 0, len(taken) - 1))


def choose_within(
    config: PreTrainedConfig,
    measured: Replacements,
    fractions: Sequence[float],
    *,
    tokens: int | None = None,
    like: Schedule | None = None,
) -> tuple[Choice, ...]:
    """The best shape for each of ``fractions`` of what the blocks of the uncompressed backbone cost, in the
    order given: parameters, or FLOPs of a document of ``tokens`` tokens.

    ``like``: a schedule's settings besides its layers (``width_method``, of which ``measured`` had its neuron
    scores; vocabulary, ...). Fractions that no choice is cheap enough for are left out. Raises InputError
    where that is all of them.
    """
    check_plan(anatomy_of(config), measured.plan)
    whole = Plan.full(len(measured.plan.layers))
    full = count_block_parameters(config, whole) if tokens is None else flops(config, whole, tokens)
    costs = option_costs(config, measured.options, tokens=tokens)
    least = sum(min(layer) for layer in costs)
    possible = [fraction for fraction in fractions if round(fraction * full) >= least]
    if not possible:
        raise InputError(
            f"no choice of options is so cheap; the cheapest has {least / full:.4f} of the full blocks' cost"
        )
    choices = []
    for fraction in possible:
        places = solve(measured.losses, costs, round(fraction * full))
        chosen = [options[place] for options, place in zip(measured.options, places, strict=True)]
        choices.append(
            Choice(
                fraction=fraction,
                schedule=to_schedule(config, measured.plan, chosen, like=like),
                cost=sum(layer[place] for layer, place in zip(costs, places, strict=True)),
                loss=measured.loss
                + sum(layer[place] for layer, place in zip(measured.losses, places, strict=True)),
            )
        )
    return tuple(choices)


def to_schedule(
    config: PreTrainedConfig,
    plan: Plan,
    chosen: Sequence[LayerOption],
    *,
    like: Schedule | None = None,
) -> Schedule:
    """The schedule that makes each layer what was ``chosen`` for it: named layers in place of counts, and
    widths where an MLP is narrower than in ``plan``. Everything else is as in ``like``."""
    parts = zip(anatomy_of(config).layers, plan.layers, strict=True)
    present = [width(*layer) if layer[1].mlp else 0 for layer in parts]
    gone = [(not option.attention, not option.width) for option in chosen]  # its attention, its MLP

    def where(*lost: bool) -> tuple[int, ...] | int:
        return tuple(layer for layer, parts in enumerate(gone) if parts == lost) or 0

    changed: Mapping[str, object] = {
        "drop_attention": where(True, False),
        "drop_mlp": where(False, True),
        "drop_block": where(True, True),
        "drop_last_blocks": 0,
        "width_reduction": 0.0,
        "layer_widths": tuple(option.width for option in chosen)
        if any(option.width not in (0, size) for option, size in zip(chosen, present, strict=True))
        else (),
    }
    return Schedule(**{**(like or Schedule()).model_dump(), **changed})
