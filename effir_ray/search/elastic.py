"""Which sub-networks are trained together, so that a search can score all of its schedules from one training.

A study's schedules remove up to so much depth and width; ``smallest`` is what removes the most of each.
``networks`` lie evenly between the full model and that one, depth and width apart, because a fixed set of
pairs beats sub-networks drawn at random (Starbucks, arXiv 2410.13230). Depth goes along one order of
importance and width along one order of neurons, so that what the small ones have the large ones have too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import Field

from effir_ray.compression.planning import ImportanceScores, make_plan, within
from effir_ray.compression.schedule import Drop, Schedule
from effir_ray.config import Config, says_nothing
from effir_ray.models.plan import Plan
from effir_ray.search.candidates import Axis, Candidate, Parameters
from effir_ray.training.step.ladder import Ladder, Rung

_LEVELS = 3
"""Of depth, and of width, below the full model: up to 15 networks."""


class ElasticTraining(Config):
    """``steps`` of the training of all sub-networks together; None: as many as ``recovery`` has. The rest of
    its settings is ``recovery``'s. ``shapes``: for how many budgets of parameters a solver adds the schedule
    of best widths, layer by layer; 0 measures no layers."""

    steps: int | None = Field(default=None, ge=1, le=10**9)
    shapes: int = Field(default=0, ge=0, le=1000)


class Elastic(Config):
    """Whose weights a trial begins with: a model that was trained for ``steps`` on the networks between the
    full one and the ``smallest``. ``shapes``: whether it measures what a solver finds shapes by."""

    steps: int
    smallest: Schedule
    shapes: bool = Field(default=False, exclude_if=says_nothing)


def smallest(listed: Iterable[Candidate], sampled: Parameters) -> Schedule:
    """The most that any trained candidate removes of each kind, in counts: of those ``listed``, and of those
    that a sampler finds among ``sampled``. Of vocabulary and dimension nothing.

    Raises ValueError where they do not agree on one order of sublayers, or of neurons.
    """
    found = [candidate for candidate in (*listed, *_extremes(sampled)) if candidate.recover]
    orders: dict[str, set[str]] = {
        "importance": {each.importance for each in found if _counts(each)},
        "width_method": {each.width_method for each in found if each.narrows},
    }
    for name, several in orders.items():
        if len(several) > 1:
            raise ValueError(
                f"strategy elastic trains along one order: give one {name}, "
                f"not {' and '.join(sorted(several))}"
            )
    agreed: dict[str, Any] = {name: one for name, several in orders.items() for one in several}
    return Schedule(
        drop_last_blocks=max((each.drop_last_blocks for each in found), default=0),
        drop_block=max((_count(each.drop_block) for each in found), default=0),
        drop_attention=max((_count(each.drop_attention) for each in found), default=0),
        drop_mlp=max((_count(each.drop_mlp) for each in found), default=0),
        width_reduction=max(map(_narrowed, found), default=0.0),
        **{"importance": "pooled", **agreed},
    )


def removes(schedule: Schedule) -> bool:
    """Whether it drops sublayers or narrows any."""
    return schedule.narrows or bool(schedule.drop_last_blocks) or any(map(_count, _drops(schedule)))


def _extremes(sampled: Parameters) -> Iterator[Candidate]:
    """Trained candidates at the ends of each axis, in every order that an axis gives."""
    axes = sampled.axes
    if True not in axes.pop("recover", Axis(choices=(False,))).values():
        return
    orders = {name: axes.pop(name).values() for name in ("importance", "width_method") if name in axes}
    for name, axis in axes.items():
        for value in axis.values() or (axis.low, axis.high):
            for chosen in itertools.product(*orders.values()):
                ordered = dict(zip(orders, chosen, strict=True))
                yield Candidate(**{name: value, **ordered, "recover": True}).canonical()


def _drops(schedule: Schedule) -> tuple[Drop, Drop, Drop]:
    return schedule.drop_block, schedule.drop_attention, schedule.drop_mlp


def _counts(schedule: Schedule) -> bool:
    return any(isinstance(drop, int) and drop for drop in _drops(schedule))


def _narrowed(schedule: Schedule) -> float:
    """The share of neurons that go. Of widths by layer it is that of the narrowest, measured by the widest,
    and at least half: what the backbone has is not known here."""
    left = [width for width in schedule.layer_widths if width]
    return max(0.5, 1 - min(left) / max(left)) if left else schedule.width_reduction


def _count(drop: int | tuple[int, ...]) -> int:
    return drop if isinstance(drop, int) else len(drop)


def networks(least: Schedule, present: Plan, scores: ImportanceScores | None) -> Ladder:
    """The sub-networks of a model that has ``present``, the smallest one last; ``scores``: where ``least``
    drops anything. More than there is to drop is all but one block."""
    layers = len(present.layers)
    last = min(least.drop_last_blocks, layers - 1)
    blocks = min(_count(least.drop_block), layers - last - 1)
    rest = layers - last - blocks
    depth = {
        "drop_last_blocks": last,
        "drop_block": blocks,
        "drop_attention": min(_count(least.drop_attention), rest),
        "drop_mlp": min(_count(least.drop_mlp), rest - 1),
    }
    left = within(make_plan(least.model_copy(update=depth), layers, scores), present)
    gone = [
        (there.attention and not kept.attention, there.mlp and not kept.mlp)
        for there, kept in zip(present.layers, left.layers, strict=True)
    ]
    both = [layer for layer, (attention, mlp) in enumerate(gone) if attention and mlp]
    attentions = [layer for layer, (attention, mlp) in enumerate(gone) if attention and not mlp]
    mlps = [layer for layer, (attention, mlp) in enumerate(gone) if mlp and not attention]

    def order(layer: int) -> tuple[bool, float, int]:
        """The last blocks go first, from the end; then the least important."""
        counted = layer < layers - last
        return counted, scores.block[layer] if counted and scores is not None else 0.0, -layer

    both.sort(key=order)
    if scores is not None:
        attentions.sort(key=lambda layer: (scores.attention[layer], -layer))
        mlps.sort(key=lambda layer: (scores.mlp[layer], -layer))
    shares = [level / _LEVELS for level in range(_LEVELS + 1)]
    found = []
    for deep, wide in itertools.product(shares, shares):
        whole = _first(both, deep)
        rung = Rung(
            drop_attention=(*whole, *_first(attentions, deep)),
            drop_mlp=(*whole, *_first(mlps, deep)),
            width=1.0 - wide * least.width_reduction,
        )
        if rung != Rung() and rung not in found:
            found.append(rung)
    return tuple(found)


def _first(order: list[int], share: float) -> list[int]:
    return order[: round(share * len(order))]
