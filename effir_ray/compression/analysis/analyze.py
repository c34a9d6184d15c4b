"""``effir-ray analyze``: what every sublayer of a backbone weighs, costs and matters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import pyarrow as pa
from pyarrow import feather

from effir_ray.compression.analysis.page import write_page
from effir_ray.compression.analysis.similarity import layer_similarities
from effir_ray.compression.analysis.summary import Analysis, summarize
from effir_ray.compression.calibration import draw_pairs, draw_texts
from effir_ray.compression.depth.importance import measure_importance
from effir_ray.compression.planning import ImportanceScores
from effir_ray.compression.schedule import Criterion
from effir_ray.config import Config
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.hardware import detect
from effir_ray.models.loading import load_config
from effir_ray.models.retriever import load_retriever

QUERY_TOKENS, DOCUMENT_TOKENS = 32, 512
"""Lengths of the texts whose FLOPs are counted; the second is also where compared documents are cut."""

PAIRS = 64
"""Queries that are compared with documents: enough for a mean and the middle half of each."""


def analyze(
    backbone: str,
    out: str | Path,
    *,
    criteria: Sequence[str] = ("cosine",),
    dataset: str = "stdlib",
    texts: int = 256,
    first_blocks: int | None = None,
    seed: int = 0,
) -> Analysis:
    """Measure ``backbone`` and write the result to the folder ``out``:

    - ``analysis.html``: one self-contained page; each of its figures also as an ``.svg`` file;
    - ``sublayers.arrow``, ``sizes.arrow``, ``similarities.arrow``: the numbers as Arrow (Feather);
      ``analysis.json``: all of it.

    Importance by each of ``criteria`` (those of ``measure_importance``) is measured on ``texts`` documents of
    ``dataset``; pooled takes as many of its dev queries as well, dev-loss as many dev pairs. Queries and
    documents, cut at 512 tokens, are compared for at most 64 dev pairs, where there is a dev split. Raises
    InputError for an unknown backbone, data set or criterion, or an ``out`` that cannot be written.
    """
    asked = _checked(criteria)
    out = _prepared(Path(out))
    data = load_dataset(dataset)
    hardware = detect()
    retriever = load_retriever(
        backbone, dtype=hardware.dtype, device=hardware.device, first_blocks=first_blocks
    )
    documents = draw_texts(data, texts, seed)
    queries = list(data.queries("dev").values())[:texts] if "pooled" in asked else ()
    judged = "dev-loss" in asked or "dev" in data.splits
    pairs = draw_pairs(dataset, texts, seed, split="dev") if judged else ()
    scores: dict[Criterion, ImportanceScores] = {
        criterion: measure_importance(
            retriever, documents, criterion=criterion, queries=queries, pairs=pairs, seed=seed
        )
        for criterion in asked
    }
    analysis = summarize(
        backbone,
        load_config(backbone, first_blocks=first_blocks),
        scores,
        query_tokens=QUERY_TOKENS,
        document_tokens=DOCUMENT_TOKENS,
        calibration_texts=len(documents),
        similarities=layer_similarities(
            retriever, pairs[:PAIRS], max_length=min(DOCUMENT_TOKENS, retriever.spec.max_length)
        ),
    )
    write_whole(out / "sublayers.arrow", _arrow(analysis.sublayers))
    write_whole(out / "sizes.arrow", _arrow(analysis.sizes))
    if analysis.similarities:
        write_whole(out / "similarities.arrow", _arrow(analysis.similarities))
    write_whole(out / "analysis.json", analysis.model_dump_json(indent=2).encode())
    write_page(analysis, out)
    return analysis


def _checked(criteria: Sequence[str]) -> tuple[Criterion, ...]:
    """Each criterion once, in the order asked for."""
    asked = tuple(dict.fromkeys(name.strip() for name in criteria))
    known = ", ".join(get_args(Criterion))
    if not asked:
        raise InputError(f"no importance criterion was asked for; name at least one of {known}")
    for name in asked:
        if name not in get_args(Criterion):
            raise InputError(f"unknown importance criterion '{name}'; expected one of {known}")
    return cast("tuple[Criterion, ...]", asked)


def _prepared(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be used as the output folder: {error.strerror}") from None
    return out


def _arrow(rows: Sequence[Config]) -> bytes:
    buffer = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist([row.model_dump() for row in rows]), buffer)
    return buffer.getvalue()
