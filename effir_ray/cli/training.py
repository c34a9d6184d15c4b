"""train, mine, annotate: recovering what compression cost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from effir_ray.caches import data_folder
from effir_ray.cli._options import Address, AsJson, Out, out_option
from effir_ray.cli._output import say, show_json
from effir_ray.errors import InputError
from effir_ray.files import whole
from effir_ray.progress import duration, show_progress
from effir_ray.stages import StageStore

PairsOut = Annotated[
    Path,
    out_option("JSONL file of pairs to write."),
]


def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML of training settings; defaults as in docs/training.md.", show_default=False
        ),
    ],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or name of the model; `model` of the YAML when left out."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint in --out, or start over.")
    ] = True,
    track: Annotated[
        list[str] | None,
        typer.Option(help="'mlflow' or 'wandb' (or both): show the curves there too, beside TensorBoard."),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model for retrieval with Ray Train and DeepSpeed; OUT/checkpoint is the result.

    \b
    [bold]Examples[/bold]
    effir-ray train search_spaces/train/smollm2-stdlib.yaml --out runs/trained
    effir-ray train search_spaces/train/smollm2-stdlib.yaml --model small --out runs/small-trained
    effir-ray train search_spaces/train/mistral-7b-msmarco.yaml --model pruned --out /shared/run
    """
    from effir_ray import TrainConfig
    from effir_ray import train as run
    from effir_ray.config import load_yaml

    settings = load_yaml(config, TrainConfig)
    trained = model or settings.model
    if trained is None:
        raise InputError(f"{config}: says no model to train; add 'model: NAME' to it, or give --model")
    with show_progress():
        result = run(trained, settings, out, address=address, resume=resume, track=track or ())
    if as_json:
        show_json(result)
    else:
        say(f"Checkpoint: {result.checkpoint} ({result.engine}, {duration(result.seconds)})")


def mine(
    source: Annotated[
        str,
        typer.Argument(
            help="Data set with a train split, or files of pairs: JSONL, Parquet, a folder of them."
        ),
    ],
    out: PairsOut,
    by: Annotated[str, typer.Option(help="'bm25', or a model that ranks.")] = "bm25",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    negatives: Annotated[int, typer.Option(min=1, help="Hard negatives a query.")] = 7,
    depth: Annotated[int, typer.Option(min=1, help="Ranked documents looked at for each query.")] = 100,
    margin: Annotated[
        float,
        typer.Option(min=0, help="A negative scores this fraction below the positive, or it is left out."),
    ] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Find hard negatives for training pairs by BM25 or by any model; likely false ones are left out.

    \b
    [bold]Examples[/bold]
    effir-ray mine stdlib --out stdlib-bm25.jsonl
    effir-ray mine pairs.jsonl --by minilm-l6 --negatives 15 --out pairs-mined.jsonl
    """
    from effir_ray import mine as run

    with show_progress():
        found = run(
            source, by=by, stages=_stages(), split=split, negatives=negatives, depth=depth, margin=margin
        )
    _deliver(found, out, as_json)


def annotate(
    pairs: Annotated[
        str,
        typer.Argument(
            help="Files of pairs with negatives: JSONL, Parquet, a folder of them.", show_default=False
        ),
    ],
    by: Annotated[str, typer.Option(help="Cross-encoder: folder or hub id.", show_default=False)],
    out: PairsOut,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a query and document together.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Add a reranker's score to every document of the pairs, for distillation.

    \b
    [bold]Examples[/bold]
    effir-ray annotate stdlib-bm25.jsonl --by BAAI/bge-reranker-base --out stdlib-scored.jsonl
    """
    from effir_ray import annotate as run

    with show_progress():
        found = run(pairs, by=by, stages=_stages(), max_length=max_length)
    _deliver(found, out, as_json)


def _stages() -> StageStore:
    """Mined and scored pairs are kept beside the data sets, so that a second command reuses them."""
    return StageStore(data_folder() / "stages")


def _deliver(found: Path, out: Path, as_json: bool) -> None:
    """Copy a stage's file to where the user wants it, complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as aside:
        shutil.copyfile(found, aside)
    with out.open(encoding="utf-8") as file:
        pairs = sum(1 for _ in file)
    if as_json:
        show_json({"file": out, "pairs": pairs})
    else:
        say(f"{pairs} pairs in {out}")
