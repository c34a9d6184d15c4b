"""Compress a retriever in one call: importance, plan, neuron scores, surgery, sparsity, checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from effir_ray.compression.schedule import Schedule
from effir_ray.models.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedConfig

    from effir_ray.compression.planning import ImportanceScores
    from effir_ray.compression.sparsity.sparsity import SparsityMethod
    from effir_ray.models.ordinary import Layout
    from effir_ray.models.retriever import Retriever


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
    dataset: str = "stdlib",
    calibration_texts: int = 256,
    gate_pairs: int = 4000,
    gate_steps: int = 500,
    max_length: int = 512,
    sparsity: str | None = None,
    sparsity_method: SparsityMethod = "wanda",
    uniform: bool = False,
    seed: int = 0,
) -> Compression:
    """Cut ``backbone`` to ``schedule`` and save the checkpoint in ``out``, without training what remains.

    Counts of sublayers are turned into layers by the schedule's importance criterion on ``calibration_texts``
    documents of ``dataset`` (dev-loss: on its dev pairs); neurons are ranked on ``gate_pairs`` of its train
    pairs (``gate_steps`` steps of self-slimming). Scores are measured in the type that suits the machine; the
    weights that are kept are saved as they were. ``sparsity`` (``2:4`` or a fraction) then sets weights to
    zero by ``sparsity_method``, calibrated on the same documents.

    A model from which only whole blocks went, and whose MLPs have one width, is saved as an ordinary
    checkpoint of its architecture; any other brings its own modelling code. ``uniform`` rounds the plan to
    the nearest such shape: whole blocks, then one width, each as near as possible to the number of parameters
    of the plan, chosen by the same scores (see ``uniform``).

    With ``out`` None nothing is trained or written and the size is that of the schedule (a dry run; weights
    are loaded only where the size depends on which layers go).

    Raises InputError for a schedule that the backbone has no room for, before anything is measured.
    """
    from effir_ray.compression.planning import make_plan, narrow_plan, needs_scores, within
    from effir_ray.compression.sparsity.patterns import parse_pattern
    from effir_ray.compression.sparsity.sparsity import sparsify
    from effir_ray.compression.surgery import apply_plan
    from effir_ray.compression.uniform import narrow_to, uniform_shape
    from effir_ray.hardware import detect
    from effir_ray.models.accounting import alike
    from effir_ray.models.checkpoint import save_checkpoint
    from effir_ray.models.folder import present_plan
    from effir_ray.models.loading import load_config
    from effir_ray.models.ordinary import partial_blocks
    from effir_ray.models.retriever import load_retriever

    config = load_config(backbone, first_blocks=first_blocks)
    pattern = parse_pattern(sparsity) if sparsity else None
    check_room(schedule, config)
    present, depth = present_plan(config), config.num_hidden_layers
    needed = needs_scores(schedule)
    if not needed and uniform:
        needed = bool(partial_blocks(within(make_plan(schedule, depth, None), present)))
    if out is None and (not needed or (present == Plan.full(depth) and alike(config, max_length))):
        equal, size = _equal_scores(schedule, depth), None
        plan = within(make_plan(schedule, depth, equal), present)
        if uniform:
            plan, size = uniform_shape(config, schedule, plan, present, equal)
        sized = _sized(config, schedule, plan, size)
        result = _result(backbone, config, schedule, sized, max_length, None)
        return replace(result, plan=None) if needed else result
    hardware = detect()
    measured = load_retriever(
        backbone, dtype=hardware.dtype, device=hardware.device, first_blocks=first_blocks
    )
    data = _Data(dataset=dataset, texts=calibration_texts, pairs=gate_pairs, max_length=max_length, seed=seed)
    scores = _importance(measured, schedule, data) if needed else None
    plan, size = within(make_plan(schedule, depth, scores), measured.plan), None
    if uniform:
        plan, size = uniform_shape(config, schedule, plan, measured.plan, scores)
    if out is None:
        return _result(backbone, config, schedule, _sized(config, schedule, plan, size), max_length, None)
    if schedule.width_reduction:
        apply_plan(measured, plan)
        ranks = _neuron_scores(measured, schedule, data, gate_steps)
        plan = narrow_plan(plan, schedule, ranks) if size is None else narrow_to(config, plan, size, ranks)
    del measured  # its memory, before the model is loaded again as it is stored
    kept = apply_plan(load_retriever(backbone, dtype="auto", first_blocks=first_blocks), plan)
    zeros = 0.0
    if pattern is not None:
        kept.model.to(hardware.device)
        zeros = sparsify(kept, sparsity_method, pattern, data.draw_texts(), max_length=max_length)
    layout = save_checkpoint(kept, out)
    return replace(_result(backbone, config, schedule, plan, max_length, out), zeros=zeros, layout=layout)


def _equal_scores(schedule: Schedule, depth: int) -> ImportanceScores:
    from effir_ray.compression.planning import ImportanceScores

    equal = (0.0,) * depth
    return ImportanceScores(criterion=schedule.importance, attention=equal, mlp=equal, block=equal)


def _sized(config: PreTrainedConfig, schedule: Schedule, plan: Plan, size: int | None) -> Plan:
    """``plan`` as wide as the schedule asks (each MLP with ``size`` neurons, if given), with no say in which
    neurons stay."""
    from effir_ray.compression.planning import uniform_width
    from effir_ray.compression.uniform import narrow_to

    if size is not None:
        return narrow_to(config, plan, size, None)
    if not schedule.width_reduction:
        return plan
    return uniform_width(config, plan, schedule.width_reduction, schedule.width_multiple)


def check_room(schedule: Schedule, config: PreTrainedConfig) -> None:
    """Raise InputError when ``schedule`` removes more layers or neurons than there are. Needs no weights."""
    import numpy as np

    from effir_ray.compression.planning import make_plan, narrow_plan, within
    from effir_ray.models.accounting import anatomy_of, width
    from effir_ray.models.folder import present_plan

    scores = _equal_scores(schedule, config.num_hidden_layers)
    plan = within(make_plan(schedule, config.num_hidden_layers, scores), present_plan(config))
    if schedule.width_reduction:
        sizes = [width(*parts) for parts in zip(anatomy_of(config).layers, plan.layers, strict=True)]
        narrow_plan(plan, schedule, {layer: np.zeros(size) for layer, size in enumerate(sizes)})


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What importance and neuron scores are measured on."""

    dataset: str
    texts: int
    pairs: int
    max_length: int
    seed: int

    def draw_texts(self) -> list[str]:
        from effir_ray.compression.calibration import draw_texts
        from effir_ray.data.datasets import load_dataset

        return draw_texts(load_dataset(self.dataset), self.texts, self.seed)


def _importance(retriever: Retriever, schedule: Schedule, data: _Data) -> ImportanceScores:
    from effir_ray.compression.calibration import draw_pairs
    from effir_ray.compression.depth.importance import measure_importance

    labelled = schedule.importance == "dev-loss"
    return measure_importance(
        retriever,
        data.draw_texts(),
        criterion=schedule.importance,
        pairs=draw_pairs(data.dataset, data.pairs, data.seed, split="dev") if labelled else (),
        max_length=data.max_length,
        seed=data.seed,
    )


def _neuron_scores(
    retriever: Retriever, schedule: Schedule, data: _Data, steps: int
) -> dict[int, npt.NDArray[np.floating]]:
    from effir_ray.compression.calibration import draw_pairs
    from effir_ray.compression.width.reduction import rank_neurons

    pairs = draw_pairs(data.dataset, data.pairs, data.seed)
    return rank_neurons(
        retriever, schedule.width_method, pairs, steps=steps, seed=data.seed, max_length=data.max_length
    )


def _result(
    backbone: str,
    config: PreTrainedConfig,
    schedule: Schedule,
    plan: Plan,
    tokens: int,
    checkpoint: Path | None,
) -> Compression:
    from effir_ray.models.accounting import count_parameters, flops

    full = Plan.full(len(plan.layers))
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
