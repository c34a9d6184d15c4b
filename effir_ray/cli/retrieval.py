"""encode, evaluate, measure: what a model is worth as a retriever."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from effir_ray.cli._options import Address, AsJson, Dataset, Model, Precision, out_option
from effir_ray.cli._output import quantity, say, show_json, show_table


class StoredType(StrEnum):
    float32 = "float32"
    float16 = "float16"


MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens a document is cut to; the model's own limit when left out.")
]
Workers = Annotated[
    int, typer.Option(min=1, help="Ray actors that encode, one GPU each where there are any.")
]


def encode(
    model: Model,
    dataset: Dataset,
    out: Annotated[
        str, typer.Option(help="Folder to write to, or a URI such as s3://bucket/name.", show_default=False)
    ],
    workers: Workers = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Documents a shard.")] = 1024,
    max_length: MaxLength = None,
    dtype: Annotated[StoredType, typer.Option(help="Type of the stored numbers.")] = StoredType.float32,
    precision: Precision = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Encode the documents of a data set into Parquet shards that any Arrow reader opens.

    A stopped run goes on with the shards that are missing; a finished one returns at once.

    \b
    [bold]Examples[/bold]
    effir-ray encode --model minilm-l6 --dataset scifact --out runs/scifact-minilm
    effir-ray encode --model small --dataset /data/corpus --out /data/vectors \\
        --workers 8 --address auto
    """
    from effir_ray import encode as run
    from effir_ray.progress import show_progress

    with show_progress():
        result = run(
            model,
            dataset,
            out,
            shard_size=shard_size,
            workers=workers,
            max_length=max_length,
            dtype=dtype.value,
            precision=precision,
            address=address,
        )
    summary = {"folder": out, "documents": len(result)}
    if as_json:
        show_json(summary)
    else:
        say(f"{len(result)} documents in {out}")


def evaluate(
    model: Model,
    dataset: Dataset,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    out: Annotated[
        Path | None, out_option("Folder for the TREC run, per-query scores and MTEB-style JSON.")
    ] = None,
    query_max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a query is cut to.", show_default=False)
    ] = None,
    max_length: MaxLength = None,
    k: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Also nDCG, Recall, MRR and MAP at this rank; can be given several times."),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only so many of the split's queries; give --documents too.", show_default=False
        ),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many documents, the relevant ones among them.", show_default=False),
    ] = None,
    prf: Annotated[
        int,
        typer.Option(min=0, help="Pseudo-relevance feedback: move queries towards their first N documents."),
    ] = 0,
    precision: Precision = None,
    workers: Workers = 1,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on a retrieval data set: nDCG@10, Recall@100, MRR@10, MAP@100 by exact search.

    \b
    [bold]Examples[/bold]
    effir-ray evaluate --model minilm-l6 --dataset scifact
    effir-ray evaluate --model small --dataset stdlib --split dev --out runs/small-dev
    effir-ray evaluate --model small --dataset scifact --prf 5
    effir-ray evaluate --model minilm-l6 --dataset scifact --precision int8
    effir-ray evaluate --model small --dataset scifact --queries 100 --documents 1000   a sample, in a minute
    effir-ray evaluate --model small --dataset msmarco --split dev --k 1000 \\
        --out /shared/small-msmarco --workers 8 --address auto
    """
    from effir_ray import InputError, load_dataset
    from effir_ray import evaluate as run
    from effir_ray.evaluation.corpus_search import Feedback
    from effir_ray.progress import show_progress

    if (queries is None) != (documents is None):
        raise InputError("--queries and --documents go together: a sample has so many of both")
    with show_progress():
        data = load_dataset(dataset)
        if queries is not None and documents is not None:
            data = data.sample(split, queries=queries, documents=documents)
        result = run(
            model,
            data,
            split=split,
            out=out,
            query_max_length=query_max_length,
            document_max_length=max_length,
            feedback=Feedback(documents=prf) if prf else None,
            cutoffs=k or (),
            precision=precision,
            workers=workers,
            address=address,
        )
    if as_json:
        show_json(result.summary())
        return
    for warning in result.warnings:
        typer.echo(f"effir-ray: {warning}", err=True)
    show_table(["metric", "mean"], [(name, value) for name, value in result.scores.mean.items()])
    say(
        f"{result.n_queries} queries over {result.n_documents} documents, split {split}; "
        + (f"encoded in {result.precision}, " if result.precision else "")
        + f"searched in {result.search_ms:.2f} ms a query"
    )


def mteb(
    model: Model,
    task: Annotated[
        list[str], typer.Option(help="Name of an mteb task; repeat it for several.", metavar="NAME")
    ],
    out: Annotated[Path, out_option("Folder of mteb results; what is in it is not done again.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of BEIR folders, used for tasks of their names in place of downloads."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model by mteb itself; its files are laid out as in mteb's repository of results.

    \b
    [bold]Examples[/bold]
    effir-ray mteb --model small --task SciFact --task NFCorpus --out runs/mteb
    effir-ray mteb --model minilm-l6 --task SciFact --data DATA --out runs/mteb
    """
    from effir_ray.evaluation.mteb_adapter import run_mteb
    from effir_ray.progress import show_progress

    with show_progress():
        scores = run_mteb(model, task, out, data=data)
    if as_json:
        show_json(scores)
        return
    show_table(["task", "main score"], list(scores.items()), title=f"{model}, by mteb")
    say(f"Results: {out}")


def measure(
    model: Annotated[
        list[str],
        typer.Option(
            help="Model to measure, as for evaluate; give several to compare them with the first.",
            show_default=False,
        ),
    ],
    dataset: Dataset = "stdlib",
    queries: Annotated[int, typer.Option(min=1, help="Queries, encoded one at a time.")] = 20,
    documents: Annotated[int, typer.Option(min=2, help="Documents, encoded together.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; reported are medians.")] = 5,
    precision: Precision = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast and how large models are, taking turns in one run: other load hits all alike.

    \b
    [bold]Examples[/bold]
    effir-ray measure --model minilm-l6
    effir-ray measure --model smollm2-135m --model runs/small --dataset scifact
    """
    from effir_ray import measure as run
    from effir_ray.progress import show_progress

    with show_progress():
        found = run(model, dataset, queries=queries, documents=documents, rounds=rounds, precision=precision)
    if as_json:
        show_json(found)
        return
    rows: dict[str, list[object]] = {
        "query, ms (median)": [figures.query_ms_p50 for figures in found.values()],
        "query, ms (95th percentile)": [figures.query_ms_p95 for figures in found.values()],
        "documents a second": [figures.documents_per_s for figures in found.values()],
        "tokens a second": [figures.tokens_per_s for figures in found.values()],
        "query speed-up": [_interval(f.query_speedup, f.query_speedup_interval) for f in found.values()],
        "document speed-up": [
            _interval(f.document_speedup, f.document_speedup_interval) for f in found.values()
        ],
        "precision": [figures.precision for figures in found.values()],
        "MFU": [f"{figures.mfu:.0%}" for figures in found.values()],
        "peak memory": [f"{quantity(figures.peak_memory_bytes)}B" for figures in found.values()],
        "isotropy": [figures.isotropy for figures in found.values()],
        f"search of {documents} documents, ms": [figures.search_ms for figures in found.values()],
    }
    show_table(["", *found], [[name, *cells] for name, cells in rows.items()])


def _interval(ratio: float, ends: tuple[float, float]) -> str:
    return f"{ratio:.2f}x ({ends[0]:.2f} to {ends[1]:.2f})"
