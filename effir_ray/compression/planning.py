"""From a schedule and scores to a plan: which sublayers go (depth), then which neurons go (width)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from effir_ray.compression.schedule import Schedule, Unit
from effir_ray.config import Config
from effir_ray.errors import InputError
from effir_ray.models.accounting import anatomy_of, check_plan, width
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NeuronScores = Mapping[int, Sequence[float] | NDArray[np.floating]]


def within(plan: Plan, present: Plan) -> Plan:
    """``plan`` for a backbone of which only ``present`` is left: what both of them keep."""
    layers = []
    for asked, there in zip(plan.layers, present.layers, strict=True):
        neurons = there.neurons if asked.neurons is None else asked.neurons
        if asked.neurons is not None and there.neurons is not None:
            neurons = tuple(sorted(set(asked.neurons) & set(there.neurons)))
        mlp = asked.mlp and there.mlp
        layers.append(
            LayerPlan(
                attention=asked.attention and there.attention, mlp=mlp, neurons=neurons if mlp else None
            )
        )
    return Plan(layers=tuple(layers), dimension=present.dimension)


def with_vocabulary(plan: Plan, schedule: Schedule, present: int) -> Plan:
    """``plan`` with as many tokens as ``schedule`` asks for; InputError for more than ``present``."""
    if not schedule.vocabulary:
        return plan
    if schedule.vocabulary > present:
        raise InputError(f"vocabulary is {schedule.vocabulary}; the backbone has {present} tokens")
    return plan.model_copy(update={"vocabulary": schedule.vocabulary})


def with_dimension(plan: Plan, schedule: Schedule, present: int) -> Plan:
    """``plan`` with embeddings as short as ``schedule`` asks for; InputError unless that is shorter than
    ``present``."""
    if not schedule.dimension:
        return plan
    if schedule.dimension >= present:
        raise InputError(
            f"dimension is {schedule.dimension}; the backbone's embeddings have {present}: expected fewer, "
            "or 0 for all of them"
        )
    return plan.model_copy(update={"dimension": schedule.dimension})


def counted_units(schedule: Schedule) -> frozenset[Unit]:
    """The units whose drop is a count, which importance has to turn into layers."""
    drops: dict[Unit, int | tuple[int, ...]] = {
        "attention": schedule.drop_attention,
        "mlp": schedule.drop_mlp,
        "block": schedule.drop_block,
    }
    return frozenset(unit for unit, drop in drops.items() if isinstance(drop, int) and drop > 0)


def needs_scores(schedule: Schedule) -> bool:
    """Whether any drop is a count."""
    return bool(counted_units(schedule))


def make_plan(schedule: Schedule, n_layers: int, scores: ImportanceScores | None) -> Plan:
    """Depth only. Order: the last blocks, whole blocks, then attention and MLP sublayers of what remains.

    ``scores`` (one a layer of the same backbone) decide counts; explicit indices need none. The best set of
    that size goes where scores have one and all of it is still there, else the layers that score least. Of
    equal scores the later layer goes, which is the more redundant one in the paper. Raises InputError when
    more is dropped than there is.
    """
    if scores is not None and len(scores.block) != n_layers:
        raise InputError(f"importance scores are for {len(scores.block)} layers; the backbone has {n_layers}")
    if schedule.drop_last_blocks > n_layers:
        raise InputError(
            f"drop_last_blocks is {schedule.drop_last_blocks}; the backbone has {n_layers} blocks"
        )
    remaining = list(range(n_layers - schedule.drop_last_blocks))
    blocks = _dropped("block", schedule.drop_block, remaining, n_layers, scores)
    remaining = [layer for layer in remaining if layer not in blocks]
    attention = _dropped("attention", schedule.drop_attention, remaining, n_layers, scores)
    mlp = _dropped("mlp", schedule.drop_mlp, remaining, n_layers, scores)
    return Plan(
        layers=tuple(
            LayerPlan(
                attention=layer in remaining and layer not in attention,
                mlp=layer in remaining and layer not in mlp,
            )
            for layer in range(n_layers)
        )
    )


def _dropped(
    unit: Unit,
    drop: int | tuple[int, ...],
    available: list[int],
    n_layers: int,
    scores: ImportanceScores | None,
) -> set[int]:
    name = f"drop_{unit}"
    if isinstance(drop, tuple):
        for layer in drop:
            if layer >= n_layers:
                raise InputError(f"{name} names layer {layer}; the backbone has layers 0 to {n_layers - 1}")
            if layer not in available:
                raise InputError(
                    f"{name} names layer {layer}, whose whole block is dropped already; name it once"
                )
        return set(drop)
    if drop > len(available):
        raise InputError(
            f"{name} is {drop}; only {len(available)} of {n_layers} layers are left to drop from"
        )
    if drop == 0:
        return set()
    if scores is None:
        raise InputError(
            f"{name} is a count ({drop}), which needs importance scores; name the layers instead"
        )
    for together in scores.best.get(unit, ()):
        if len(together) == drop and set(together) <= set(available):
            return set(together)
    values: tuple[float, ...] = getattr(scores, unit)
    least_first = sorted(available, key=lambda layer: (values[layer], -layer))
    return set(least_first[:drop])


def narrow_plan(plan: Plan, schedule: Schedule, neuron_scores: NeuronScores) -> Plan:
    """Remove ``schedule.width_reduction`` of the remaining neurons, ranked over all layers at once (section
    3.2), or all but ``schedule.layer_widths``.

    neuron_scores: layer -> one score a neuron that ``plan`` keeps, higher = keep; every kept MLP is
    listed. Each layer keeps a multiple of ``width_multiple`` (see ``grain``) neurons, at least one multiple.
    The number kept overall is the target rounded to the nearest such total, met exactly; within a layer the
    best neurons stay. Raises InputError for what does not fit the backbone.
    """
    if not schedule.narrows:
        return plan
    layers = [index for index, layer in enumerate(plan.layers) if layer.mlp]
    missing = [index for index in layers if index not in neuron_scores]
    if missing:
        raise InputError(f"no neuron scores for layers {missing}; expected every layer that keeps its MLP")
    if not layers:
        reduction = schedule.width_reduction
        given = f"width_reduction is {reduction:g}" if reduction else "there are layer_widths"
        raise InputError(f"{given} but the schedule drops every MLP")
    scores = {index: np.asarray(neuron_scores[index], dtype=np.float64) for index in layers}
    for index, values in scores.items():
        left = plan.layers[index].neurons
        if left is not None and len(values) != len(left):
            raise InputError(
                f"layer {index} has {len(values)} neuron scores; the plan keeps {len(left)} neurons"
            )
    if not all(np.isfinite(values).all() for values in scores.values()):
        raise InputError("neuron scores are not all finite; expected one number a neuron")
    multiple = grain(schedule.width_multiple, [len(values) for values in scores.values()])
    if schedule.layer_widths:
        sizes = {index: len(values) for index, values in scores.items()}
        widths = _given_widths(schedule, len(plan.layers), sizes, multiple)
    else:
        widths = _widths([scores[index] for index in layers], schedule.width_reduction, multiple)
    entries = list(plan.layers)
    for index, target in zip(layers, widths, strict=True):
        if target == len(scores[index]):
            continue
        present = entries[index].neurons or range(len(scores[index]))
        best = np.argsort(-scores[index], kind="stable")[:target]
        kept = tuple(sorted(present[place] for place in best.tolist()))
        entries[index] = entries[index].model_copy(update={"neurons": kept})
    return plan.model_copy(update={"layers": tuple(entries)})


def grain(multiple: int | None, widths: Sequence[int]) -> int:
    """What divides the widths of all MLPs (now ``widths``): ``multiple``; when None, 64 or 8.

    64 fills the tiles of a GPU's matrix products; on a small MLP it would be too coarse a step.
    """
    if multiple is not None:
        return multiple
    return 64 if all(width >= 4096 and width % 64 == 0 for width in widths) else 8


def target_width(total: int, reduction: float, multiple: int) -> int:
    """Neurons to keep of ``total``: the nearest multiple of ``multiple``."""
    return min(total, round(total * (1.0 - reduction) / multiple) * multiple)


def _given_widths(schedule: Schedule, n_layers: int, present: Mapping[int, int], multiple: int) -> list[int]:
    """Neurons that each layer of ``present`` (layer with an MLP -> neurons it has) keeps.

    Raises InputError unless there is one width a layer of the backbone, 0 exactly where no MLP is left.
    """
    given = schedule.layer_widths
    if counted := sorted(counted_units(schedule) - {"attention"}):
        raise InputError(
            f"layer_widths says which layers keep an MLP, drop_{counted[0]} only how many lose theirs: name "
            "the layers there"
        )
    if len(given) != n_layers:
        raise InputError(f"layer_widths has {len(given)} widths; the backbone has {n_layers} layers")
    for layer, asked in enumerate(given):
        found = present.get(layer, 0)
        if asked > found and not found:
            raise InputError(f"layer_widths is {asked} for layer {layer}, which has no MLP; expected 0")
        if asked > found:
            raise InputError(
                f"layer_widths is {asked} for layer {layer}, whose MLP has {found} neurons; expected no more"
            )
        if found and not asked:
            raise InputError(
                f"layer_widths is 0 for layer {layer}, whose MLP stays; name the layer in drop_mlp, or keep "
                f"{multiple} neurons or more"
            )
        if asked != found and asked % multiple:
            raise InputError(
                f"layer_widths is {asked} for layer {layer}; expected a multiple of {multiple} (see "
                f"width_multiple), or {found} to leave it"
            )
    return [given[layer] for layer in present]


def _widths(scores: list[NDArray[np.float64]], reduction: float, multiple: int) -> list[int]:
    """Neurons each layer keeps. Layers are cut into groups of ``multiple`` neurons, best first, and groups
    are ranked globally by their mean score: the ranking of the paper, on the grain that the hardware wants.
    Of equal groups every layer keeps equally many, as far as it has them.
    """
    sizes = [len(values) for values in scores]
    ragged = [size for size in sizes if size % multiple]
    if ragged:
        raise InputError(
            f"width_multiple {multiple} does not divide the MLP width {ragged[0]}; give a divisor of it"
        )
    target = target_width(sum(sizes), reduction, multiple)
    if target < multiple * len(sizes):
        raise InputError(
            f"width_reduction {reduction:g} leaves {target} neurons; {len(sizes)} MLPs need {multiple} each; "
            "lower width_reduction or width_multiple, or drop MLPs"
        )
    groups: list[tuple[float, int, int]] = []
    for layer, values in enumerate(scores):
        means = -np.sort(-values).reshape(-1, multiple).mean(axis=1)
        # The first group of a layer always stays: a layer without any neuron is a dropped MLP, asked for by
        # depth.
        later = means[1:]
        turns = np.arange(len(later)) - np.searchsorted(-later, -later)  # how many equal ones come before it
        groups += [(-mean, turn, layer) for mean, turn in zip(later.tolist(), turns.tolist(), strict=True)]
    # Best first. Layers take turns at equal ones, the earlier layer first: ties narrow all of them alike.
    groups.sort()
    widths = [multiple] * len(sizes)
    for _, _, layer in groups[: target // multiple - len(sizes)]:
        widths[layer] += multiple
    return widths


class ImportanceScores(Config):
    """One number a layer in each of three separate groups; higher means keep (paper, section 3.1).

    best: group -> the best layers to drop together, of each size, where a criterion knows. Sets of different
    sizes need not be nested, so numbers of single layers cannot say it.
    """

    criterion: str
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    block: tuple[float, ...]
    best: dict[Unit, tuple[tuple[int, ...], ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_a_layer(self) -> ImportanceScores:
        if not len(self.attention) == len(self.mlp) == len(self.block):
            raise ValueError("attention, mlp and block need one score a layer each")
        return self


def uniform_width(config: PreTrainedConfig, plan: Plan, reduction: float, multiple: int | None) -> Plan:
    """``plan`` with its width target spread evenly, for counting before any neuron was ranked.

    Sizes and FLOPs come out exactly as those of the ranked plan, which keeps the same number of neurons
    overall (all of a backbone's layers have the same width).
    """
    anatomy = anatomy_of(config)
    check_plan(anatomy, plan)
    slim = [index for index, layer in enumerate(plan.layers) if layer.mlp]
    present = [width(anatomy.layers[index], plan.layers[index]) for index in slim]
    target = target_width(sum(present), reduction, grain(multiple, present))
    layers = list(plan.layers)
    for place, index in enumerate(slim):
        share = target // len(slim) + (1 if place < target % len(slim) else 0)
        layers[index] = layers[index].model_copy(update={"neurons": tuple(range(share))})
    return plan.model_copy(update={"layers": tuple(layers)})


def sized_plan(config: PreTrainedConfig, plan: Plan, schedule: Schedule) -> Plan:
    """``plan`` as wide as ``schedule`` asks, for counting: which neurons stay is anybody's guess."""
    if schedule.width_reduction:
        return uniform_width(config, plan, schedule.width_reduction, schedule.width_multiple)
    return narrow_plan(plan, schedule, equal_neurons(config, plan))


def equal_neurons(config: PreTrainedConfig, plan: Plan) -> NeuronScores:
    """Scores that prefer no neuron: enough to know how many stay, not which."""
    parts = zip(anatomy_of(config).layers, plan.layers, strict=True)
    return {layer: np.zeros(width(*each)) for layer, each in enumerate(parts)}
