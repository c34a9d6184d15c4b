"""The stages of a trial, each declared once: a new one is a declaration here, and a function that builds it.

    backbone -> base -> importance -> neurons, tokens, axes -> sorted -> elastic -> pruned, shapes
    pruned -> recovered -> embeddings -> scores
          \\-> timing
    bm25, which needs no model

Of several data sets each has its own embeddings, scores and bm25. A dry run reads these declarations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from effir_ray.compression.dimension import MOST_TEXTS as MOST_EMBEDDED
from effir_ray.compression.pipeline import WIDTHS
from effir_ray.compression.planning import needs_scores
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.vocabulary import MOST_TEXTS
from effir_ray.models.loading import load_config
from effir_ray.search.measurement_stages import (
    SHARDS,
    columns_of_bm25,
    columns_of_scores,
    columns_of_timing,
    embed_documents,
    read_scores,
    score_bm25,
    search_and_score,
    searchers,
    time_model,
)
from effir_ray.search.model_stages import (
    CHECKPOINT,
    count_tokens_of_texts,
    elastic_training,
    fine_tune,
    fit_axes,
    make_backbone,
    mean_workers,
    measure_importance,
    measure_shapes,
    prune,
    rank_neurons,
    sort_neurons,
    train_elastic,
)
from effir_ray.search.stage_graph import Cost, KeyedStage, Sources, Split, Stage, key_stages
from effir_ray.search.trial_config import TrialConfig
from effir_ray.training.config import STUDY_TEACHER, TrainConfig
from effir_ray.training.step.ladder import BETWEEN

_FULL = ("base", "backbone")  # the full model: fine-tuned, where a study does that
_MODEL = ("recovered", "pruned", *_FULL)  # the model that a trial measures
NETWORKS = BETWEEN + 2  # that an elastic step trains: the full one, the smallest, and some between
_DEPTH = {"drop_attention", "drop_mlp", "drop_block", "drop_last_blocks"}


def _importance_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    criterion = config.ordered_by.importance
    return {
        "data": sources.calibration,
        "texts": config.calibration_texts,
        "max_length": config.document_max_length,
        "criterion": criterion,
        "seed": config.seed,
        **({"pairs": config.gates.pairs, "dev": sources.dataset} if criterion == "dev-loss" else {}),
    }


def _neuron_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    depth = config.schedule if config.elastic is None else Schedule()  # one order for every depth
    return {
        "depth": depth.model_dump(mode="json", include=_DEPTH),
        "method": config.ordered_by.width_method,
        "gates": config.gates.model_dump(),
        "data": sources.dataset,
        "max_length": config.document_max_length,
        "seed": config.seed,
    }


def _pruned_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    schedule = config.schedule
    depth = schedule.model_dump(mode="json", include=_DEPTH)
    tokens = {"vocabulary": schedule.vocabulary} if schedule.vocabulary else {}
    shorter = {"dimension": schedule.dimension} if schedule.dimension else {}
    width = {"width": schedule.width_reduction, "multiple": schedule.width_multiple}
    widths = {"widths": list(schedule.layer_widths)} if schedule.layer_widths else {}
    return {"depth": depth, **width, **widths, **tokens, **shorter}


def _drawn_inputs(most: int) -> Callable[[TrialConfig, Sources, Split], dict[str, Any]]:
    """Of what looks at so many texts, drawn where every data set counts."""

    def inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
        several = config.datasets and not config.calibration_from
        return {
            "data": list(sources.datasets.values()) if several else sources.calibration,
            "texts": most,
            "max_length": config.document_max_length,
            "seed": config.seed,
        }

    return inputs


def _recovery_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    """``sources`` may be those of the whole study, which stops no training on the way and has one seed."""
    return _with_seed(sources.trainings["recovery"], config.recovery)


def _elastic_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    assert config.elastic is not None
    return {
        **_with_seed(sources.trainings["recovery"], elastic_training(config)),
        "smallest": config.elastic.smallest.model_dump(mode="json"),
    }


def _base_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    return _with_seed(sources.trainings["base_training"], config.base_training)


def _with_seed(identity: Mapping[str, Any], training: TrainConfig | None) -> dict[str, Any]:
    assert training is not None
    changed = {"seed": training.seed, "steps": training.steps, "stop_after": training.stop_after}
    settings = {**identity["settings"], **changed}
    if training.stop_after is None:
        del settings["stop_after"]
    return {**identity, "settings": settings}


def _sample_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    return {
        "data": sources.dataset,
        "split": split,
        "sample": getattr(config, split).model_dump(),
        "seed": config.sample_seed,
    }


def _timing_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    lengths = {"query": config.query_max_length, "document": config.document_max_length}
    dev = _sample_inputs(config, sources, "dev")
    return dev | {"lengths": lengths, "timing": config.timing.model_dump(), **_served(config)}


def _served(config: TrialConfig) -> dict[str, Any]:
    """What texts are embedded in, where the machine does not choose it."""
    return {"precision": config.precision} if config.precision else {}


def _learns_from_base(config: TrialConfig) -> bool:
    return config.recovery is not None and config.recovery.distillation.teacher == STUDY_TEACHER


def _finds_shapes(config: TrialConfig) -> bool:
    """Before a trial trains: once for all of its depth, but those whose widths are found already."""
    begun = config.recovery is not None and config.recovery.stop_after == 0
    free = begun and not config.schedule.layer_widths
    return free and config.elastic is not None and config.elastic.shapes


def _narrowed_tokens(config: TrialConfig) -> float:
    """Each width of each layer, from there on: half of the model."""
    layers: int = load_config(config.backbone, first_blocks=config.first_blocks).num_hidden_layers
    return 0.5 * len(WIDTHS) * layers * config.calibration_texts * _lengths(config)


def _training_tokens(training: TrainConfig | None) -> float:
    if training is None:
        return 0.0
    lengths = training.query_max_length + training.document_max_length * (1 + training.hard_negatives)
    return 3.0 * (training.stop_after or training.steps or 100) * training.batch_size * lengths


def _lengths(config: TrialConfig) -> int:
    return config.query_max_length + config.document_max_length


def _always(config: TrialConfig) -> bool:
    return True


def _one_worker(config: TrialConfig) -> bool:
    return config.encoding_workers == 1


STAGES: tuple[Stage, ...] = (
    Stage(
        name="backbone",
        title="preparing the backbone",
        build=make_backbone,
        version=2,
        inputs=lambda config, sources, split: {
            "backbone": sources.backbone,
            "first_blocks": config.first_blocks,
            **({} if config.prompts is None else {"prompts": config.prompts.model_dump()}),
        },
        shared=True,
    ),
    Stage(
        name="base",
        title="fine-tuning the full model",
        build=fine_tune(lambda config: config.base_training),
        inputs=_base_inputs,
        parents={"model": ("backbone",)},
        needed=lambda config: config.base_training is not None,
        computed_on="device",
        workers=mean_workers(lambda config: config.base_training),
        resumable=True,
        shared=True,
        cost=Cost(
            start_seconds=30.0,  # Ray Train's workers
            tokens=lambda config: _training_tokens(config.base_training),
            full_model=True,
        ),
    ),
    Stage(
        name="importance",
        title="measuring importance",
        build=measure_importance,
        version=2,
        inputs=_importance_inputs,
        parents={"model": _FULL},
        needed=lambda config: needs_scores(config.ordered_by),
        on_device=_always,
        computed_on="device",
        shared=True,
        cost=Cost(
            tokens=lambda config: config.calibration_texts * config.document_max_length, full_model=True
        ),
    ),
    Stage(
        name="neurons",
        title="ranking neurons",
        build=rank_neurons,
        inputs=_neuron_inputs,
        parents={"model": _FULL, "importance": ("importance",)},
        asked=lambda config, role: role != "importance" or config.elastic is None,
        needed=lambda config: config.ordered_by.narrows,
        on_device=_always,
        computed_on="device",
        shared=True,
        cost=Cost(
            tokens=lambda config: 3.0 * config.gates.steps * config.gates.batch_size * _lengths(config)
        ),
    ),
    Stage(
        name="tokens",
        title="counting tokens",
        build=count_tokens_of_texts,
        inputs=_drawn_inputs(MOST_TEXTS),
        parents={"model": ("backbone",)},  # training leaves the tokenizer as it is
        needed=lambda config: config.schedule.vocabulary > 0,
        shared=True,
    ),
    Stage(
        name="axes",
        title="fitting shorter embeddings",
        build=fit_axes,
        inputs=_drawn_inputs(MOST_EMBEDDED),
        parents={"model": _FULL},
        needed=lambda config: config.schedule.dimension > 0,
        on_device=_always,
        computed_on="device",
        shared=True,
        cost=Cost(tokens=lambda config: 2.0 * MOST_EMBEDDED * config.document_max_length, full_model=True),
    ),
    Stage(
        name="sorted",
        title="sorting neurons",
        build=sort_neurons,
        inputs=lambda config, sources, split: {},
        parents={"model": _FULL, "neurons": ("neurons",)},
        needed=lambda config: config.elastic is not None and config.elastic.smallest.narrows,
        shared=True,
        bulk=CHECKPOINT,
    ),
    Stage(
        name="elastic",
        title="fine-tuning all sub-networks",
        build=train_elastic,
        inputs=_elastic_inputs,
        parents={"model": ("sorted", *_FULL), "importance": ("importance",), "teacher": _FULL},
        asked=lambda config, role: role != "teacher" or _learns_from_base(config),
        needed=lambda config: config.elastic is not None,
        computed_on="device",
        workers=mean_workers(elastic_training),
        resumable=True,
        shared=True,
        bulk=CHECKPOINT,
        cost=Cost(
            start_seconds=30.0,
            tokens=lambda config: NETWORKS * _training_tokens(elastic_training(config)),
            full_model=True,
        ),
    ),
    Stage(
        name="shapes",
        title="narrowing single layers",
        build=measure_shapes,
        inputs=lambda config, sources, split: {
            **_importance_inputs(config, sources, split),
            "depth": config.schedule.model_dump(mode="json", include=_DEPTH),
            "widths": WIDTHS,
        },
        parents={"model": ("elastic",), "importance": ("importance",), "neurons": ("neurons",)},
        needed=_finds_shapes,
        on_device=_always,
        computed_on="device",
        columns=lambda task: {},  # an end: nothing of the trial is made of it
        shared=True,
        cost=Cost(tokens=_narrowed_tokens),
    ),
    Stage(
        name="pruned",
        title="pruning",
        build=prune,
        version=2,
        inputs=_pruned_inputs,
        parents={
            "model": ("elastic", *_FULL),
            "importance": ("importance",),
            "neurons": ("neurons",),
            "tokens": ("tokens",),
            "axes": ("axes",),
        },
        needed=lambda config: config.schedule != Schedule(),
        bulk=CHECKPOINT,
    ),
    Stage(
        name="recovered",
        title="fine-tuning the pruned model",
        build=fine_tune(lambda config: config.recovery),
        inputs=_recovery_inputs,
        parents={"model": ("pruned", *_FULL), "teacher": _FULL},
        asked=lambda config, role: role != "teacher" or _learns_from_base(config),
        needed=lambda config: config.recovery is not None and config.recovery.stop_after != 0,
        computed_on="device",
        workers=mean_workers(lambda config: config.recovery),
        resumable=True,
        bulk=CHECKPOINT,
        cost=Cost(start_seconds=30.0, tokens=lambda config: _training_tokens(config.recovery)),
    ),
    Stage(
        name="embeddings",
        title="encoding documents",
        build=embed_documents,
        inputs=lambda config, sources, split: {
            **_sample_inputs(config, sources, split),
            "max_length": config.document_max_length,
            **_served(config),
        },
        parents={"model": _MODEL},
        each_dataset=True,
        on_device=_one_worker,  # several are Ray Data's, which reserves theirs
        computed_on="device",
        workers=lambda task: task.config.encoding_workers,
        resumable=True,
        bulk=SHARDS,
        cost=Cost(
            tokens=lambda config: (config.dev.documents or 10_000) * config.document_max_length,
        ),
    ),
    Stage(
        name="scores",
        title="searching and scoring",
        build=search_and_score,
        version=3,
        columns=columns_of_scores,
        query_scores=lambda task: read_scores(task).per_query,
        inputs=lambda config, sources, split: {"max_length": config.query_max_length, **_served(config)},
        parents={"model": _MODEL, "embeddings": ("embeddings",)},
        each_dataset=True,
        on_device=_one_worker,
        computed_on="device",
        workers=searchers,
        cost=Cost(tokens=lambda config: (config.dev.queries or 1_000) * config.query_max_length),
    ),
    Stage(
        name="bm25",
        title="scoring BM25",
        build=score_bm25,
        columns=columns_of_bm25,
        inputs=_sample_inputs,
        shared=True,
        each_dataset=True,
        cost=Cost(start_seconds=5.0),
    ),
    Stage(
        name="timing",
        title="measuring speed",
        build=time_model,
        version=3,
        columns=columns_of_timing,
        inputs=_timing_inputs,
        parents={"model": ("pruned", *_FULL), "reference": _FULL},  # training changes no speed
        on_device=_always,
        computed_on="machine",
        exclusive=True,
        cost=Cost(
            tokens=lambda config: (
                2.0
                * config.timing.rounds
                * max(config.timing.documents, config.timing.queries)
                * _lengths(config)
            )
        ),
    ),
)
"""Parents before those that read them."""


def trial_stages(config: TrialConfig, sources: Sources, split: Split) -> list[KeyedStage]:
    """The stages of one trial on one split, in an order in which they can run."""
    return key_stages(STAGES, config, sources, split)


def titles() -> Mapping[str, str]:
    """Stage name -> what the display calls it."""
    return {stage.name: stage.title for stage in STAGES}
