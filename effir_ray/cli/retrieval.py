"""encode, evaluate: what a model is worth as a retriever."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effir_ray.cli._options import Address, AsJson, Dataset, Model, Out
from effir_ray.cli._output import say, show_json, show_table

MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens a text is cut to; the model's own limit.")]


def encode(
    model: Model,
    dataset: Dataset,
    out: Out,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors; one GPU or CPU share each.")] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Documents a shard.")] = 4096,
    max_length: MaxLength = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16, of the stored vectors.")] = "float32",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Encode the documents of a data set into Parquet shards that any Arrow reader opens.

    A stopped run goes on with the shards that are missing; a finished one returns at once.

    \b
    [bold]Examples[/bold]
    effir-ray encode --model minilm-l6 --dataset scifact --out runs/scifact-minilm
    effir-ray encode --model small --dataset /data/corpus --out s3://bucket/vectors --workers 8 --address auto
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
            dtype=dtype,
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
        Path | None, typer.Option(help="Folder for the TREC run, per-query scores and MTEB-style JSON.")
    ] = None,
    max_length: MaxLength = None,
    prf: Annotated[
        int, typer.Option(min=0, help="Pseudo-relevance feedback from the first N documents (Rocchio).")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Score a model on a retrieval data set: nDCG@10, Recall@100, MRR@10, MAP@100 by exact search.

    \b
    [bold]Examples[/bold]
    effir-ray evaluate --model minilm-l6 --dataset scifact
    effir-ray evaluate --model small --dataset stdlib --split dev --out runs/small-dev
    """
    from effir_ray import evaluate as run
    from effir_ray.progress import show_progress

    with show_progress():
        result = run(model, dataset, split=split, out=out, max_length=max_length, prf=prf)
    if as_json:
        show_json(summary_of(result))
        return
    show_table(["metric", "mean"], [(name, value) for name, value in result.scores.mean.items()])
    say(f"{result.n_queries} queries over {result.n_documents} documents, split {split}")


def summary_of(result: Any) -> dict[str, Any]:
    """The means of an evaluation; rankings and per-query scores are in its folder."""
    return {
        "scores": result.scores.mean,
        "queries": result.n_queries,
        "documents": result.n_documents,
        "seconds": result.seconds,
    }
