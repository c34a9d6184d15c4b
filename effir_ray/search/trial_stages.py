"""The stages of a trial, each declared once; a new stage is a declaration in this file and nothing else.

    backbone -> base -> importance -> neurons, tokens, axes -> pruned -> recovered -> embeddings -> scores
                                                                                  \\-> timing
    bm25, which needs no model

Of several data sets each has its own embeddings, scores and bm25. A stage reads the folders of its parents
and writes its own. Model folders hold ``checkpoint`` and ``plan.json``. Ray is imported where it is used: a
dry run reads these declarations without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effir_ray import hardware
from effir_ray.cluster.devices import on_device
from effir_ray.compression.dimension import MOST_TEXTS as MOST_EMBEDDED
from effir_ray.compression.dimension import shorten
from effir_ray.compression.pipeline import (
    count_tokens,
    cut,
    depth_plan,
    importance_scores,
    load_to_measure,
    neuron_scores,
    principal_axes,
)
from effir_ray.compression.planning import (
    ImportanceScores,
    narrow_plan,
    needs_scores,
    with_dimension,
    with_vocabulary,
)
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.vocabulary import MOST_TEXTS, choose_tokens, cut_vocabulary
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.embedding_shards import CorpusEmbeddings, ShardFolder
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError, TrialFailure
from effir_ray.evaluation.bm25 import bm25_scores
from effir_ray.evaluation.corpus_search import search_corpus
from effir_ray.evaluation.efficiency import FEWEST_ROUNDS, MARGIN, isotropy, measure_efficiency
from effir_ray.evaluation.metrics import Run, Scores, score_run
from effir_ray.evaluation.rows import score_columns, size_columns
from effir_ray.hardware import Precision
from effir_ray.models import accounting, folder
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_config, load_text_side
from effir_ray.models.names import resolve
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.readers import read_json
from effir_ray.search.space import TrialConfig
from effir_ray.search.stage_graph import Cost, KeyedStage, Sources, Split, Stage, StageTask, key_stages
from effir_ray.stages import StageStore
from effir_ray.training.config import STATE, STUDY_TEACHER, TrainConfig

CHECKPOINT = "checkpoint"
PLAN = "plan.json"
IMPORTANCE = "importance.json"
NEURONS = "neurons.npz"
TOKENS = "tokens.npy"
AXES = "axes.npy"
SHARDS = "shards"
SCORES = "scores.json"
ISOTROPY = "isotropy.json"
BM25 = "bm25.json"
TIMING = "timing.json"

SEARCHED_A_WORKER = 2**30
"""Bytes of embeddings from which on one more worker is worth its start."""

_FULL = ("base", "backbone")  # the full model: fine-tuned, where a study does that
_MODEL = ("recovered", "pruned", *_FULL)  # the model that a trial measures
_TRAININGS = {"base": "base_training", "recovered": "recovery"}  # stage -> field of its settings
_DEPTH = {"drop_attention", "drop_mlp", "drop_block", "drop_last_blocks"}


def settle(config: TrialConfig) -> None:
    """What sums and draws depend on besides a stage's own inputs, in whatever process computes."""
    torch.set_num_threads(config.threads or hardware.available_cores())
    torch.manual_seed(config.seed)


# -- models -------------------------------------------------------------------------------------------


def _backbone(task: StageTask) -> None:
    """The uncompressed model as a checkpoint folder; a folder that is used whole is linked, not read."""
    name, first_blocks = task.config.backbone, task.config.first_blocks
    source = resolve(name)
    prompts = task.config.prompts
    if source.kind == "folder" and source.path is not None and first_blocks is None and prompts is None:
        (task.out / CHECKPOINT).symlink_to(source.path.resolve(), target_is_directory=True)
        _write_plan(task.out, folder.read_plan(source.path, load_config(name)))
        return
    retriever = load_retriever(name, dtype="auto", first_blocks=first_blocks)
    retriever.spec = retriever.spec.with_prompts(prompts)
    save_checkpoint(retriever, task.out / CHECKPOINT)
    _write_plan(task.out, retriever.plan)


def _train(choose: Callable[[TrialConfig], TrainConfig | None]) -> Callable[[StageTask], None]:
    """Fine-tuning of the parent with the settings that ``choose`` takes from a trial; the study's full model,
    where it is the teacher, is another parent."""

    def build(task: StageTask) -> None:
        from effir_ray.training.run.launcher import train

        training = choose(task.config)
        assert training is not None
        if "teacher" in task.parents:
            training = _taught_by(training, task.parent("teacher") / CHECKPOINT)
        if task.store.remote and training.storage_path is None:  # workers of other machines reach it
            training = training.model_copy(update={"storage_path": task.store.checkpoints})
        train(
            task.parent("model") / CHECKPOINT,
            training,
            task.out,
            stages=task.store,
            begun=_begun(task),
        )
        _write_plan(task.out, read_plan(task.parent("model")))

    return build


def _mean_workers(choose: Callable[[TrialConfig], TrainConfig | None]) -> Callable[[StageTask], float]:
    """Of a training with those settings, over the seconds of its steps; a run's start and end count alike."""

    def workers(task: StageTask) -> float:
        training = choose(task.config)
        assert training is not None
        if isinstance(training.workers, int):
            return training.workers
        steps = _steps(task.out.joinpath)
        return float(np.average([row["workers"] for row in steps], weights=[row["seconds"] for row in steps]))

    return workers


def training_workers(stages: Sequence[KeyedStage], store: StageStore) -> dict[str, list[tuple[int, int]]]:
    """Training of a trial with these ``stages`` -> (first step, workers) of each part that ran with another
    number of workers than the one before. Of a training that older code did nothing is known.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for keyed in stages:
        if keyed.name not in _TRAININGS:
            continue
        parts: list[tuple[int, int]] = []
        for row in _steps(partial(store.small, keyed.path(store))):
            if not parts or parts[-1][1] != row["workers"]:
                parts.append((row["step"], row["workers"]))
        if parts:
            found[_TRAININGS[keyed.name]] = parts
    return found


def _steps(find: Callable[[str], Path]) -> list[dict[str, Any]]:
    """The rows of a training whose files ``find`` finds, where they say how many workers there were."""
    from effir_ray.training.run.history import HISTORY, read_history

    return [row for row in read_history(find(HISTORY)) if "workers" in row]


def _begun(task: StageTask) -> Path | None:
    """The longest part of the same training that another trial did and that can be gone on from."""
    longest, found = 0, None
    for place, other in task.store.finished("recovered"):
        settings = task.inputs["settings"]
        wanted = settings.get("stop_after") or settings["steps"]
        steps = other["settings"].get("stop_after", 0)
        same = other == {**task.inputs, "settings": settings | {"stop_after": steps}}
        if same and longest < steps < wanted and task.store.holds(place, STATE):
            longest, found = steps, place
    return found and task.store.bring(found)


def _taught_by(training: TrainConfig, teacher: Path) -> TrainConfig:
    distillation = training.distillation.model_copy(update={"teacher": str(teacher)})
    return training.model_copy(update={"distillation": distillation})


def _importance(task: StageTask) -> None:
    model = load_to_measure(task.parent("model") / CHECKPOINT)
    scores = importance_scores(model, task.config.schedule, task.config.calibration)
    (task.out / IMPORTANCE).write_text(scores.model_dump_json())


def _neurons(task: StageTask) -> None:
    """Scores of the intermediate neurons of the model at this depth, from which every width is cut."""
    model = load_to_measure(task.parent("model") / CHECKPOINT)
    plan = _depth_plan(task)
    scores = neuron_scores(model, plan, task.config.schedule, task.config.calibration)
    arrays: dict[str, Any] = {str(layer): values for layer, values in scores.items()}
    np.savez(task.out / NEURONS, **arrays)


def _tokens(task: StageTask) -> None:
    """How often each token is in the texts that are calibrated on, or in those of every data set."""
    tokenizer, spec = load_text_side(task.parent("model") / CHECKPOINT)
    each = _calibrations(task.config)
    np.save(task.out / TOKENS, sum(count_tokens(tokenizer, spec, one) for one in each))


def _axes(task: StageTask) -> None:
    """All axes of the full model's embeddings on those texts: every dimension takes the first of them."""
    model = load_to_measure(task.parent("model") / CHECKPOINT)
    np.save(task.out / AXES, principal_axes(model, _calibrations(task.config)))


def _calibrations(config: TrialConfig) -> list[Calibration]:
    calibration = config.calibration
    names = (calibration.dataset,) if calibration.texts_from else config.dataset_names
    return [calibration.model_copy(update={"dataset": name}) for name in names]


def _pruned(task: StageTask) -> None:
    plan = _depth_plan(task)
    if "neurons" in task.parents:
        with np.load(task.parent("neurons") / NEURONS) as file:
            ranked = {int(layer): file[layer] for layer in file.files}
        with _only_this_trial():
            plan = narrow_plan(plan, task.config.schedule, ranked)
    model = cut(task.parent("model") / CHECKPOINT, plan)
    if "tokens" in task.parents:
        counts, schedule = np.load(task.parent("tokens") / TOKENS), task.config.schedule
        with _only_this_trial():
            plan = with_vocabulary(plan, schedule, model.model.config.vocab_size)
            cut_vocabulary(model, choose_tokens(model.tokenizer, counts, schedule.vocabulary))
    if "axes" in task.parents:
        axes, schedule = np.load(task.parent("axes") / AXES), task.config.schedule
        with _only_this_trial():
            plan = with_dimension(plan, schedule, model.dimension)
        shorten(model, axes, schedule.dimension)
    save_checkpoint(model, task.out / CHECKPOINT)
    _write_plan(task.out, plan)


def _depth_plan(task: StageTask) -> Plan:
    scores = None
    if "importance" in task.parents:
        scores = ImportanceScores.model_validate_json((task.parent("importance") / IMPORTANCE).read_text())
    with _only_this_trial():
        return depth_plan(task.config.schedule, read_plan(task.parent("model")), scores)


@contextmanager
def _only_this_trial() -> Iterator[None]:
    """A schedule that its own measurements do not fit is no reason to end the study."""
    try:
        yield
    except InputError as error:
        raise TrialFailure(str(error)) from None


def _write_plan(out: Path, plan: Plan) -> None:
    (out / PLAN).write_text(plan.model_dump_json())


def read_plan(model: Path) -> Plan:
    """The plan of a model stage's folder."""
    return Plan.model_validate_json((model / PLAN).read_text())


def _plan_of(task: StageTask, model: Path) -> Plan:
    """The same where the model itself need not be on this machine."""
    return Plan.model_validate_json(task.store.small(model, PLAN).read_text())


# -- measurements -------------------------------------------------------------------------------------


def _embeddings(task: StageTask) -> None:
    from effir_ray.encoding.corpus_encoding import encode_corpus

    several = task.config.encoding_workers > 1
    encode_corpus(
        task.parent("model") / CHECKPOINT,
        _sampled(task.config, task.split),
        task.store.target(task.out, SHARDS) if several else task.out / SHARDS,
        workers=task.config.encoding_workers,
        max_length=task.config.document_max_length,
        precision=task.config.precision,
        stages=task.store,
        held=task.store.lease_of(task.out),
    )


def _scores(task: StageTask) -> None:
    """Encode the queries, search the embedded corpus exactly, score.

    Large embeddings are searched by several workers, which have the GPUs to themselves meanwhile: the
    queries' was given back. The ranking is the same bit for bit.
    """
    workers = _searchers(task)
    if workers == 1:
        run, spread = on_device(_ranking, task, _query_vectors, 1).value
    else:
        vectors = on_device(_query_vectors, task).value
        run, spread = _ranking(task, lambda task: vectors, workers)
    scores = score_run(run, _sampled(task.config, task.split).qrels(task.split))
    (task.out / ISOTROPY).write_text(json.dumps(spread))
    (task.out / SCORES).write_text(json.dumps(asdict(scores), indent=1))


def _searchers(task: StageTask) -> int:
    """How many workers search: at most as many as encode."""
    if task.config.encoding_workers == 1:
        return 1
    size = task.store.bytes_of(task.parents["embeddings"], SHARDS)
    return min(task.config.encoding_workers, 1 + size // SEARCHED_A_WORKER)


def _ranking(
    task: StageTask, vectors: Callable[[StageTask], npt.NDArray[np.float32]], workers: int
) -> tuple[Run, float | None]:
    """What the queries of ``vectors(task)`` find, and the isotropy of what they search."""
    queries = list(_sampled(task.config, task.split).queries(task.split))
    several = task.config.encoding_workers > 1  # who wrote them where all machines read them
    place = task.store.target(task.parents["embeddings"], SHARDS) if several else None
    embedded = CorpusEmbeddings(ShardFolder(place or task.parent("embeddings") / SHARDS))
    run = search_corpus(queries, vectors(task), embedded, workers=min(workers, embedded.encoding.shards))
    return run, isotropy(embedded.shards()) if len(embedded) > 1 else None


def _query_vectors(task: StageTask) -> npt.NDArray[np.float32]:
    """(queries, d), in the data set's order."""
    settle(task.config)
    queries = _sampled(task.config, task.split).queries(task.split)
    encoder = Encoder(load_to_measure(task.parent("model") / CHECKPOINT), precision=task.config.precision)
    length = task.config.query_max_length
    return encoder.encode(list(queries.values()), "query", max_length=length, progress="Encoding queries")


def _read_scores(task: StageTask) -> Scores:
    return Scores(**read_json(task.out / SCORES))


def _score_columns(task: StageTask) -> dict[str, Any]:
    config = task.config
    backbone = load_config(config.backbone, first_blocks=config.first_blocks)
    model = task.parents["model"]  # which need not be on this machine
    return {
        **score_columns(_read_scores(task)),
        "isotropy": read_json(task.out / ISOTROPY),
        **size_columns(backbone, _plan_of(task, model), document_tokens=config.document_max_length),
        "model": (model / CHECKPOINT).relative_to(task.store.root.parent).as_posix(),
    }


def _bm25(task: StageTask) -> None:
    scores = bm25_scores(_sampled(task.config, task.split), task.split)
    (task.out / BM25).write_text(json.dumps(scores.mean, indent=1))


def _bm25_columns(task: StageTask) -> dict[str, Any]:
    return {"bm25_ndcg_at_10": read_json(task.out / BM25)["ndcg@10"]}


def _timing(task: StageTask) -> None:
    """The speed of this model's shape, which is measured once for all models that have it, beside the full
    model's own, which computes in what the machine chooses."""
    record = _speed(task, task.parent("model"), task.config.precision)
    full = _speed(task, task.parent("reference"), None)
    (task.out / TIMING).write_text(json.dumps(record | {"full": full}, indent=1))


def _speed(task: StageTask, model: Path, precision: Precision | None) -> dict[str, Any]:
    """Of the model and of the full one, taking turns on the same texts in the same process; what was measured
    of a model of this shape before, where one was."""
    config, here, reference = task.config, hardware.detect(), task.parent("reference")
    shape, full = _shape(config, model, precision), _shape(config, reference, None)
    dataset = _sampled(config, "dev")

    def build(out: Path) -> None:
        models = {"full": Encoder(load_to_measure(reference / CHECKPOINT))}
        if shape != full:
            models["trial"] = Encoder(load_to_measure(model / CHECKPOINT), precision=precision)
        measured = measure_efficiency(
            models,
            list(dataset.queries("dev").values())[: config.timing.queries],
            dataset.corpus.texts(dataset.corpus.ids[: config.timing.documents]),
            rounds=config.timing.rounds,
            margin=MARGIN,
            reference="full",
            query_max_length=config.query_max_length,
            document_max_length=config.document_max_length,
        )
        figures = measured[list(models)[-1]].model_dump()
        record = {"hardware": here.name, "dtype": figures["precision"], **figures}
        (out / TIMING).write_text(json.dumps(record, indent=1))

    inputs = {
        "shape": shape,
        "full": reference.name,
        "machine": [here.name, here.device, here.precision],
        "threads": torch.get_num_threads(),
        "data": dataset.fingerprint,
        "lengths": {"query": config.query_max_length, "document": config.document_max_length},
        "timing": config.timing.model_dump(),
    }
    place = task.store.run("speed", inputs, build)
    found: dict[str, Any] = read_json(place / TIMING)
    return found


def _shape(config: TrialConfig, model: Path, precision: Precision | None) -> list[Any]:
    """What the speed of a model depends on besides its backbone: what each block that is left computes, not
    which one it was, and in what."""
    backbone = load_config(config.backbone, first_blocks=config.first_blocks)
    plan = read_plan(model)
    blocks = zip(accounting.anatomy_of(backbone).layers, plan.layers, strict=True)
    layers: list[Any] = [
        [layer.attention_parameters, layer.window] * kept.attention
        + [layer.parameters_a_neuron, accounting.width(layer, kept)] * kept.mlp
        for layer, kept in blocks
        if kept.attention or kept.mlp
    ]
    tokens = [] if plan.vocabulary is None else [{"vocabulary": plan.vocabulary}]
    return [*layers, *tokens, *([{"precision": precision}] if precision else [])]


def _timing_columns(task: StageTask) -> dict[str, Any]:
    """Speeds, the machine that had them, and the size of the weights as they were in its memory.

    Times are the full model's, which were measured once, divided by the speed-ups, so that they agree with
    them; the 95th percentile keeps its ratio to the median.
    """
    timing = read_json(task.out / TIMING)
    full = timing["full"]
    backbone = load_config(task.config.backbone, first_blocks=task.config.first_blocks)
    interval = timing["document_speedup_interval"] if timing["rounds"] >= FEWEST_ROUNDS else (None, None)
    query_ms = full["query_ms_p50"] / timing["query_speedup"]
    return {
        "bytes": accounting.model_bytes(backbone, _plan_of(task, task.parents["model"]), timing["dtype"]),
        "document_speedup_low": interval[0],
        "document_speedup_high": interval[1],
        "document_ms": full["document_ms"] / timing["document_speedup"],
        "tokens_per_s": full["tokens_per_s"] * timing["document_speedup"],
        "query_ms": query_ms,
        "query_ms_p95": query_ms * timing["query_ms_p95"] / timing["query_ms_p50"],
        **{name: timing[name] for name in _AS_TIMED},
    }


_AS_TIMED = ("document_speedup", "query_speedup", "mfu", "peak_memory_bytes", "hardware", "other_load")


def _sampled(config: TrialConfig, split: Split) -> Dataset:
    """The part of ``split`` that the study uses."""
    dataset, sample = load_dataset(config.dataset), getattr(config, split)
    if sample.queries is None:
        return dataset
    return dataset.sample(split, queries=sample.queries, documents=sample.documents, seed=config.sample_seed)


# -- what determines them, and what they cost ---------------------------------------------------------


def _importance_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    criterion = config.schedule.importance
    return {
        "data": sources.calibration,
        "texts": config.calibration_texts,
        "max_length": config.document_max_length,
        "criterion": criterion,
        "seed": config.seed,
        **({"pairs": config.gates.pairs, "dev": sources.dataset} if criterion == "dev-loss" else {}),
    }


def _neuron_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    return {
        "depth": config.schedule.model_dump(mode="json", include=_DEPTH),
        "method": config.schedule.width_method,
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
    return {"depth": depth, **width, **tokens, **shorter}


def _calibration_data(config: TrialConfig, sources: Sources) -> Any:
    """What texts are drawn from where every data set counts."""
    several = config.datasets and not config.calibration_from
    return list(sources.datasets.values()) if several else sources.calibration


def _recovery_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    """``sources`` may be those of the whole study, which stops no training on the way and has one seed."""
    return _with_seed(sources.trainings["recovery"], config.recovery)


def _base_inputs(config: TrialConfig, sources: Sources, split: Split) -> dict[str, Any]:
    return _with_seed(sources.trainings["base_training"], config.base_training)


def _with_seed(identity: Mapping[str, Any], training: TrainConfig | None) -> dict[str, Any]:
    assert training is not None
    stopped = {} if training.stop_after is None else {"stop_after": training.stop_after}
    return {**identity, "settings": {**identity["settings"], "seed": training.seed, **stopped}}


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
        build=_backbone,
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
        build=_train(lambda config: config.base_training),
        inputs=_base_inputs,
        parents={"model": ("backbone",)},
        needed=lambda config: config.base_training is not None,
        computed_on="device",
        workers=_mean_workers(lambda config: config.base_training),
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
        build=_importance,
        version=2,
        inputs=_importance_inputs,
        parents={"model": _FULL},
        needed=lambda config: needs_scores(config.schedule),
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
        build=_neurons,
        inputs=_neuron_inputs,
        parents={"model": _FULL, "importance": ("importance",)},
        needed=lambda config: config.schedule.width_reduction > 0,
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
        build=_tokens,
        inputs=lambda config, sources, split: {
            "data": _calibration_data(config, sources),
            "texts": MOST_TEXTS,
            "max_length": config.document_max_length,
            "seed": config.seed,
        },
        parents={"model": ("backbone",)},  # training leaves the tokenizer as it is
        needed=lambda config: config.schedule.vocabulary > 0,
        shared=True,
    ),
    Stage(
        name="axes",
        title="fitting shorter embeddings",
        build=_axes,
        inputs=lambda config, sources, split: {
            "data": _calibration_data(config, sources),
            "texts": MOST_EMBEDDED,
            "max_length": config.document_max_length,
            "seed": config.seed,
        },
        parents={"model": _FULL},
        needed=lambda config: config.schedule.dimension > 0,
        on_device=_always,
        computed_on="device",
        shared=True,
        cost=Cost(tokens=lambda config: 2.0 * MOST_EMBEDDED * config.document_max_length, full_model=True),
    ),
    Stage(
        name="pruned",
        title="pruning",
        build=_pruned,
        version=2,
        inputs=_pruned_inputs,
        parents={
            "model": _FULL,
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
        build=_train(lambda config: config.recovery),
        inputs=_recovery_inputs,
        parents={"model": ("pruned", *_FULL), "teacher": _FULL},
        asked=lambda config, role: role != "teacher" or _learns_from_base(config),
        needed=lambda config: config.recovery is not None,
        computed_on="device",
        workers=_mean_workers(lambda config: config.recovery),
        resumable=True,
        bulk=CHECKPOINT,
        cost=Cost(start_seconds=30.0, tokens=lambda config: _training_tokens(config.recovery)),
    ),
    Stage(
        name="embeddings",
        title="encoding documents",
        build=_embeddings,
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
        build=_scores,
        version=3,
        columns=_score_columns,
        query_scores=lambda task: _read_scores(task).per_query,
        inputs=lambda config, sources, split: {"max_length": config.query_max_length, **_served(config)},
        parents={"model": _MODEL, "embeddings": ("embeddings",)},
        each_dataset=True,
        on_device=_one_worker,
        computed_on="device",
        workers=_searchers,
        cost=Cost(tokens=lambda config: (config.dev.queries or 1_000) * config.query_max_length),
    ),
    Stage(
        name="bm25",
        title="scoring BM25",
        build=_bm25,
        columns=_bm25_columns,
        inputs=_sample_inputs,
        shared=True,
        each_dataset=True,
        cost=Cost(start_seconds=5.0),
    ),
    Stage(
        name="timing",
        title="measuring speed",
        build=_timing,
        version=3,
        columns=_timing_columns,
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
