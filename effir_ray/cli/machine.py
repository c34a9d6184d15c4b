"""demo, doctor, data: the first things to run on a new machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import effir_ray
from effir_ray.cli._app import Commands
from effir_ray.cli._options import Address, AsJson
from effir_ray.cli._output import say, show_json, show_table
from effir_ray.cli.results import show_front
from effir_ray.progress import show_progress

data = typer.Typer(
    cls=Commands, no_args_is_help=True, rich_markup_mode="rich", help="List and fetch data sets."
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/demo"),
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Run the demonstration search and write its report.

    Compresses a real retriever, all-MiniLM-L6-v2, in eight ways on a task made from Python's standard
    library, teaches what is left the full model's embeddings, and shows the Pareto front. Stopped at any
    point, it goes on from there.

    \b
    [bold]Examples[/bold]
    effir-ray demo
    effir-ray demo --out /data/demo
    """
    with show_progress():
        result = effir_ray.run_demo(out, address=address)
    if as_json:
        show_json({"front": result.front.to_pylist(), "report": result.report})
        return
    show_front(result.front)
    say(f"Report: {result.report}")


def doctor(as_json: AsJson = False) -> None:
    """Show what was detected on this machine, what follows, and why.

    \b
    [bold]Examples[/bold]
    effir-ray doctor
    effir-ray doctor --json
    """
    findings = effir_ray.diagnose()
    if as_json:
        show_json(findings)
        return
    rows = [(item.subject, item.found, item.reason if item.ok else f"! {item.reason}") for item in findings]
    show_table(["", "found", "why"], rows)


@data.command("list")
def data_list(as_json: AsJson = False) -> None:
    """List the data sets that have a name, and which of them are on this machine.

    \b
    [bold]Examples[/bold]
    effir-ray data list
    """
    listings = effir_ray.list_datasets()
    if as_json:
        show_json(listings)
        return
    show_table(
        ["data set", "documents", "test queries", "in the paper", "folder"],
        [
            (item.name, item.documents, item.test_queries, item.in_paper, item.folder and str(item.folder))
            for item in listings
        ],
    )


@data.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A name that `effir-ray data list` shows.")],
    as_json: AsJson = False,
) -> None:
    """Fetch a BEIR data set (checked, resumable) or build 'stdlib'; prints its folder.

    \b
    [bold]Examples[/bold]
    effir-ray data get scifact
    effir-ray data get cqadupstack/android
    """
    with show_progress():
        folder = effir_ray.get_dataset(name)
    if as_json:
        show_json({"name": name, "folder": folder})
    else:
        say(str(folder))
