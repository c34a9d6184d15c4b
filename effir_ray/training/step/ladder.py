"""Sub-networks that one elastic fine-tune serves. Pure data.

Depth goes along one drop order; widths are prefixes of neurons sorted by importance (Flextron, arXiv
2406.10260; MatFormer, arXiv 2310.07707). A fixed ladder of (depth, width) pairs beats random sub-sampling
(Starbucks, arXiv 2410.13230). The last is a part of all others: it is trained at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, field_validator

from effir_ray.config import Config
from effir_ray.errors import InputError
from effir_ray.models.plan import LayerPlan, Plan

BETWEEN = 2
"""Rungs that a step trains beside the largest and the smallest network."""

Layer = Annotated[int, Field(ge=0)]


class Rung(Config):
    """One sub-network: the layers whose attention or MLP it lacks, and the fraction of neurons it keeps."""

    drop_attention: tuple[Layer, ...] = ()
    drop_mlp: tuple[Layer, ...] = ()
    width: float = Field(default=1.0, gt=0, le=1)

    @field_validator("drop_attention", "drop_mlp")
    @classmethod
    def _sorted(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(layers)))

    @property
    def name(self) -> str:
        """``4M8A-w30``: the paper's notation with counts; w is the percentage of neurons removed."""
        drops = ((self.drop_mlp, "M"), (self.drop_attention, "A"))
        depth = "".join(f"{len(layers)}{unit}" for layers, unit in drops if layers)
        width = f"w{round(100 * (1 - self.width))}" if self.width < 1 else ""
        return "-".join(part for part in (depth, width) if part) or "full"

    def contains(self, other: Rung) -> bool:
        """Whether ``other`` is a sub-network of this one."""
        return (
            set(self.drop_attention) <= set(other.drop_attention)
            and set(self.drop_mlp) <= set(other.drop_mlp)
            and self.width >= other.width
        )

    def kept(self, width: int, multiple: int = 8) -> int:
        """Neurons that stay of ``width``: a multiple of ``multiple``, at least one."""
        return min(width, max(multiple, round(self.width * width / multiple) * multiple))

    def check(self, n_layers: int) -> None:
        """Raise InputError for a layer that is not there."""
        for layer in (*self.drop_attention, *self.drop_mlp):
            if layer >= n_layers:
                raise InputError(
                    f"rung {self.name} drops layer {layer}; the model has layers 0 to {n_layers - 1}"
                )

    def plan(self, widths: Sequence[int]) -> Plan:
        """The plan that extracts this rung from the elastic model; ``widths``: neurons of each layer's MLP.

        Raises InputError for a layer that is not there.
        """
        self.check(len(widths))
        return Plan(layers=tuple(self._layer(layer, width) for layer, width in enumerate(widths)))

    def _layer(self, layer: int, width: int) -> LayerPlan:
        mlp = layer not in self.drop_mlp
        narrow = mlp and self.kept(width) < width
        return LayerPlan(
            attention=layer not in self.drop_attention,
            mlp=mlp,
            neurons=tuple(range(self.kept(width))) if narrow else None,
        )


Ladder = tuple[Rung, ...]


def check_ladder(ladder: Ladder) -> Ladder:
    """``ladder`` itself; ValueError unless its rungs differ from the full model and from each other, and the
    last is a sub-network of all others."""
    for place, rung in enumerate(ladder):
        if rung == Rung():
            raise ValueError("a rung is the full model, which is trained anyway: leave it out")
        if rung in ladder[:place]:
            raise ValueError(f"rung {rung.name} is there twice")
        if not rung.contains(ladder[-1]):
            raise ValueError(
                f"rung {ladder[-1].name} is not a smaller sub-network of {rung.name}; list the smallest "
                "last, which has nothing that another lacks"
            )
    return ladder


def make_ladder(
    steps: Sequence[tuple[int, float]],
    *,
    mlp_order: Sequence[int] = (),
    attention_order: Sequence[int] = (),
) -> Ladder:
    """Rungs from (sublayers dropped, fraction of neurons kept) pairs, large to small.

    ``mlp_order`` or ``attention_order``: layers in the order in which they are dropped, least important
    first. With both, each takes its share in turn (one MLP, one attention, ...). Raises InputError when the
    last rung is no sub-network of the others, or one asks for more drops than the orders hold.
    """
    order = _interleaved(mlp_order, attention_order)
    rungs = []
    for count, width in steps:
        if count > len(order):
            raise InputError(f"a rung drops {count} sublayers; the drop order has {len(order)}")
        dropped = order[:count]
        rungs.append(
            Rung(
                drop_mlp=tuple(layer for unit, layer in dropped if unit == "mlp"),
                drop_attention=tuple(layer for unit, layer in dropped if unit == "attention"),
                width=width,
            )
        )
    try:
        return check_ladder(tuple(rungs))
    except ValueError as error:
        raise InputError(str(error)) from None


def _interleaved(mlps: Sequence[int], attentions: Sequence[int]) -> list[tuple[str, int]]:
    order: list[tuple[str, int]] = []
    for place in range(max(len(mlps), len(attentions))):
        order += [("mlp", layer) for layer in mlps[place : place + 1]]
        order += [("attention", layer) for layer in attentions[place : place + 1]]
    return order
