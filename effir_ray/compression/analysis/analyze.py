"""``effir-ray analyze``: what every sublayer of a backbone weighs, costs and matters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import pyarrow as pa
from pyarrow import feather

from effir_ray.compression.analysis.summary import Analysis, summarize
from effir_ray.compression.calibration import draw_pairs, draw_texts
from effir_ray.compression.schedule import Criterion
from effir_ray.config import Config
from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.models.loading import load_config

if TYPE_CHECKING:
    from effir_ray.compression.calibration import Pair


def analyze(
    backbone: str,
    out: Path,
    *,
    texts: Sequence[str],
    queries: Sequence[str] = (),
    pairs: Sequence[Pair] = (),
    criteria: Sequence[Criterion] = ("cosine",),
    first_blocks: int | None = None,
    query_tokens: int = 32,
    document_tokens: int = 512,
    max_length: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    address: str | None = None,
) -> Analysis:
    """Measure ``backbone`` and write the result to the folder ``out``:

    - ``analysis.html``: one self-contained page; each of its figures also as an ``.svg`` file;
    - ``sublayers.arrow``, ``sizes.arrow``: the numbers as Arrow (Feather); ``analysis.json``: all of it.

    ``texts``, ``queries`` and ``pairs`` are what measure_importance takes for the ``criteria`` asked. FLOPs
    are counted for texts of ``query_tokens`` and ``document_tokens``. Raises InputError for an unknown
    backbone, missing texts, or an ``out`` that cannot be written.
    """
    from effir_ray.compression.analysis.page import write_page
    from effir_ray.compression.depth.importance import measure_importance
    from effir_ray.hardware import detect
    from effir_ray.models.retriever import load_retriever

    if not criteria:
        raise InputError("no importance criterion was asked for; name at least one, such as cosine")
    _prepare(out)
    hardware = detect()
    retriever = load_retriever(
        backbone, dtype=hardware.dtype, device=hardware.device, first_blocks=first_blocks
    )
    scores = {
        criterion: measure_importance(
            retriever,
            texts,
            criterion=criterion,
            queries=queries,
            pairs=pairs,
            max_length=max_length,
            seed=seed,
            workers=workers,
            address=address,
        )
        for criterion in dict.fromkeys(criteria)
    }
    analysis = summarize(
        backbone,
        load_config(backbone, first_blocks=first_blocks),
        scores,
        query_tokens=query_tokens,
        document_tokens=document_tokens,
        calibration_texts=len(texts),
    )
    write_whole(out / "sublayers.arrow", _arrow(analysis.sublayers))
    write_whole(out / "sizes.arrow", _arrow(analysis.sizes))
    write_whole(out / "analysis.json", analysis.model_dump_json(indent=2).encode())
    write_page(analysis, out)
    return analysis


def _arrow(rows: Sequence[Config]) -> bytes:
    buffer = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist([row.model_dump() for row in rows]), buffer)
    return buffer.getvalue()


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be used as the output folder: {error.strerror}") from None


def analyze_on(
    dataset: str,
    backbone: str,
    out: Path,
    *,
    texts: int = 256,
    criteria: Sequence[str] = ("cosine",),
    first_blocks: int | None = None,
    seed: int = 0,
) -> Analysis:
    """``analyze`` with ``texts`` documents of ``dataset``; pooled adds dev queries, dev-loss dev pairs.

    Raises InputError for an unknown criterion.
    """
    from effir_ray.compression.analysis.analyze import analyze
    from effir_ray.data.datasets import load_dataset

    asked = tuple(name.strip() for name in criteria)
    unknown = [name for name in asked if name not in get_args(Criterion)]
    if unknown:
        known = ", ".join(get_args(Criterion))
        raise InputError(f"unknown importance criterion '{unknown[0]}'; expected one of {known}")
    data = load_dataset(dataset)
    return analyze(
        backbone,
        out,
        texts=draw_texts(data, texts, seed),
        queries=list(data.queries("dev").values())[:texts] if "pooled" in asked else (),
        pairs=draw_pairs(dataset, texts, seed, split="dev") if "dev-loss" in asked else (),
        criteria=cast("tuple[Criterion, ...]", asked),
        first_blocks=first_blocks,
        seed=seed,
    )
