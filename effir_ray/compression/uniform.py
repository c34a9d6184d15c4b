"""Rounding a plan to the nearest ordinary shape: whole blocks and one width, for plain checkpoints.

Depth first. Whole blocks go, least important first (those that the plan drops whole before any other), as
many as bring the number of parameters nearest to that of the plan. Then, where the schedule narrows, every
MLP that is left gets the one width that brings it nearest again; in each the best neurons stay. Pure data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from effir_ray.compression.planning import ImportanceScores, NeuronScores, grain, sized_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models.accounting import anatomy_of, count_parameters, width
from effir_ray.models.ordinary import kept_blocks, partial_blocks
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def uniform_shape(
    config: PreTrainedConfig, schedule: Schedule, asked: Plan, present: Plan, scores: ImportanceScores | None
) -> tuple[Plan, int | None]:
    """Whole blocks in place of the depth plan ``asked``, and the width of their MLPs; None: as they are.

    present: what is left of the backbone ``config``. Raises InputError when no ordinary shape fits.
    """
    plan = round_to_blocks(config, asked, present, scores)
    if not schedule.narrows:
        _check_widths(config, plan)
        return plan, None
    target = count_parameters(config, sized_plan(config, asked, schedule))
    return plan, nearest_width(config, plan, target, schedule.width_multiple)


def round_to_blocks(
    config: PreTrainedConfig, plan: Plan, present: Plan, scores: ImportanceScores | None
) -> Plan:
    """``plan`` (of depth) with whole blocks only.

    present: what is left of the backbone ``config``; a block of which a part is gone cannot stay. scores are
    needed where ``partial_blocks(plan)`` has any. Raises InputError when no ordinary shape is left.
    """
    depth = len(plan.layers)
    must_go = [layer for layer in range(depth) if layer not in kept_blocks(present)]
    asked = [
        layer
        for layer, kept in enumerate(plan.layers)
        if not (kept.attention or kept.mlp) and layer not in must_go
    ]
    if partial_blocks(plan) and scores is None:
        raise InputError("a uniform shape of a plan that drops parts of blocks needs importance scores")
    importance = (0.0,) * depth if scores is None else scores.block
    others = [layer for layer in range(depth) if layer not in must_go and layer not in asked]
    order = [*must_go, *asked, *sorted(others, key=lambda layer: (importance[layer], -layer))]
    if families.get(config.model_type).first_block_differs:
        if 0 in must_go:
            raise InputError(
                "the first block is not whole and no other can replace it: no uniform shape fits"
            )
        order.remove(0)
    counts = range(len(must_go), min(len(order), depth - 1) + 1)
    if not counts:
        raise InputError("it has no whole block left: no uniform shape fits")
    target = count_parameters(config, plan)
    return min(
        (_without(present, set(order[:count])) for count in counts),
        key=lambda candidate: abs(count_parameters(config, candidate) - target),
    )


def _without(present: Plan, blocks: set[int]) -> Plan:
    gone = LayerPlan(attention=False, mlp=False)
    layers = tuple(gone if i in blocks else kept for i, kept in enumerate(present.layers))
    return present.model_copy(update={"layers": layers})


def nearest_width(config: PreTrainedConfig, plan: Plan, parameters: int, multiple: int | None) -> int:
    """The one width of all MLPs of ``plan`` (a multiple of ``multiple``, see ``planning.grain``) with which
    the model has ``parameters`` parameters as nearly as possible."""
    layers = [
        (parts, width(parts, kept))
        for parts, kept in zip(anatomy_of(config).layers, plan.layers, strict=True)
        if kept.mlp
    ]
    whole, step = count_parameters(config, plan), grain(multiple, [present for _, present in layers])

    def total(size: int) -> int:
        return whole - sum(parts.parameters_a_neuron * (present - size) for parts, present in layers)

    sizes = range(step, min(present for _, present in layers) + 1, step)
    return min(sizes, key=lambda size: abs(total(size) - parameters))


def narrow_to(config: PreTrainedConfig, plan: Plan, size: int, scores: NeuronScores | None) -> Plan:
    """Every MLP of ``plan`` with its ``size`` best neurons; without scores (only for counting) the first."""
    layers = list(plan.layers)
    for index, parts in enumerate(anatomy_of(config).layers):
        kept = layers[index]
        if not kept.mlp or width(parts, kept) == size:
            continue
        present = kept.neurons or tuple(range(parts.width))
        values = np.zeros(len(present)) if scores is None else np.asarray(scores[index], dtype=np.float64)
        best = np.argsort(-values, kind="stable")[:size]
        neurons = tuple(sorted(present[place] for place in best.tolist()))
        layers[index] = kept.model_copy(update={"neurons": neurons})
    return plan.model_copy(update={"layers": tuple(layers)})


def _check_widths(config: PreTrainedConfig, plan: Plan) -> None:
    """Raise InputError unless the MLPs that ``plan`` keeps are all as wide."""
    pairs = zip(anatomy_of(config).layers, plan.layers, strict=True)
    widths = {width(parts, kept) for parts, kept in pairs if kept.mlp}
    if len(widths) > 1:
        raise InputError(
            f"its MLPs have {min(widths)} to {max(widths)} neurons already; a uniform shape needs "
            "width_reduction to make them equal"
        )
