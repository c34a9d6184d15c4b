"""Where a search begins: with what was good before, of the same backbone or, by relative depth, of others.

A front of earlier results, or of the paper's table, is put into the terms of this search: eight sublayers of
32 blocks are four of 16. The sampler tries these first; what they score here, it learns here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from effir_ray.results import store
from effir_ray.results.pareto import non_dominated
from effir_ray.results.published import published
from effir_ray.search.candidates import Axis

if TYPE_CHECKING:
    from effir_ray.search.space import SearchSpace

PUBLISHED = "published"
"""In the place of a folder: the table of the EffiR paper."""

_BLOCKS = {
    "E5-Mistral-7B": 32,
    "Mistral-7B-v0.1": 32,
    "Llama-2-7B": 32,
    "Llama-3-8B": 32,
    "Qwen2.5-1.5B": 28,
    "Qwen2.5-3B": 36,
    "Qwen2.5-7B": 28,
    "ModernBERT-base": 22,
}
"""Of the paper's backbones, as it prints them."""

_UNITS = {"A": "drop_attention", "M": "drop_mlp", "B": "drop_block"}
_COUNTED = (*_UNITS.values(), "drop_last_blocks")
_CHANGES = (*_COUNTED, "width_reduction", "layer_widths", "vocabulary", "dimension")
_OFF_THE_SHELF = "T1-offtheshelf"  # the table whose models were not trained again
_SHARE = 0.5  # of a search's trials, at most: the rest is for the sampler to find


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A model that was measured. ``group``: what it may be compared with."""

    group: tuple[str, ...]
    settings: dict[str, Any]
    blocks: int
    ndcg: float
    parameters: float


def suggestions(space: SearchSpace, blocks: Mapping[str, int]) -> list[dict[str, Any]]:
    """Parameters of the trials to begin with, the largest models first; none without ``space.priors``.

    ``blocks``: how many each backbone has. Raises InputError for a folder without results.
    """
    found: list[dict[str, Any]] = []
    for known in _fronts(space.priors):
        for name in space.backbone_names:
            params = _in_terms_of(space, name, blocks[name], known)
            if params and params not in found:
                found.append(params)
    most = math.ceil(_SHARE * space.trials)
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[place] for place in places.tolist()]


def _fronts(sources: tuple[str, ...]) -> list[_Known]:
    """Of every group what no other of it beats in nDCG@10 and parameters, the full model left out."""
    groups: dict[tuple[str, ...], list[_Known]] = {}
    for source in sources:
        for known in _published() if source == PUBLISHED else _measured(source):
            groups.setdefault(known.group, []).append(known)
    best: list[_Known] = []
    for group in groups.values():
        costs = np.array([[-known.ndcg, known.parameters] for known in group], dtype=np.float64)
        best += [group[place] for place in np.flatnonzero(non_dominated(costs)).tolist()]
    compressed = [known for known in best if any(known.settings.get(name) for name in _CHANGES)]
    return sorted(compressed, key=lambda known: -known.parameters)


def _measured(folder: str) -> Iterator[_Known]:
    for row in store.trial_rows(store.latest(store.read(folder))):
        trial = json.loads(row.trial)
        schedule, precision = trial.get("schedule"), trial.get("precision") or "auto"
        if schedule and row.status == "ok" and row.split == "dev" and row.blocks and row.parameters:
            yield _Known(
                group=(row.study, row.backbone, row.dataset, row.sample),
                settings={**schedule, "recover": row.recovered, "precision": precision},
                blocks=row.blocks,
                ndcg=row.ndcg_at_10 or 0.0,
                parameters=row.parameters,
            )


def _published() -> Iterator[_Known]:
    for row in published().to_pylist():
        measured = row["dataset"] == "Average" and None not in (row["ndcg_at_10"], row["parameters"])
        if not measured or row["schedule"] is None or row["backbone"] not in _BLOCKS:
            continue
        yield _Known(
            group=(row["source"], row["backbone"]),
            settings=_read_name(row["schedule"]) | {"recover": row["source"] != _OFF_THE_SHELF},
            blocks=_BLOCKS[row["backbone"]],
            ndcg=row["ndcg_at_10"],
            parameters=row["parameters"],
        )


def _read_name(name: str) -> dict[str, Any]:
    """``16M8A-w30`` -> what is dropped."""
    settings: dict[str, Any] = {}
    for last, count, unit in re.findall(r"(last)?(\d+)([ABM])", name):
        settings["drop_last_blocks" if last else _UNITS[unit]] = int(count)
    if width := re.search(r"-w(\d+)", name):
        settings["width_reduction"] = int(width[1]) / 100
    return settings


def _in_terms_of(space: SearchSpace, backbone: str, blocks: int, known: _Known) -> dict[str, Any]:
    """The parameters of ``space`` that come nearest; what they do not name is left to the sampler."""
    params: dict[str, Any] = {}
    for name, axis in space.axes.items():
        if name == "backbone":
            params[name] = backbone
            continue
        value = known.settings.get(name, 0 if name in _CHANGES else None)
        if name == "layer_widths":
            value = value or ""
        elif name == "width_reduction" and known.settings.get("layer_widths"):
            value = None  # it is narrower, by no share that is known
        if isinstance(value, list):  # of a model of as many blocks the same ones
            listed = ",".join(map(str, value)) + "," * (len(value) == 1)
            other = None if name == "layer_widths" else len(value)
            value = listed if known.blocks == blocks and axis.contains(listed) else other
        if name in _COUNTED and isinstance(value, int):
            value = round(value * blocks / known.blocks)
        if (nearest := _nearest(axis, value)) is not None:
            params[name] = nearest
    return params


def _nearest(axis: Axis, value: Any) -> Any:
    """The value of ``axis`` that is nearest to a number; of what is none that which is equal, else None."""
    if value is None or axis.contains(value):
        return value
    if isinstance(value, bool | str):
        return None
    if not axis.values():
        assert axis.low is not None and axis.high is not None
        return min(max(value, axis.low), axis.high)
    numbers = [each for each in axis.values() if isinstance(each, int | float) and not isinstance(each, bool)]
    return min(numbers, key=lambda each: abs(each - value), default=None)
