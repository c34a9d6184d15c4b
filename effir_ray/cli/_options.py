"""Options that several commands share, so that they look and read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effir_ray import hardware
from effir_ray.errors import InputError
from effir_ray.storage import is_uri


def local_path(value: str) -> Path:
    """``value`` as a path. A Path of a URI would be a folder here that nobody looks for."""
    if is_uri(value):
        raise InputError(
            f"--out {value}: expected a path, on a disk that all machines see; object stores hold what "
            f"'encode' writes, and checkpoints with 'storage_path: {value}' in the settings of a training"
        )
    return Path(value)


def study_place(value: str) -> Path | str:
    """``value`` as a path, or the URI that it is."""
    return value if is_uri(value) else Path(value)


Backbone = Annotated[
    str,
    typer.Option(
        help="Model to start from: a Hugging Face folder or hub id, a .gguf file, a checkpoint of effir-ray, "
        "smollm2-135m, minilm-l6, or random:<family>.",
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option(help="Checkpoint folder, or any name that --backbone takes.", show_default=False)
]
Dataset = Annotated[
    str, typer.Option(help="'stdlib', a BEIR folder, or the name of a downloaded BEIR data set.")
]


Precision = Annotated[
    hardware.Precision | None,
    typer.Option(
        help="What is multiplied in. Left out: bfloat16 on GPUs, and on CPUs that are faster in it for "
        "models whose embeddings it leaves as they are; else float32. int8 is for CPUs.",
        show_default=False,
    ),
]


def study_option(what: str) -> Any:
    """The option --out of a command whose study may lie in an object store."""
    return typer.Option(help=what, parser=study_place, metavar="PATH|URI", show_default=False)


def out_option(what: str) -> Any:
    """The option --out of a command that writes ``what`` to a local (or mounted) disk."""
    return typer.Option(help=what, parser=local_path, metavar="PATH", show_default=False)


Out = Annotated[Path, out_option("Folder to write to.")]
Results = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR",
        parser=study_place,
        help="Folders (or Parquet files) of results; of studies also s3:// and other URIs.",
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Ray cluster to run on: 'auto' on one of its nodes, or host:6379; this machine when left out.",
    ),
]
JobAddress = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="Job server of the cluster, http://host:8265; when left out, the Ray head of this machine.",
    ),
]
FirstBlocks = Annotated[
    int | None,
    typer.Option(min=1, help="Use only the first N blocks of the model; they count as its full depth."),
]
SkipDamaged = Annotated[
    bool,
    typer.Option("--skip-damaged", help="Name files that cannot be read and go on without them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
