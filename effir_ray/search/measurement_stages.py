"""How the stages of a trial that measure its model do so, and what they add to its row."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effir_ray import hardware
from effir_ray.cluster.devices import on_device
from effir_ray.compression.pipeline import load_to_measure
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.embedding_shards import CorpusEmbeddings, ShardFolder
from effir_ray.encoding.encoder import Encoder
from effir_ray.evaluation.bm25 import bm25_scores
from effir_ray.evaluation.corpus_search import search_corpus
from effir_ray.evaluation.efficiency import FEWEST_ROUNDS, MARGIN, isotropy, measure_efficiency
from effir_ray.evaluation.metrics import Run, Scores, score_run
from effir_ray.evaluation.rows import score_columns, size_columns
from effir_ray.hardware import Precision
from effir_ray.models import accounting
from effir_ray.models.loading import load_config
from effir_ray.readers import read_json
from effir_ray.search.model_stages import CHECKPOINT, plan_of, read_plan, settle
from effir_ray.search.stage_graph import Split, StageTask
from effir_ray.search.trial_config import TrialConfig

SHARDS = "shards"
SCORES = "scores.json"
ISOTROPY = "isotropy.json"
BM25 = "bm25.json"
TIMING = "timing.json"

SEARCHED_A_WORKER = 2**30
"""Bytes of embeddings from which on one more worker is worth its start."""


def embed_documents(task: StageTask) -> None:
    from effir_ray.encoding.corpus_encoding import encode_corpus

    several = task.config.encoding_workers > 1
    encode_corpus(
        task.parent("model") / CHECKPOINT,
        sampled(task.config, task.split),
        task.store.target(task.out, SHARDS) if several else task.out / SHARDS,
        workers=task.config.encoding_workers,
        max_length=task.config.document_max_length,
        precision=task.config.precision,
        stages=task.store,
        held=task.store.lease_of(task.out),
    )


def search_and_score(task: StageTask) -> None:
    """Encode the queries, search the embedded corpus exactly, score.

    Large embeddings are searched by several workers, which have the GPUs to themselves meanwhile: the
    queries' was given back. The ranking is the same bit for bit.
    """
    workers = searchers(task)
    if workers == 1:
        run, spread = on_device(_ranking_here, task).value
    else:
        run, spread = _ranking(task, on_device(_query_vectors, task).value, workers)
    scores = score_run(run, sampled(task.config, task.split).qrels(task.split))
    (task.out / ISOTROPY).write_text(json.dumps(spread))
    (task.out / SCORES).write_text(json.dumps(asdict(scores), indent=1))


def searchers(task: StageTask) -> int:
    """How many workers search: at most as many as encode."""
    if task.config.encoding_workers == 1:
        return 1
    size = task.store.bytes_of(task.parents["embeddings"], SHARDS)
    return min(task.config.encoding_workers, 1 + size // SEARCHED_A_WORKER)


def _ranking_here(task: StageTask) -> tuple[Run, float | None]:
    """All in one process, which may be where a GPU is reserved."""
    return _ranking(task, _query_vectors(task), 1)


def _ranking(task: StageTask, vectors: npt.NDArray[np.float32], workers: int) -> tuple[Run, float | None]:
    """What queries of ``vectors``, (queries, d), find, and the isotropy of what they search."""
    queries = list(sampled(task.config, task.split).queries(task.split))
    several = task.config.encoding_workers > 1  # who wrote them where all machines read them
    place = task.store.target(task.parents["embeddings"], SHARDS) if several else None
    embedded = CorpusEmbeddings(ShardFolder(place or task.parent("embeddings") / SHARDS))
    run = search_corpus(queries, vectors, embedded, workers=min(workers, embedded.encoding.shards))
    return run, isotropy(embedded.shards()) if len(embedded) > 1 else None


def _query_vectors(task: StageTask) -> npt.NDArray[np.float32]:
    """(queries, d), in the data set's order."""
    settle(task.config)
    queries = sampled(task.config, task.split).queries(task.split)
    encoder = Encoder(load_to_measure(task.parent("model") / CHECKPOINT), precision=task.config.precision)
    length = task.config.query_max_length
    return encoder.encode(list(queries.values()), "query", max_length=length, progress="Encoding queries")


def read_scores(task: StageTask) -> Scores:
    return Scores(**read_json(task.out / SCORES))


def columns_of_scores(task: StageTask) -> dict[str, Any]:
    config = task.config
    backbone = load_config(config.backbone, first_blocks=config.first_blocks)
    model = task.parents["model"]  # which need not be on this machine
    return {
        **score_columns(read_scores(task)),
        "isotropy": read_json(task.out / ISOTROPY),
        **size_columns(backbone, plan_of(task, model), document_tokens=config.document_max_length),
        "model": (model / CHECKPOINT).relative_to(task.store.root.parent).as_posix(),
    }


def score_bm25(task: StageTask) -> None:
    scores = bm25_scores(sampled(task.config, task.split), task.split)
    (task.out / BM25).write_text(json.dumps(scores.mean, indent=1))


def columns_of_bm25(task: StageTask) -> dict[str, Any]:
    return {"bm25_ndcg_at_10": read_json(task.out / BM25)["ndcg@10"]}


def time_model(task: StageTask) -> None:
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
    dataset = sampled(config, "dev")

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


def columns_of_timing(task: StageTask) -> dict[str, Any]:
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
        "bytes": accounting.model_bytes(backbone, plan_of(task, task.parents["model"]), timing["dtype"]),
        "document_speedup_low": interval[0],
        "document_speedup_high": interval[1],
        "document_ms": full["document_ms"] / timing["document_speedup"],
        "tokens_per_s": full["tokens_per_s"] * timing["document_speedup"],
        "query_ms": query_ms,
        "query_ms_p95": query_ms * timing["query_ms_p95"] / timing["query_ms_p50"],
        **{name: timing[name] for name in _AS_TIMED},
    }


_AS_TIMED = ("document_speedup", "query_speedup", "mfu", "peak_memory_bytes", "hardware", "other_load")


def sampled(config: TrialConfig, split: Split) -> Dataset:
    """The part of ``split`` that the study uses."""
    dataset, sample = load_dataset(config.dataset), getattr(config, split)
    if sample.queries is None:
        return dataset
    return dataset.sample(split, queries=sample.queries, documents=sample.documents, seed=config.sample_seed)
