"""shrink, analyze, compress: a smaller model in one command; what one can lose, and losing it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from effir_ray.cli._options import Address, AsJson, Backbone, Dataset, FirstBlocks, out_option
from effir_ray.cli._output import quantity, say, show_json, show_table
from effir_ray.errors import InputError

_DROP = "K drops the K least important ones; 'i,j,..' drops these layers ('i,' for one)."


class SparsityMethod(StrEnum):
    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"


Drop = Annotated[str, typer.Option(help=_DROP, metavar="K|i,j,..")]
Texts = Annotated[int, typer.Option(min=1, help="Documents that importance is measured on.")]


def shrink(
    model: Annotated[
        str,
        typer.Argument(help="Folder of the embedder, or any name that --backbone takes.", show_default=False),
    ],
    out: Annotated[Path, out_option("Folder of the smaller model.")],
    keep: Annotated[float, typer.Option(help="Share of the Transformer blocks that stays.")] = 0.5,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set on whose test queries the two models are compared; its documents are learned "
            "from, unless --texts names others.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Text to learn from: a corpus, or files of texts or pairs (JSONL, Parquet, a folder).",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Tokens that stay, those that the texts need most; 0 keeps all.")
    ] = 0,
    minutes: Annotated[float, typer.Option(help="About how long it may take here.")] = 60.0,
    seed: int = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Make an embedder smaller and faster: cut blocks, learn the full model's embeddings, compare the two.

    Needs text, no queries and no labels. The blocks that matter least for the final vectors go; what is left
    learns to embed texts as the full model does, so documents and queries keep their meaning and most
    rankings. The result loads like the original, without effir-ray where its architecture allows. The same
    command goes on after a stop.

    \b
    [bold]Examples[/bold]
    effir-ray shrink minilm-l6 --texts corpus.jsonl --minutes 20 --out minilm-3
    effir-ray shrink ./my-embedder --keep 0.67 --dataset scifact --out smaller
    effir-ray shrink ./my-embedder --texts passages/ --dataset scifact --out smaller
    effir-ray shrink minilm-l6 --texts corpus.jsonl --vocabulary 12000 --out smallest
    """
    from effir_ray import shrink as run
    from effir_ray.progress import show_progress

    with show_progress():
        result = run(
            model,
            out,
            keep=keep,
            dataset=dataset,
            texts=texts,
            vocabulary=vocabulary,
            minutes=minutes,
            seed=seed,
            address=address,
        )
    if as_json:
        show_json(result)
    else:
        _show_shrunk(result)


def _show_shrunk(result: Any) -> None:
    compared = result.comparison
    sizes = {"full": compared.full_parameters, "small": compared.parameters}
    metrics = list(compared.scores["full"])
    show_table(
        ["", "parameters", *metrics],
        [
            (
                name if name != "bm25" else "BM25",
                quantity(sizes.get(name)),
                *(f"{scores[metric]:.4f}" for metric in metrics),
            )
            for name, scores in compared.scores.items()
        ],
        title=compared.measure,
    )
    lost, (low, high) = compared.lost, compared.document_speedup_interval
    say(
        f"Lost of {metrics[0]}: {lost.mean:.4f} (95 % interval {lost.low:.4f} to {lost.high:.4f}, {lost.n} "
        "queries)"
    )
    say(
        f"Documents {compared.document_speedup:.2f}x as fast (95 % interval {low:.2f} to {high:.2f}; "
        f"{compared.flops_ratio:.0%} of the FLOPs), queries {compared.query_speedup:.2f}x, on "
        f"{compared.hardware}"
    )
    kept = ", ".join(str(block) for block in result.kept_blocks)
    kind = "ordinary checkpoint" if result.ordinary else "needs trust_remote_code=True"
    say(f"Blocks {kept} of {result.blocks}, {result.steps} steps on {result.texts} texts; {kind}: ")
    say(f"  {result.checkpoint}")


def analyze(
    backbone: Backbone,
    out: Annotated[Path, out_option("Folder for the table, JSON and HTML page.")],
    criteria: Annotated[
        str, typer.Option(help="Comma-separated: cosine, pooled, dev-loss, random.")
    ] = "cosine",
    dataset: Dataset = "stdlib",
    texts: Texts = 256,
    first_blocks: FirstBlocks = None,
    as_json: AsJson = False,
) -> None:
    """Measure how redundant every sublayer is, and what dropping it would save.

    \b
    [bold]Examples[/bold]
    effir-ray analyze --backbone minilm-l6 --out runs/minilm-analysis
    effir-ray analyze --backbone smollm2-135m --criteria cosine,pooled --out runs/a
    """
    from effir_ray import analyze as run
    from effir_ray.progress import show_progress

    with show_progress():
        result = run(
            backbone,
            out,
            criteria=criteria.split(","),
            dataset=dataset,
            texts=texts,
            first_blocks=first_blocks,
        )
    if as_json:
        show_json(result)
        return
    show_table(
        ["layer", "unit", *result.criteria],
        [
            (rows[0].layer, rows[0].unit, *(row.importance for row in rows))
            for unit in ("attention", "mlp", "block")
            for rows in zip(*(result.group(criterion, unit) for criterion in result.criteria), strict=True)
        ],
        title=f"{backbone}: importance, higher = keep",
    )
    say(f"Page: {out / 'analysis.html'}")


def compress(
    backbone: Backbone,
    out: Annotated[Path | None, out_option("Checkpoint folder to write.")] = None,
    drop_attention: Drop = "0",
    drop_mlp: Drop = "0",
    drop_block: Drop = "0",
    drop_last_blocks: Annotated[int, typer.Option(min=0, help="Drop the last K blocks.")] = 0,
    width_reduction: Annotated[
        float, typer.Option(min=0, help="Fraction of the remaining MLP neurons to remove, e.g. 0.3.")
    ] = 0.0,
    layer_widths: Annotated[
        str,
        typer.Option(
            help="Or the neurons that each layer keeps, e.g. 1536,1024,0: one number a layer, 0 without MLP.",
            metavar="WIDTHS",
            show_default=False,
        ),
    ] = "",
    importance: Annotated[
        str, typer.Option(help="cosine, pooled, dev-loss or random.", metavar="CRITERION")
    ] = "cosine",
    width_method: Annotated[
        str,
        typer.Option(
            help="self-slimming, magnitude, activation, gate-activation, taylor or random.", metavar="METHOD"
        ),
    ] = "self-slimming",
    width_multiple: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Round the width of every MLP to this; 64 for wide models, 8 for others when left out.",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Tokens that stay, those that the texts need most; 0 keeps all.")
    ] = 0,
    dimension: Annotated[
        int, typer.Option(min=0, help="Length of the embeddings, fewer than the model's; 0 keeps all.")
    ] = 0,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Set weights to zero: 2:4, or a fraction such as 0.5.", metavar="N:M|FRACTION"),
    ] = None,
    sparsity_method: Annotated[
        SparsityMethod, typer.Option(help="How the weights that become zero are chosen.")
    ] = SparsityMethod.wanda,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Round to the nearest ordinary shape: whole blocks, one width."),
    ] = False,
    dataset: Dataset = "stdlib",
    texts: Texts = 256,
    texts_from: Annotated[
        str | None,
        typer.Option(
            help="Corpus or file (JSONL, Parquet) of these texts, instead of --dataset.", show_default=False
        ),
    ] = None,
    gate_steps: Annotated[int, typer.Option(min=1, help="Training steps of self-slimming.")] = 500,
    first_blocks: FirstBlocks = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Put before every query; the model's own when left out.")
    ] = None,
    document_prompt: Annotated[str | None, typer.Option(help="Put before every document, likewise.")] = None,
    seed: int = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and its size; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Cut sublayers and neurons out of a model and save it as a checkpoint, without training.

    Depth goes first (blocks, then attention and MLP sublayers), then width: the neurons that are left are
    ranked over all layers at once, or each layer keeps the number that `--layer-widths` gives it; sparsity,
    for comparison, zeroes single weights of what remains. Train the result with `effir-ray train`
    (`keep_zeros: true` keeps it sparse).

    `--vocabulary` takes rows out of the embedding matrix, in small models a fifth to two thirds of all
    parameters: texts whose tokens stay are embedded as before, other words are spelt in shorter pieces.

    `--dimension` projects embeddings to the directions in which those of the texts differ most: an index is
    smaller, and searched faster. The matrix is part of the checkpoint.

    Where only whole blocks went and all MLPs are as wide, an ordinary checkpoint is written, which every tool
    loads; any other shape brings its modelling code (`trust_remote_code=True`). `--uniform` asks for the
    ordinary shape with nearly as many parameters: as many whole blocks go, the least important ones, as the
    dropped sublayers weigh; then all MLPs keep the same number of neurons, the best of each.

    \b
    [bold]Examples[/bold]
    effir-ray compress --backbone smollm2-135m --drop-mlp 4 --out small
    effir-ray compress --backbone minilm-l6 --drop-attention 1,3 --width-reduction 0.3 --out smaller
    effir-ray compress --backbone minilm-l6 --layer-widths 1536,1280,1024,768,768,1024 --out uneven
    effir-ray compress --backbone smollm2-135m --drop-last-blocks 8 --dry-run
    effir-ray compress --backbone minilm-l6 --drop-mlp 2 --width-reduction 0.3 --uniform --out plain
    effir-ray compress --backbone minilm-l6 --vocabulary 12000 --texts-from corpus.jsonl --out fewer-tokens
    effir-ray compress --backbone minilm-l6 --dimension 192 --texts-from corpus.jsonl --out shorter
    effir-ray compress --backbone minilm-l6 --sparsity 2:4 --out sparse
    effir-ray compress --backbone my-llm --drop-mlp 8 --query-prompt "Query: " --out prompted
    """
    from effir_ray import Calibration, GateTraining, Schedule
    from effir_ray import compress as run
    from effir_ray.config import parse
    from effir_ray.progress import show_progress

    if out is None and not dry_run:
        raise InputError("compress needs --out FOLDER to write to, or --dry-run")
    settings: dict[str, Any] = {
        "drop_attention": drop_attention,
        "drop_mlp": drop_mlp,
        "drop_block": drop_block,
        "drop_last_blocks": drop_last_blocks,
        "width_reduction": width_reduction,
        "layer_widths": layer_widths,
        "importance": importance,
        "width_method": width_method,
        "width_multiple": width_multiple,
        "vocabulary": vocabulary,
        "dimension": dimension,
    }
    schedule = parse(settings, Schedule, source="options of compress")
    with show_progress():
        result = run(
            backbone,
            schedule,
            None if dry_run else out,
            first_blocks=first_blocks,
            prompts=_prompts(query_prompt, document_prompt),
            calibration=Calibration(
                dataset=dataset,
                texts=texts,
                texts_from=texts_from,
                gates=GateTraining(steps=gate_steps),
                seed=seed,
            ),
            sparsity=sparsity,
            sparsity_method=sparsity_method.value,
            uniform=uniform,
        )
    if as_json:
        show_json(result)
        return
    _show_plan(result)
    if result.layout is None:
        say("Dry run: nothing was written.")
        return
    ordinary = "Ordinary checkpoint (no remote code)"
    kind = ordinary if result.layout.ordinary else "Checkpoint with modelling code (trust_remote_code=True)"
    say(f"{kind}, because {result.layout.reason}: {result.checkpoint}")


def _prompts(query: str | None, document: str | None) -> Any:
    from effir_ray.config import Prompts, parse

    if query is None and document is None:
        return None
    given = {"query": query or "", "document": document or ""}
    return parse(given, Prompts, source="prompts of compress")


def _show_plan(result: Any) -> None:
    """A line a layer where it is known which layers go, then the totals."""
    if result.plan is None:
        say(f"{result.backbone}: {result.schedule}; which layers go is measured when it is written")
        _show_totals(result)
        return
    show_table(
        ["layer", "attention", "MLP"],
        [
            (
                index,
                "kept" if layer.attention else "-",
                "-"
                if not layer.mlp
                else "kept"
                if layer.neurons is None
                else f"{len(layer.neurons)} neurons",
            )
            for index, layer in enumerate(result.plan.layers)
        ],
        title=f"{result.backbone}: {result.schedule}",
    )
    _show_totals(result)


def _show_totals(result: Any) -> None:
    share = result.parameters / result.full_parameters
    work = result.flops_per_document / result.full_flops_per_document
    say(
        f"{quantity(result.parameters)} of {quantity(result.full_parameters)} parameters ({share:.1%}), "
        f"{work:.1%} of the FLOPs of a document of {result.document_tokens} tokens"
        + (f"; embeddings of {result.plan.dimension}" if result.plan and result.plan.dimension else "")
        + (f"; {result.zeros:.1%} of the block weights are zero" if result.zeros else "")
    )
