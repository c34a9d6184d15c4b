"""pareto, query, report: reading what searches have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effir_ray.cli._options import AsJson, Results
from effir_ray.cli._output import quantity, say, show_json, show_table
from effir_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def pareto(
    results: Results,
    where: Annotated[str | None, typer.Option(help="SQL condition on the rows.", metavar="SQL")] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            help="Show one row: 'knee' (the most balanced), or the best that meets conditions.",
            metavar="knee|CONDITIONS",
        ),
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(help="Columns, comma-separated; those of the search when left out.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split the front is chosen on; dev where there is one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the Pareto front: the models that no other model beats in every objective.

    \b
    [bold]Examples[/bold]
    effir-ray pareto runs/demo
    effir-ray pareto runs/a runs/b --where "dataset = 'scifact' AND recovered"
    effir-ray pareto runs/demo --pick "ndcg_at_10>=0.45"   smallest so good
    effir-ray pareto runs/demo --pick "parameters<=6e7"    best so small
    effir-ray pareto runs/demo --pick knee --json
    """
    from effir_ray import pareto as run

    names = [name.strip() for name in objectives.split(",")] if objectives else []
    front = run(results, where=where, pick=pick, objectives=names, split=split)
    if as_json:
        show_json(front.to_pylist())
    else:
        show_front(front)


def show_front(front: pa.Table) -> None:
    """A line a model of the front."""
    rows = front.to_pylist()
    show_table(
        [
            "trial",
            "schedule",
            "trained",
            "nDCG@10",
            "test",
            "parameters",
            "of full",
            "doc ms",
            "doc speed-up",
        ],
        [
            (
                row["trial_id"],
                row["schedule"],
                "yes" if row["recovered"] else "",
                _with_interval(row),
                "" if row["test_ndcg_at_10"] is None else f"{row['test_ndcg_at_10']:.4f}",
                quantity(row["parameters"]),
                "" if row["parameter_ratio"] is None else f"{row['parameter_ratio']:.1%}",
                row["document_ms"],
                row["document_speedup"],
            )
            for row in rows
        ],
        title=", ".join(
            sorted({f"{row['backbone']} on {row['dataset']}, {row['split']} queries" for row in rows})
        ),
    )
    for score in sorted({row["bm25_ndcg_at_10"] for row in rows if row["bm25_ndcg_at_10"] is not None}):
        say(f"BM25 on the same queries and documents: {score:.4f}")


def _with_interval(row: Mapping[str, Any]) -> str:
    """``0.7541 (0.70-0.81)``: nDCG@10 with its 95 % interval, where the row has one."""
    low, high = row["ndcg_at_10_low"], row["ndcg_at_10_high"]
    return f"{row['ndcg_at_10']:.4f}" + ("" if low is None else f" ({low:.2f}-{high:.2f})")


def query(
    results: Annotated[
        list[str], typer.Argument(metavar="DIR SQL", help="Folders of results, then one SELECT.")
    ],
    as_json: AsJson = False,
) -> None:
    """Ask the result tables in SQL (DuckDB): `rows` are yours, `published` the paper's figures.

    `query_scores` has what every query scored. The query sees these three tables and nothing else of this
    machine.

    \b
    [bold]Examples[/bold]
    effir-ray query runs/demo "SELECT schedule, ndcg_at_10, parameters FROM rows WHERE split = 'dev'"
    effir-ray query runs/demo "DESCRIBE rows"
    effir-ray query runs/a runs/b "SELECT study, avg(ndcg_at_10) FROM rows GROUP BY study" --json
    """
    from effir_ray import query as run

    *folders, sql = results
    if not folders:
        raise InputError('query needs folders and a SELECT: effir-ray query DIR "SELECT ..."')
    table = run(folders, sql)
    if as_json:
        show_json(table.to_pylist())
    else:
        show_table(table.schema.names, zip(*(column.to_pylist() for column in table.columns), strict=True))


def report(
    results: Results,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .html interactive, .svg or .png a picture. DIR/report.html."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the results as one self-contained page with an interactive Pareto plot, or as a picture.

    \b
    [bold]Examples[/bold]
    effir-ray report runs/demo
    effir-ray report runs/a runs/b --out comparison.html
    effir-ray report runs/demo --out front.svg
    """
    from effir_ray import report as run

    first = results[0]
    written = run(results, out or (first.parent if first.is_file() else first) / "report.html")
    if as_json:
        show_json({"file": written})
    else:
        say(f"Report: {written}")
