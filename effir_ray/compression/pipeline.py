"""The one pipeline that compresses: measure, plan, cut.

``compress`` runs all of it in one call; a search runs the same functions as stages, so that trials share
what they have in common. Scores are measured in the type that suits the machine; the weights that are kept
stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from effir_ray import hardware
from effir_ray.compression import calibration as drawing
from effir_ray.compression.budget import Replacements, layer_options
from effir_ray.compression.depth.importance import measure_importance
from effir_ray.compression.dimension import MOST_TEXTS as MOST_EMBEDDED
from effir_ray.compression.dimension import embedding_axes, shorten
from effir_ray.compression.planning import (
    ImportanceScores,
    counted_units,
    equal_neurons,
    make_plan,
    narrow_plan,
    needs_scores,
    sized_plan,
    with_dimension,
    with_vocabulary,
    within,
)
from effir_ray.compression.replacements import measure_replacements
from effir_ray.compression.schedule import CALIBRATION, UNITS, Calibration, Schedule, Unit
from effir_ray.compression.sparsity.methods import parse_pattern
from effir_ray.compression.sparsity.sparsify import SparsityMethod, sparsify
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.uniform import narrow_to, uniform_shape
from effir_ray.compression.vocabulary import (
    MOST_TEXTS,
    check_size,
    choose_tokens,
    cut_vocabulary,
    token_counts,
)
from effir_ray.compression.width.reduction import rank_neurons
from effir_ray.config import Prompts
from effir_ray.data.pairs import Pair
from effir_ray.models.accounting import (
    alike,
    count_parameters,
    embedding_size,
    flops,
)
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.folder import RetrieverSpec
from effir_ray.models.loading import load_config, load_present, load_text_side
from effir_ray.models.ordinary import Layout, partial_blocks
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import Retriever, load_retriever

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Shares of its neurons that a layer may keep of those it has."""


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What became of a backbone. ``checkpoint`` and ``layout`` are None after a dry run, and so is ``plan``
    when the dry run needed to know only how many layers go.

    parameters: without the LM head; flops_per_document: one forward pass over ``document_tokens`` tokens;
    zeros: fraction of the block weights that sparsity set to zero (they are stored and computed like others);
    layout: whether the checkpoint is an ordinary one or brings its own modelling code, and why.
    """

    backbone: str
    schedule: str
    plan: Plan | None
    parameters: int
    full_parameters: int
    flops_per_document: int
    full_flops_per_document: int
    document_tokens: int
    zeros: float = 0.0
    checkpoint: Path | None = None
    layout: Layout | None = None


def compress(
    backbone: str,
    schedule: Schedule,
    out: Path | None,
    *,
    first_blocks: int | None = None,
    prompts: Prompts | None = None,
    calibration: Calibration = CALIBRATION,
    sparsity: str | None = None,
    sparsity_method: SparsityMethod = "wanda",
    uniform: bool = False,
) -> Compression:
    """Cut ``backbone`` to ``schedule`` and save the checkpoint in ``out``, without training what remains.

    Counts of sublayers are turned into layers by the schedule's importance criterion, neurons are ranked by
    its width method, tokens by how often they are used, embeddings of the model before it is cut projected to
    where they differ most, all on what ``calibration`` names. ``sparsity`` (``2:4`` or a fraction) then sets
    weights to zero by ``sparsity_method``, calibrated on the same documents.

    A model from which only whole blocks went, and whose MLPs have one width, is saved as an ordinary
    checkpoint of its architecture; any other brings its own modelling code. ``uniform`` rounds the plan to
    the nearest such shape: whole blocks, then one width, each as near as possible to the number of parameters
    of the plan, chosen by the same scores (see ``uniform``).

    ``prompts`` take the place of the backbone's own, and stay with the checkpoint.

    With ``out`` None nothing is trained or written and the size is that of the schedule (a dry run; weights
    are loaded only where the size depends on which layers go).

    Raises InputError for a schedule that the backbone has no room for, before anything is measured.
    """
    config = load_config(backbone, first_blocks=first_blocks)
    pattern = parse_pattern(sparsity) if sparsity else None
    present, tokens = load_present(backbone, first_blocks=first_blocks), calibration.max_length
    check_room(schedule, config, present)
    needed = needs_scores(schedule)
    if not needed and uniform:
        needed = bool(partial_blocks(depth_plan(schedule, present, None)))
    whole = present.layers == Plan.full(len(present.layers)).layers
    if out is None and (not needed or (whole and alike(config, tokens))):
        equal = equal_scores(schedule, len(present.layers))
        shape = _shape(config, schedule, present, equal, uniform=uniform)
        result = _result(backbone, config, schedule, _sized(config, schedule, shape), tokens, None)
        return replace(result, plan=None) if needed else result
    if schedule.vocabulary:
        check_size(load_text_side(backbone)[0], schedule.vocabulary)
    measured = load_to_measure(backbone, first_blocks=first_blocks)
    measured.spec = measured.spec.with_prompts(prompts)
    blocks: frozenset[Unit] = frozenset({"block"} if uniform else ())
    units = counted_units(schedule) | blocks
    scores = importance_scores(measured, schedule, calibration, units) if needed else None
    shape = _shape(config, schedule, measured.plan, scores, uniform=uniform)
    if out is None:
        return _result(backbone, config, schedule, _sized(config, schedule, shape), tokens, None)
    plan = shape.plan
    axes = principal_axes(measured, [calibration]) if schedule.dimension else None
    if schedule.narrows:
        ranks = neuron_scores(measured, plan, schedule, calibration)
        if shape.width is None:
            plan = narrow_plan(plan, schedule, ranks)
        else:
            plan = narrow_to(config, plan, shape.width, ranks)
    del measured  # its memory, before the model is loaded again as it is stored
    kept = cut(backbone, plan, first_blocks=first_blocks)
    kept.spec = kept.spec.with_prompts(prompts)
    if schedule.vocabulary:
        counts = count_tokens(kept.tokenizer, kept.spec, calibration)
        cut_vocabulary(kept, choose_tokens(kept.tokenizer, counts, schedule.vocabulary))
    if axes is not None:
        shorten(kept, axes, schedule.dimension)
    zeros = 0.0
    if pattern is not None:
        kept.model.to(hardware.detect().device)
        zeros = sparsify(kept, sparsity_method, pattern, _texts(calibration), max_length=tokens)
    layout = save_checkpoint(kept, out)
    return replace(_result(backbone, config, schedule, plan, tokens, out), zeros=zeros, layout=layout)


def load_to_measure(backbone: str | Path, *, first_blocks: int | None = None) -> Retriever:
    """The model in the type and on the device that suit this machine."""
    here = hardware.detect()
    return load_retriever(backbone, dtype=here.dtype, device=here.device, first_blocks=first_blocks)


def importance_scores(
    retriever: Retriever,
    schedule: Schedule,
    calibration: Calibration,
    units: Collection[Unit] = UNITS,
) -> ImportanceScores:
    """How much every sublayer matters by the schedule's criterion, on texts (dev-loss: on dev pairs).

    ``units``: those that are asked about, where a criterion takes its time for each.
    """
    pairs: list[Pair] = []
    if schedule.importance == "dev-loss":
        count = calibration.gates.pairs
        pairs = drawing.draw_pairs(calibration.dataset, count, calibration.seed, split="dev")
    examples = _examples(calibration)
    return measure_importance(
        retriever,
        [example.positives[0] for example in examples],
        criterion=schedule.importance,
        queries=[example.query for example in examples],
        pairs=pairs,
        max_length=calibration.max_length,
        seed=calibration.seed,
        units=units,
    )


def depth_plan(schedule: Schedule, present: Plan, scores: ImportanceScores | None) -> Plan:
    """What depth leaves of a model that has ``present``; InputError when there is no room for it."""
    return within(make_plan(schedule, len(present.layers), scores), present)


def neuron_scores(
    retriever: Retriever, plan: Plan, schedule: Schedule, calibration: Calibration
) -> dict[int, NDArray[np.floating]]:
    """Scores of the neurons that the depth ``plan`` keeps, by layer. Cuts ``retriever`` to ``plan``."""
    gates = calibration.gates
    return rank_neurons(
        apply_plan(retriever, plan),
        schedule.width_method,
        drawing.draw_pairs(calibration.dataset, gates.pairs, calibration.seed),
        steps=gates.steps,
        batch_size=gates.batch_size,
        seed=calibration.seed,
        max_length=calibration.max_length,
    )


def narrowing_losses(
    retriever: Retriever,
    plan: Plan,
    scores: Mapping[int, NDArray[np.floating]],
    calibration: Calibration,
) -> Replacements:
    """What single layers lose if they are narrower besides the depth ``plan``, by the neurons' ``scores``, on
    the calibration's texts."""
    examples = _examples(calibration)
    return measure_replacements(
        retriever,
        [example.positives[0] for example in examples],
        layer_options(retriever.model.config, plan, WIDTHS, attention=False),
        scores,
        plan=plan,
        queries=[example.query for example in examples],
        max_length=calibration.max_length,
    )


def cut(backbone: str | Path, plan: Plan, *, first_blocks: int | None = None) -> Retriever:
    """The model reduced to ``plan``, its weights in the type they are stored in."""
    return apply_plan(load_retriever(backbone, dtype="auto", first_blocks=first_blocks), plan)


def count_tokens(
    tokenizer: PreTrainedTokenizerFast, spec: RetrieverSpec, calibration: Calibration
) -> NDArray[np.int64]:
    """How often each token is in the calibration's texts, of which as many as there are count."""
    examples = _examples(calibration.model_copy(update={"texts": MOST_TEXTS}))
    return token_counts(tokenizer, spec, examples, max_length=calibration.max_length)


def principal_axes(retriever: Retriever, calibrations: Iterable[Calibration]) -> NDArray[np.float32]:
    """(d, d): the axes of ``retriever``'s embeddings, the largest first, on the texts of ``calibrations``, of
    each of which as many as there are count."""
    some = [each.model_copy(update={"texts": MOST_EMBEDDED}) for each in calibrations]
    examples = [example for each in some for example in _examples(each)]
    return embedding_axes(retriever, examples, max_length=some[0].max_length)


def _examples(calibration: Calibration) -> list[Pair]:
    source = calibration.texts_from or calibration.dataset
    return drawing.draw_examples(source, calibration.texts, calibration.seed)


def _texts(calibration: Calibration) -> list[str]:
    return [example.positives[0] for example in _examples(calibration)]


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Depth, and the one width of all MLPs where it is to be uniform."""

    plan: Plan
    width: int | None


def _shape(
    config: PreTrainedConfig,
    schedule: Schedule,
    present: Plan,
    scores: ImportanceScores | None,
    *,
    uniform: bool,
) -> _Shape:
    plan, width = depth_plan(schedule, present, scores), None
    if uniform:
        plan, width = uniform_shape(config, schedule, plan, present, scores)
    return _Shape(plan=plan, width=width)


def equal_scores(schedule: Schedule, n_layers: int) -> ImportanceScores:
    """Scores that prefer no layer: enough to know how much a schedule leaves, not what."""
    equal = (0.0,) * n_layers
    return ImportanceScores(criterion=schedule.importance, attention=equal, mlp=equal, block=equal)


def _sized(config: PreTrainedConfig, schedule: Schedule, shape: _Shape) -> Plan:
    """As wide as the schedule asks, with no say in which neurons stay."""
    plan = shape.plan
    if shape.width is not None:
        return narrow_to(config, plan, shape.width, None)
    return sized_plan(config, plan, schedule)


def check_room(schedule: Schedule, config: PreTrainedConfig, present: Plan) -> None:
    """Raise InputError when ``schedule`` removes more layers, neurons, tokens or dimensions than ``present``,
    which is what is left of the backbone ``config``. Needs no weights."""
    plan = depth_plan(schedule, present, equal_scores(schedule, config.num_hidden_layers))
    with_vocabulary(plan, schedule, config.vocab_size)
    with_dimension(plan, schedule, embedding_size(config, present))
    narrow_plan(plan, schedule, equal_neurons(config, plan))


def _result(
    backbone: str,
    config: PreTrainedConfig,
    schedule: Schedule,
    plan: Plan,
    tokens: int,
    checkpoint: Path | None,
) -> Compression:
    full = Plan.full(len(plan.layers))
    plan = with_vocabulary(plan, schedule, config.vocab_size)
    plan = plan.model_copy(update={"dimension": schedule.dimension or plan.dimension})
    return Compression(
        backbone=backbone,
        schedule=schedule.name,
        plan=plan,
        parameters=count_parameters(config, plan),
        full_parameters=count_parameters(config, full),
        flops_per_document=flops(config, plan, tokens),
        full_flops_per_document=flops(config, full, tokens),
        document_tokens=tokens,
        checkpoint=checkpoint,
    )
