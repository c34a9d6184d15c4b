"""What the model loses when one layer is replaced by less of it: the losses that a budget is divided by.

Nothing is cut: sublayers are masked and neurons silenced, which is what surgery computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from effir_ray.compression.budget import LayerOption, Options, Replacements
from effir_ray.compression.calibration import make_batches
from effir_ray.compression.depth.importance import Sums, distance, mean_over
from effir_ray.compression.depth.masking import Sublayer, masked, resumed
from effir_ray.compression.planning import NeuronScores, within
from effir_ray.compression.schedule import Unit
from effir_ray.compression.width.neurons import on_neurons, widths
from effir_ray.encoding.padded import PaddedTexts, embed
from effir_ray.errors import InputError
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever


def measure_replacements(
    retriever: Retriever,
    texts: Sequence[str],
    options: Options,
    neuron_scores: NeuronScores,
    *,
    plan: Plan | None = None,
    queries: Sequence[str] = (),
    token_budget: int = 4096,
    max_length: int | None = None,
) -> Replacements:
    """How far the final vectors of ``texts`` and ``queries`` (each with its own prompt) move, 1 - cos, when
    depth leaves ``plan`` of ``retriever``'s model and one layer becomes one of its ``options``.

    neuron_scores: layer -> one score a neuron, higher = keep: an option keeps the best of its layer, as
    ``narrow_plan`` does. Its loss is what it adds to that of ``plan`` alone: nothing, where it leaves a layer
    as it is. Every other one takes a forward from its layer on over all texts, in padded batches of
    ``token_budget`` tokens; memory does not grow with their number. The model is not changed. Raises
    InputError for options or scores that do not fit it, and without texts.
    """
    left = retriever.plan if plan is None else within(plan, retriever.plan)
    if not texts:
        raise InputError("replacing layers needs calibration texts; found none")
    orders = _orders(retriever, left, options, neuron_scores)
    documents = partial(make_batches, retriever, token_budget=token_budget, max_length=max_length)
    means = mean_over(
        partial(replaced, retriever, plan=left, options=options, orders=orders),
        chain(documents(texts), documents(queries, kind="query")),
        "Replacing layers",
    )
    base, ends = float(means[0]), np.cumsum([len(choices) for choices in options])
    losses = tuple(tuple(part.tolist()) for part in np.split(means[1:] - base, ends[:-1]))
    return Replacements(plan=left, loss=base, options=options, losses=losses)


@torch.inference_mode()
def replaced(
    retriever: Retriever,
    batch: PaddedTexts,
    *,
    plan: Plan,
    options: Options,
    orders: Mapping[int, Tensor],
) -> Sums:
    """Sums over texts of 1 - cos(vector of the full model, vector with ``plan`` and one option); totals (1 +
    options of all layers), first of ``plan`` alone. An option's forward starts at its layer: those before are
    the plan's.

    orders: layer -> (width,) places of its neurons, the best first.
    """
    inputs: dict[int, Tensor] = {}

    def keep(index: int, unit: str, before: Tensor, after: Tensor) -> None:
        if unit == "block":
            inputs[index] = before

    gone = [sublayer for layer, kept in enumerate(plan.layers) for sublayer in _sublayers(layer, kept)]
    full = embed(retriever, batch)
    with masked(retriever, gone), retriever.family.watch(retriever.model, keep):
        base = distance(full, embed(retriever, batch))
    totals = [base]
    for layer, choices in enumerate(options):
        as_it_is = LayerOption(attention=plan.layers[layer].attention, width=len(orders[layer]))
        for option in choices:
            if option == as_it_is:
                totals.append(base)
                continue
            own = [sublayer for sublayer in _sublayers(layer, option.plan) if sublayer not in gone]
            with (
                masked(retriever, [*gone, *own]),
                _best(retriever, layer, option.width, orders),
                resumed(retriever, layer, inputs[layer]),
            ):
                totals.append(distance(full, embed(retriever, batch)))
    return Sums(totals=np.array(totals), weight=len(batch))


def _best(
    retriever: Retriever, layer: int, width: int, orders: Mapping[int, Tensor]
) -> AbstractContextManager[None]:
    """Inside, all neurons of the layer but its ``width`` best are silent; of 0 the MLP itself is masked."""
    if width == 0 or width == len(orders[layer]):
        return nullcontext()
    stays = torch.zeros(len(orders[layer]), dtype=torch.bool)
    stays[orders[layer][:width]] = True
    stays = stays.to(retriever.model.device)
    return on_neurons(retriever, lambda index, neurons: neurons * stays if index == layer else None)


def _sublayers(layer: int, kept: LayerPlan) -> list[Sublayer]:
    """Those that a layer has not got."""
    there: dict[Unit, bool] = {"attention": kept.attention, "mlp": kept.mlp}
    return [(unit, layer) for unit, stays in there.items() if not stays]


def _orders(
    retriever: Retriever, plan: Plan, options: Options, neuron_scores: NeuronScores
) -> dict[int, Tensor]:
    """layer -> (width,) places of its neurons, the best first, of every MLP that ``plan`` leaves.

    Raises InputError for what does not fit the model.
    """
    if len(options) != len(plan.layers):
        raise InputError(f"options are of {len(options)} layers; the model has {len(plan.layers)}")
    present, orders = widths(retriever), {}
    for layer, (choices, kept) in enumerate(zip(options, plan.layers, strict=True)):
        if kept.mlp and kept.neurons != retriever.plan.layers[layer].neurons:
            raise InputError(f"the plan narrows layer {layer}; expected one of depth: widths are options")
        most = present[layer] if kept.mlp else 0
        for option in choices:
            if option.width > most or (option.attention and not kept.attention):
                asked, there = ("attention, " * each.attention for each in (option, kept))
                raise InputError(
                    f"an option of layer {layer} has {asked}{option.width} neurons; the plan {there}{most}"
                )
        if any(0 < option.width < most for option in choices):
            if layer not in neuron_scores or len(neuron_scores[layer]) != most:
                found = len(neuron_scores.get(layer, ()))
                raise InputError(f"layer {layer} has {most} neurons; found {found} neuron scores")
            best = np.argsort(-np.asarray(neuron_scores[layer], dtype=np.float64), kind="stable")
            orders[layer] = torch.from_numpy(best)
        else:
            orders[layer] = torch.arange(most)
    return orders
