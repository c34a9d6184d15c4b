"""What a measured trial is: one flat, self-describing row of an Arrow table."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Union

import pyarrow as pa
from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from effir_ray.config import Config
from effir_ray.storage import name_of

SCHEMA_VERSION = 7
"""Raised when columns are added. Columns are never renamed, retyped or removed, so that old files stay
readable: a column that a file lacks is null."""

Direction = Literal["max", "min"]

DIRECTIONS: dict[str, Direction] = {
    "ndcg_at_10": "max",
    "recall_at_100": "max",
    "mrr_at_10": "max",
    "map_at_100": "max",
    "parameters": "min",
    "parameter_ratio": "min",
    "block_parameters": "min",
    "flops_per_document": "min",
    "bytes": "min",
    "index_bytes": "min",
    "document_ms": "min",
    "query_ms": "min",
    "document_speedup": "max",
    "query_speedup": "max",
    "query_ms_p95": "min",
    "tokens_per_s": "max",
    "peak_memory_bytes": "min",
}
"""Every column that can be an objective, and which way is better."""

DEFAULT_OBJECTIVES = ("ndcg_at_10", "parameters", "document_speedup")
"""Speed is the ratio to the full model measured beside it: milliseconds change with a machine's load."""

OBJECTIVES_ACROSS_BACKBONES = ("ndcg_at_10", "parameters", "document_ms")
RELATIVE = ("parameter_ratio", "document_speedup", "query_speedup")
"""Columns that compare a model with its own full one, which says nothing between backbones."""

TIMED = ("document_ms", "query_ms", "query_ms_p95", "document_speedup", "query_speedup", "tokens_per_s")
"""Columns that depend on the hardware."""


def _is_json(text: str) -> str:
    json.loads(text)
    return text


JsonText = Annotated[str, AfterValidator(_is_json)]
Score = Annotated[FiniteFloat, Field(ge=0, le=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Error = Annotated[FiniteFloat, Field(ge=0)]


def _now() -> datetime:
    return datetime.now(UTC)


def sample_in_words(trial: dict[str, Any], split: str) -> str:
    """Which part of its split a row was measured on, from its ``trial``."""
    sample = trial.get(split) or {}
    if sample.get("queries") is None:
        return f"all of {split}"
    seed = trial.get("sample_seed", trial.get("seed", 0))  # one seed for both, once
    return f"{sample['queries']} queries, {sample['documents']} documents, seed {seed}"


_MEAN = "mean of "


def mean_of(datasets: Sequence[str]) -> str:
    """What rows with the means over several data sets have in the place of a data set's name."""
    return _MEAN + ", ".join(datasets)


def averaged(dataset: str) -> tuple[str, ...]:
    """The data sets that rows of this name are the means of; none where it is a data set itself."""
    return tuple(dataset.removeprefix(_MEAN).split(", ")) if dataset.startswith(_MEAN) else ()


def dataset_in_short(dataset: str) -> str:
    """Without the folders it lies in."""
    parts = averaged(dataset)
    return mean_of([name_of(part) for part in parts]) if parts else name_of(dataset)


class TrialRow(Config):
    """One trial on one split of one data set, or its means over several (``mean_of``).

    Everything needed to read the numbers stands in the row itself; ``trial`` is the configuration that
    repeats it. A failed trial has no scores but a ``reason``. Scores are fractions (0.54, not 54).
    """

    schema_version: int = Field(default=SCHEMA_VERSION, description="version of these columns")
    study: str = Field(description="name of the study that ran the trial")
    trial_id: str = Field(description="hash of `trial`")
    trial: JsonText = Field(description="configuration that repeats the trial, JSON")
    schedule: str = Field(description="compression schedule in the paper's notation, e.g. 16M8A-w30")
    plan: JsonText = Field(default="{}", description="per_layer_config: what is left of every layer, JSON")
    backbone: str = Field(description="name or path of the uncompressed model")
    dataset: str = Field(description="name or path of the data set; `mean of A, B` for means over several")
    split: Literal["train", "dev", "test"] = Field(description="split whose queries were scored")
    seed: int = Field(default=0, description="of training, samples and random draws")
    contents: JsonText = Field(
        default="{}", description="fingerprints of what was read: backbone, data sets, teachers, JSON"
    )
    sample: str = Field(default="", description="which part of the split was measured, in words")
    model: str = Field(default="", description="where the model was built, below the study's folder")
    attempt: Count = Field(default=1, description="1 at the first try on this split, 2 at the next")
    status: Literal["ok", "failed"] = Field(default="ok", description="ok, or failed without scores")
    reason: str = Field(default="", description="why the trial failed")
    n_queries: Count | None = Field(default=None, description="judged queries that the scores are means of")
    ndcg_at_10: Score | None = Field(default=None, description="nDCG@10, mean over queries, 0 to 1")
    ndcg_at_10_se: Error | None = Field(default=None, description="standard error of ndcg_at_10")
    ndcg_at_10_low: Score | None = Field(
        default=None, description="lower end of the 95 % interval of ndcg_at_10, bootstrap over queries"
    )
    ndcg_at_10_high: Score | None = Field(default=None, description="upper end of that interval")
    bm25_ndcg_at_10: Score | None = Field(
        default=None, description="nDCG@10 of BM25 on the same queries and documents"
    )
    recall_at_100: Score | None = Field(default=None, description="Recall@100, mean over queries, 0 to 1")
    mrr_at_10: Score | None = Field(default=None, description="MRR@10, mean over queries, 0 to 1")
    map_at_100: Score | None = Field(default=None, description="MAP@100, mean over queries, 0 to 1")
    blocks: Count | None = Field(default=None, description="blocks of the full model")
    mlp_width: Count | None = Field(default=None, description="neurons of its widest MLP")
    parameters: Count | None = Field(default=None, description="parameters without the LM head")
    parameter_ratio: Positive | None = Field(default=None, description="parameters / those of the full model")
    block_parameters: Count | None = Field(
        default=None, description="parameters of attention, MLPs and norms of the blocks; no embeddings"
    )
    flops_per_document: Positive | None = Field(default=None, description="FLOPs to encode one document")
    flops_ratio: Positive | None = Field(
        default=None, description="flops_per_document / those of the full model"
    )
    bytes: Count | None = Field(default=None, description="size of the weights in bytes")
    index_bytes: Count | None = Field(
        default=None, description="size of the embeddings of a million documents in bytes"
    )
    document_ms: Positive | None = Field(default=None, description="milliseconds to encode one document")
    query_ms: Positive | None = Field(default=None, description="milliseconds to encode one query")
    document_speedup: Positive | None = Field(
        default=None, description="document encoding speed / that of the full model in the same run"
    )
    document_speedup_low: Positive | None = Field(
        default=None, description="lower end of its 95 % interval; before schema 5 of the rounds' range"
    )
    document_speedup_high: Positive | None = Field(default=None, description="upper end of that interval")
    query_speedup: Positive | None = Field(
        default=None, description="query encoding speed / that of the full model in the same run"
    )
    query_ms_p95: Positive | None = Field(
        default=None, description="95th percentile of the milliseconds to encode one query"
    )
    tokens_per_s: Positive | None = Field(default=None, description="document tokens encoded a second")
    mfu: Positive | None = Field(
        default=None,
        description="model FLOPs a second while encoding / the machine's largest in matrix products",
    )
    peak_memory_bytes: Count | None = Field(
        default=None, description="weights and what encoding adds to them, in bytes"
    )
    other_load: FiniteFloat | None = Field(
        default=None, description="share of the machine that other work took while speed was measured"
    )
    isotropy: FiniteFloat | None = Field(
        default=None, description="mean cosine of different documents; near 1 is collapsed"
    )
    recovered: bool = Field(default=False, description="trained after compression")
    training_workers: JsonText | None = Field(
        default=None,
        description="training -> [first step, workers] of each part with another number of workers, JSON",
    )
    git_commit: str = Field(default="", description="commit of the code that ran")
    versions: JsonText = Field(default="{}", description="package versions, JSON")
    hardware: str = Field(default="", description="the machine, in words")
    wall_seconds: FiniteFloat | None = Field(
        default=None, description="seconds this trial took; of several data sets in the row of the mean"
    )
    device_seconds: FiniteFloat | None = Field(
        default=None, description="wall seconds times workers, on average where their number changed"
    )
    created_at: datetime = Field(default_factory=_now, description="when the row was written, UTC")

    @model_validator(mode="after")
    def _trustworthy(self) -> TrialRow:
        if self.status == "ok" and self.ndcg_at_10 is None:
            raise ValueError("a row with status 'ok' has an ndcg_at_10")
        if self.status == "failed" and not self.reason:
            raise ValueError("a row with status 'failed' gives its reason")
        return self


_ARROW_TYPES: dict[object, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def _arrow_type(annotation: object) -> pa.DataType:
    """``Score | None`` -> float64, ``Literal["ok", "failed"]`` -> string."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return pa.string()
    if origin in (Union, types.UnionType, Annotated):
        return _arrow_type(typing.get_args(annotation)[0])
    return _ARROW_TYPES[annotation]


def _arrow_schema() -> pa.Schema:
    hints = typing.get_type_hints(TrialRow, include_extras=True)
    fields = [
        pa.field(
            name,
            _arrow_type(hints[name]),
            metadata={"description": info.description} if info.description else None,
        )
        for name, info in TrialRow.model_fields.items()
    ]
    return pa.schema(fields, metadata={"effir_ray_schema": str(SCHEMA_VERSION)})


JSON_COLUMNS = frozenset({"trial", "plan", "versions", "contents", "training_workers"})

ARROW_SCHEMA: pa.Schema = _arrow_schema()
"""The table of ``TrialRow``; every column carries its description as field metadata."""
