"""What every sublayer of a backbone weighs, costs and matters, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effir_ray.compression.analysis.similarity import LayerSimilarity
from effir_ray.compression.planning import ImportanceScores, make_plan, within
from effir_ray.compression.schedule import UNITS, Criterion, Schedule, Unit
from effir_ray.config import Config
from effir_ray.models.accounting import count_parameters, flops, model_bytes
from effir_ray.models.folder import present_plan
from effir_ray.models.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Cost = Callable[[Plan], int]


class SublayerFigures(Config):
    """``order``: 1 is dropped first in its group. Shares are fractions of the full model's."""

    criterion: Criterion
    unit: Unit
    layer: int
    importance: float
    order: int
    parameter_share: float
    query_flop_share: float
    document_flop_share: float


class SizeAtK(Config):
    """The model without the ``k`` least important sublayers of one group. FLOPs are those of one text."""

    criterion: Criterion
    unit: Unit
    k: int
    parameters: int
    parameter_ratio: float
    float32_bytes: int
    query_flops: int
    document_flops: int
    document_flop_ratio: float


class Analysis(Config):
    """Everything the page shows. ``sublayers``, ``sizes`` and ``similarities`` are also the Arrow tables; the
    last is empty where the data set has no dev queries."""

    backbone: str
    layers: int
    parameters: int
    query_tokens: int
    document_tokens: int
    query_flops: int
    document_flops: int
    calibration_texts: int
    sublayers: tuple[SublayerFigures, ...]
    sizes: tuple[SizeAtK, ...]
    similarities: tuple[LayerSimilarity, ...] = ()

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        return tuple(dict.fromkeys(row.criterion for row in self.sublayers))

    def group(self, criterion: Criterion, unit: Unit) -> list[SublayerFigures]:
        """The rows of one group, by layer."""
        return [row for row in self.sublayers if (row.criterion, row.unit) == (criterion, unit)]


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What a plan costs; ``total`` is the full model's."""

    parameters: Cost
    query_flops: Cost
    document_flops: Cost
    float32_bytes: Cost


def summarize(
    backbone: str,
    config: PreTrainedConfig,
    scores: Mapping[Criterion, ImportanceScores],
    *,
    query_tokens: int,
    document_tokens: int,
    calibration_texts: int,
    similarities: Sequence[LayerSimilarity] = (),
) -> Analysis:
    """Importance, order, shares and sizes from scores and a configuration; no weights."""
    layers = len(next(iter(scores.values())).block)
    full, present = Plan.full(layers), present_plan(config)
    # Of a compressed checkpoint only what is left of it costs anything.
    costs = _Costs(
        parameters=lambda plan: count_parameters(config, within(plan, present)),
        query_flops=lambda plan: flops(config, within(plan, present), query_tokens),
        document_flops=lambda plan: flops(config, within(plan, present), document_tokens),
        float32_bytes=lambda plan: model_bytes(config, within(plan, present)),
    )
    return Analysis(
        backbone=backbone,
        layers=layers,
        parameters=costs.parameters(full),
        query_tokens=query_tokens,
        document_tokens=document_tokens,
        query_flops=costs.query_flops(full),
        document_flops=costs.document_flops(full),
        calibration_texts=calibration_texts,
        sublayers=tuple(
            row
            for criterion, found in scores.items()
            for unit in UNITS
            for row in _sublayers(criterion, unit, found, costs)
        ),
        sizes=tuple(
            _size(criterion, unit, k, found, costs)
            for criterion, found in scores.items()
            for unit in UNITS
            for k in range(layers + 1)
        ),
        similarities=tuple(similarities),
    )


def _sublayers(
    criterion: Criterion, unit: Unit, scores: ImportanceScores, costs: _Costs
) -> list[SublayerFigures]:
    values: tuple[float, ...] = getattr(scores, unit)
    full = Plan.full(len(values))
    order = _dropping_order(unit, scores)
    rows = []
    for layer, importance in enumerate(values):
        without = _without(full, unit, layer)
        rows.append(
            SublayerFigures(
                criterion=criterion,
                unit=unit,
                layer=layer,
                importance=importance,
                order=order.index(layer) + 1,
                parameter_share=1 - costs.parameters(without) / costs.parameters(full),
                query_flop_share=1 - costs.query_flops(without) / costs.query_flops(full),
                document_flop_share=1 - costs.document_flops(without) / costs.document_flops(full),
            )
        )
    return rows


def _size(criterion: Criterion, unit: Unit, k: int, scores: ImportanceScores, costs: _Costs) -> SizeAtK:
    full = Plan.full(len(scores.block))
    plan = make_plan(Schedule.model_validate({f"drop_{unit}": k}), len(scores.block), scores)
    return SizeAtK(
        criterion=criterion,
        unit=unit,
        k=k,
        parameters=costs.parameters(plan),
        parameter_ratio=costs.parameters(plan) / costs.parameters(full),
        float32_bytes=costs.float32_bytes(plan),
        query_flops=costs.query_flops(plan),
        document_flops=costs.document_flops(plan),
        document_flop_ratio=costs.document_flops(plan) / costs.document_flops(full),
    )


def _dropping_order(unit: Unit, scores: ImportanceScores) -> list[int]:
    """Layers, first to go first: what make_plan drops at k but not at k - 1, so that ties are its own."""
    layers = len(scores.block)
    order: list[int] = []
    for k in range(1, layers + 1):
        plan = make_plan(Schedule.model_validate({f"drop_{unit}": k}), layers, scores)
        gone = [index for index, layer in enumerate(plan.layers) if not (layer.attention and layer.mlp)]
        order += [layer for layer in gone if layer not in order]
    return order


def _without(plan: Plan, unit: Unit, layer: int) -> Plan:
    layers = list(plan.layers)
    layers[layer] = LayerPlan(attention=unit == "mlp", mlp=unit == "attention")
    return Plan(layers=tuple(layers))
