"""pareto, compare, query, report, export: reading what searches have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effir_ray.cli._options import AsJson, Results, SkipDamaged, out_option, study_place
from effir_ray.cli._output import Format, quantity, say, show_as, show_json, show_table, warn
from effir_ray.errors import InputError
from effir_ray.storage import is_uri

if TYPE_CHECKING:
    import pyarrow as pa

    from effir_ray.results.tables import Damaged


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
    mean_datasets: Annotated[
        bool,
        typer.Option("--mean-datasets", help="Mean over data sets, for what was measured on all of them."),
    ] = False,
    skip_damaged: SkipDamaged = False,
    as_json: AsJson = False,
) -> None:
    """Show the Pareto front: the models that no other model beats in every objective.

    A model that over these queries is no better than a smaller one of the front, beyond chance, names it.
    Trials that differ only in their seed are one row: means, with the standard deviation over seeds.

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
    damaged = _damaged(skip_damaged)
    front = run(
        results,
        where=where,
        pick=pick,
        objectives=names,
        split=split,
        mean_datasets=mean_datasets,
        damaged=damaged,
    )
    if as_json:
        show_json(front.to_pylist())
    else:
        show_front(front)


def _damaged(skip: bool) -> Damaged | None:
    """Who hears of files that are left out; None: they end the command."""
    return (lambda message: warn(f"left out: {message}")) if skip else None


def show_front(front: pa.Table) -> None:
    """A line a model of the front."""
    from effir_ray.results.selection import FAILED, is_doubtful

    rows = front.to_pylist()
    several = len({row["backbone"] for row in rows}) > 1
    datasets = [json.loads(row["datasets"]) for row in rows] if "datasets" in front.schema.names else []
    single = sorted({name for found in datasets for name in found})
    named = " and ".join(Path(name).name for name in single)
    show_table(
        [
            "trial",
            *(["backbone"] if several else []),
            "schedule",
            "trained",
            "nDCG@10",
            "test",
            "no better than",
            "parameters",
            "of full",
            "doc ms",
            "doc speed-up",
            *(Path(name).name for name in single),
        ],
        [
            (
                row["trial_id"],
                *([row["backbone"]] if several else []),
                row["schedule"],
                "yes" if row["recovered"] else "",
                _with_interval(row),
                "" if row["test_ndcg_at_10"] is None else f"{row['test_ndcg_at_10']:.4f}",
                row["not_better_than"] or "",
                quantity(row["parameters"]),
                "" if row["parameter_ratio"] is None else f"{row['parameter_ratio']:.1%}",
                row["document_ms"],
                row["document_speedup"],
                *(f"{datasets[number][name]:.4f}" if name in datasets[number] else "" for name in single),
            )
            for number, row in enumerate(rows)
        ],
        title=", ".join(
            sorted(
                {f"{row['backbone']} on {named or row['dataset']}, {row['split']} queries" for row in rows}
            )
        ),
    )
    if any((row.get("seeds") or 1) > 1 for row in rows):
        say("±: standard deviation over seeds, of which each row is the mean")
    for score in sorted({row["bm25_ndcg_at_10"] for row in rows if row["bm25_ndcg_at_10"] is not None}):
        say(f"BM25 on the same queries and documents: {score:.4f}")
    if failed := int((front.schema.metadata or {}).get(FAILED, 0)):
        verb = "is" if failed == 1 else "are"
        say(
            f"{failed} trial{'' if failed == 1 else 's'} failed on these queries and {verb} left out: "
            "effir-ray query DIR \"SELECT schedule, split, reason FROM trials WHERE status = 'failed'\""
        )
    for row in rows:
        if is_doubtful(row):
            say(
                f"{row['schedule']}: {row['document_speedup']:.2f}x is more than its FLOPs explain "
                f"({1 / row['flops_ratio']:.2f}x): measure it again on a quiet machine"
            )


def _with_interval(row: Mapping[str, Any]) -> str:
    """``0.7541 (0.70-0.81)``: nDCG@10 with its 95 % interval, where the row has one."""
    if row.get("ndcg_at_10_sd") is not None:
        return f"{row['ndcg_at_10']:.4f} ±{row['ndcg_at_10_sd']:.4f}, {row['seeds']} seeds"
    low, high = row["ndcg_at_10_low"], row["ndcg_at_10_high"]
    return f"{row['ndcg_at_10']:.4f}" + ("" if low is None else f" ({low:.2f}-{high:.2f})")


def compare(
    results: Results,
    trial: Annotated[
        list[str] | None,
        typer.Option(
            help="Trial id, may be shortened; give two or more, the baseline first. When left out, all "
            "trials against the full model.",
            metavar="ID",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split whose queries count; test where two models have it.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="ndcg_at_10, recall_at_100, mrr_at_10 or map_at_100.")
    ] = "ndcg_at_10",
    skip_damaged: SkipDamaged = False,
    as_json: AsJson = False,
) -> None:
    """Compare models over the same queries: which differences are more than chance.

    Shows each difference to the baseline with its paired bootstrap 95 % interval, and the p of the paired
    randomisation test, adjusted (Holm) for all differences shown.

    \b
    [bold]Examples[/bold]
    effir-ray compare runs/demo               everything against the full model
    effir-ray compare runs/demo --trial 3f2a --trial 91bc
    effir-ray compare runs/demo --split dev --metric recall_at_100 --json
    """
    from effir_ray import compare as run
    from effir_ray.results.schema import dataset_in_short

    found = run(results, trial or (), split=split, metric=metric, damaged=_damaged(skip_damaged))
    compared = found.to_pylist()
    if as_json:
        show_json(compared)
        return
    first = compared[0]
    apart = [name for name in ("backbone", "seed") if len({row[name] for row in compared}) > 1]
    show_table(
        [
            "trial",
            *apart,
            "schedule",
            "trained",
            metric,
            "difference",
            "95 % interval",
            "p (Holm)",
            "of full",
            "doc speed-up",
        ],
        [
            (
                row["trial_id"],
                *(str(row[name]) for name in apart),
                row["schedule"],
                "yes" if row["recovered"] else "",
                f"{row['score']:.4f}",
                "baseline" if row["difference"] is None else f"{row['difference']:+.4f}",
                ""
                if row["difference"] is None
                else f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}",
                "" if row["p_holm"] is None else f"{row['p_holm']:.4f}",
                "" if row["parameter_ratio"] is None else f"{row['parameter_ratio']:.1%}",
                row["document_speedup"],
            )
            for row in compared
        ],
        title=f"{first['queries']} {first['split']} queries of {dataset_in_short(first['dataset'])}",
    )


def query(
    results: Annotated[
        list[str] | None, typer.Argument(metavar="DIR SQL", help="Folders of results, then one SELECT.")
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="How to write the result; all but 'table' and 'md' are exact.")
    ] = "table",
    schema: Annotated[
        bool, typer.Option("--schema", help="List the tables and their columns, without any folder.")
    ] = False,
    skip_damaged: SkipDamaged = False,
    as_json: AsJson = False,
) -> None:
    """Ask the result tables in SQL (DuckDB): `trials` are yours, `published` the paper's figures.

    `query_scores` has what every query scored, `layers` what stays of every block, `importance` and `curves`
    what a study measured and how its trainings went. The query sees these tables and nothing else of this
    machine. Ends after 8 s. `measurements` is the table that a benchmark without trials has written (a CSV,
    JSON or Parquet file, or its folder).

    \b
    [bold]Examples[/bold]
    effir-ray query runs/demo "SELECT schedule, ndcg_at_10, parameters FROM trials WHERE split = 'dev'"
    effir-ray query --schema
    effir-ray query runs/demo "SELECT model, step, loss FROM curves ORDER BY model, step"
    effir-ray query runs/demo "SELECT * FROM trials" --format parquet > trials.parquet
    effir-ray query results/slimming "SELECT method, avg(dev_loss) FROM measurements GROUP BY method"
    effir-ray query runs/a runs/b "SELECT study, avg(ndcg_at_10) FROM trials GROUP BY study" --format md
    """
    from effir_ray import query as run
    from effir_ray.results import query as tables

    form = "json" if as_json else form
    if schema:
        show_as(tables.schema(), form)
        return
    *folders, sql = results or [""]
    if not folders:
        raise InputError('query needs folders and a SELECT: effir-ray query DIR "SELECT ..."')
    show_as(run(folders, sql, damaged=_damaged(skip_damaged)), form)


def report(
    results: Results,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .html interactive, .svg or .png a picture. DIR/report.html."),
    ] = None,
    skip_damaged: SkipDamaged = False,
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
    place = Path() if is_uri(first) else first
    target = out or (place.parent if place.is_file() else place) / "report.html"
    written = run(results, target, damaged=_damaged(skip_damaged))
    if as_json:
        show_json({"file": written})
    else:
        say(f"Report: {written}")


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", parser=study_place, help="Folder or URI of a study.", show_default=False
        ),
    ],
    out: Annotated[Path, out_option("New folder for the model.")],
    trial: Annotated[
        str | None, typer.Option(help="Trial id, may be shortened.", metavar="ID", show_default=False)
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            help="One of the front instead, as in pareto: 'knee', or the best that meets conditions.",
            metavar="knee|CONDITIONS",
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write onnx/model.onnx besides; checked against torch.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(help="Send the folder to this model repository of the hub; a new one is private."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a trial's model out of a study, with a model card.

    The card says what was taken out, scores, speed and how to load it. The folder loads in
    sentence-transformers and transformers, and is what a model hub takes. A study keeps the models of its
    front.

    \b
    [bold]Examples[/bold]
    effir-ray export runs/demo --trial 3f2a9c01 --out small
    effir-ray export runs/demo --pick "ndcg_at_10>=0.45" --out small
    effir-ray export runs/demo --pick knee --out small --onnx --push me/small
    """
    from effir_ray import export as run_export

    done = run_export(run, out, trial=trial, pick=pick, onnx=onnx, repo=push)
    if as_json:
        show_json(done)
        return
    remote = ", trust_remote_code=True" if done.remote_code else ""
    say(f"{done.schedule} (trial {done.trial_id}), with its model card: {done.model / 'README.md'}")
    if done.address:
        say(f"Sent to {done.address}")
    say(f'Next: SentenceTransformer("{done.model}"{remote})')
