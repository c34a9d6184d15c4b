"""What each stage of a trial does: read the folders of its parents, write its own.

A step gets the trial's configuration, ``parents`` (role -> folder), the folder to fill, and the study's
``stages`` for what it wants to share with other trials. Everything random in it comes from the
configuration's seed. Model folders hold ``checkpoint`` and ``plan.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effir_ray.compression.planning import ImportanceScores
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.plan import Plan
from effir_ray.search.recipe import Split
from effir_ray.search.space import TrialConfig
from effir_ray.stages import StageStore

if TYPE_CHECKING:
    from effir_ray.data.datasets import Dataset
    from effir_ray.models.retriever import Retriever
    from effir_ray.training.config import TrainConfig

Parents = Mapping[str, Path]
Step = Callable[[TrialConfig, Split, Parents, Path, StageStore], None]

CHECKPOINT = "checkpoint"
PLAN = "plan.json"
SCORES = "scores.json"
TIMING = "timing.json"


def backbone(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    """The uncompressed model as a checkpoint folder; a folder that is used whole is linked, not copied."""
    from effir_ray.models.checkpoint import save_checkpoint
    from effir_ray.models.names import resolve

    retriever = _load(config.backbone, first_blocks=config.first_blocks)
    source = resolve(config.backbone)
    if source.kind == "folder" and source.path is not None and config.first_blocks is None:
        (out / CHECKPOINT).symlink_to(source.path.resolve(), target_is_directory=True)
    else:
        save_checkpoint(retriever, out / CHECKPOINT)
    _write_plan(out, retriever.plan)


def base(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    """Fine-tuning of the full model, shared by all trials (finetune-then-prune)."""
    assert config.base_training is not None
    _train(config.base_training, parents["model"], out, stages)


def importance(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    from effir_ray.compression.calibration import draw_pairs, draw_texts
    from effir_ray.compression.depth.importance import measure_importance
    from effir_ray.data.datasets import load_dataset

    criterion = config.schedule.importance
    texts = draw_texts(load_dataset(config.dataset), config.calibration_texts, config.seed)
    labelled = criterion == "dev-loss"
    scores = measure_importance(
        load_model(parents["model"]),
        texts,
        criterion=criterion,
        pairs=draw_pairs(config.dataset, config.gates.pairs, config.seed, split="dev") if labelled else (),
        max_length=config.document_max_length,
        seed=config.seed,
    )
    (out / "importance.json").write_text(scores.model_dump_json())


def neurons(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    """Scores of the intermediate neurons of the model at this depth, from which every width is cut."""
    from effir_ray.compression.calibration import draw_pairs
    from effir_ray.compression.surgery import apply_plan
    from effir_ray.compression.width.reduction import rank_neurons

    retriever = load_model(parents["model"])
    apply_plan(retriever, _depth_plan(config, retriever.plan, parents))
    scores = rank_neurons(
        retriever,
        config.schedule.width_method,
        draw_pairs(config.dataset, config.gates.pairs, config.seed),
        steps=config.gates.steps,
        batch_size=config.gates.batch_size,
        seed=config.seed,
        max_length=config.document_max_length,
    )
    arrays: dict[str, Any] = {str(layer): values for layer, values in scores.items()}
    np.savez(out / "neurons.npz", **arrays)


def pruned(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    from effir_ray.compression.planning import narrow_plan
    from effir_ray.compression.surgery import apply_plan
    from effir_ray.models.checkpoint import save_checkpoint

    retriever = load_model(parents["model"])
    plan = _depth_plan(config, retriever.plan, parents)
    if "neurons" in parents:
        with np.load(parents["neurons"] / "neurons.npz") as file:
            ranked = {int(layer): file[layer] for layer in file.files}
        with _only_this_trial():
            plan = narrow_plan(plan, config.schedule, ranked)
    save_checkpoint(apply_plan(retriever, plan), out / CHECKPOINT)
    _write_plan(out, plan)


def recovered(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    """Fine-tuning of the pruned model."""
    assert config.recovery is not None
    _train(config.recovery, parents["model"], out, stages)


def embeddings(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    from effir_ray.encoding.corpus_encoding import encode_corpus

    encode_corpus(
        parents["model"] / CHECKPOINT,
        sampled(config, split),
        out / "shards",
        workers=config.encoding_workers,
        max_length=config.document_max_length,
    )


def scores(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    """Encode the queries, search the embedded corpus exactly, score."""
    from effir_ray.encoding.embedding_shards import CorpusEmbeddings, ShardFolder
    from effir_ray.encoding.encoder import Encoder
    from effir_ray.evaluation.corpus_search import search_corpus
    from effir_ray.evaluation.metrics import score_run

    dataset = sampled(config, split)
    queries = dataset.queries(split)
    encoder = Encoder(load_model(parents["model"]))
    vectors = encoder.encode(
        list(queries.values()), "query", max_length=config.query_max_length, progress="Encoding queries"
    )
    run = search_corpus(
        list(queries), vectors, CorpusEmbeddings(ShardFolder(parents["embeddings"] / "shards"))
    )
    (out / SCORES).write_text(json.dumps(score_run(run, dataset.qrels(split)).mean, indent=1))


def timing(config: TrialConfig, split: Split, parents: Parents, out: Path, stages: StageStore) -> None:
    """Speed of this model and of the full one, taking turns on the same texts in the same process."""
    from effir_ray.encoding.encoder import Encoder
    from effir_ray.evaluation.efficiency import measure_efficiency

    dataset = sampled(config, "dev")
    queries = list(dataset.queries("dev").values())[: config.timing.queries]
    ids = dataset.corpus.ids[: config.timing.documents]
    models = {"full": parents["reference"], "trial": parents["model"]}
    if parents["model"] == parents["reference"]:
        del models["trial"]
    encoders = {name: Encoder(_shortened(load_model(place), config)) for name, place in models.items()}
    measured = measure_efficiency(
        encoders,
        queries,
        dataset.corpus.texts(ids),
        rounds=config.timing.rounds,
        reference="full",
    )
    (out / TIMING).write_text(measured[list(models)[-1]].model_dump_json(indent=1))


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (backbone, base, importance, neurons, pruned, recovered, embeddings, scores, timing)
}

RESUMABLE = frozenset({"base", "recovered", "embeddings"})
"""Steps that go on from what an interrupted run left in their folder: checkpoints, shards."""


def sampled(config: TrialConfig, split: Split) -> Dataset:
    """The part of ``split`` that the study uses."""
    from effir_ray.data.datasets import load_dataset

    dataset, sample = load_dataset(config.dataset), getattr(config, split)
    if sample.queries is None:
        return dataset
    return dataset.sample(split, queries=sample.queries, documents=sample.documents, seed=config.seed)


def load_model(folder: Path) -> Retriever:
    """The checkpoint of a model stage."""
    return _load(str(folder / CHECKPOINT))


def _shortened(retriever: Retriever, config: TrialConfig) -> Retriever:
    """The same retriever, cutting texts where this study cuts documents."""
    spec = retriever.spec.model_copy(update={"max_length": config.document_max_length})
    return replace(retriever, spec=spec)


def _load(name: str, first_blocks: int | None = None) -> Retriever:
    from effir_ray.hardware import detect
    from effir_ray.models.retriever import load_retriever

    hardware = detect()
    return load_retriever(name, dtype=hardware.dtype, device=hardware.device, first_blocks=first_blocks)


def _train(training: TrainConfig, model: Path, out: Path, stages: StageStore) -> None:
    from effir_ray.training.run.launcher import train

    train(model / CHECKPOINT, training, out, stages=stages)
    _write_plan(out, read_plan(model))


def _depth_plan(config: TrialConfig, present: Plan, parents: Parents) -> Plan:
    """What depth leaves of a model that has ``present``; TrialFailure when there is no room for it."""
    from effir_ray.compression.planning import make_plan, within

    scores = None
    if "importance" in parents:
        text = (parents["importance"] / "importance.json").read_text()
        scores = ImportanceScores.model_validate_json(text)
    with _only_this_trial():
        return within(make_plan(config.schedule, len(present.layers), scores), present)


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
