"""search, repeat: measuring many compressed models, and one of them again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effir_ray.cli._options import Address, AsJson, Results, out_option, study_option, study_place
from effir_ray.cli._output import quantity, say, show_json, show_table
from effir_ray.errors import InputError

if TYPE_CHECKING:
    from effir_ray.search.work import Work


def search(
    space: Annotated[Path, typer.Argument(help="YAML of a search space; see search_spaces/.")],
    out: Annotated[Path | None, study_option("Folder of the study, or its URI in an object store.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every schedule's stages and size; load no weights.")
    ] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compress, train and measure a model in every way a search space names, and find the Pareto front.

    Schedules are chosen on dev queries; the front and the full model are then scored on test queries. Work
    that trials have in common is done once. A study that was stopped, however hard, goes on with --resume;
    its trials, seeds, budget, concurrency and keep may be others then. Exit code 1 when trials failed.

    \b
    [bold]Examples[/bold]
    effir-ray search search_spaces/demo.yaml --dry-run
    effir-ray search search_spaces/smollm2-135m.yaml --out runs/smollm2
    effir-ray search search_spaces/smollm2-135m.yaml --out runs/smollm2 --resume
    effir-ray search search_spaces/mistral-7b.yaml --out /shared/mistral --address auto
    effir-ray search search_spaces/mistral-7b.yaml --out s3://bucket/mistral --address auto
    """
    from effir_ray import run_search
    from effir_ray.progress import show_progress

    if dry_run:
        _show_preview(space, as_json)
        return
    if out is None:
        raise InputError("search needs --out FOLDER for the study, or --dry-run")
    with show_progress():
        result = run_search(space, out, resume=resume, address=address)
    if as_json:
        show_json(result)
    else:
        _show_result(space, out, result)
    if result.failed:
        raise typer.Exit(1)


def _show_result(file: Path, out: Path, result: Any) -> None:
    from effir_ray import SearchSpace
    from effir_ray.config import load_yaml

    space = load_yaml(file, SearchSpace)
    say(f"{result.trials} trials, {result.failed} failed, {len(result.front)} on the front")
    if not result.front:
        say(f"No trial meets the constraints: {', '.join(space.constraints)}")
    if result.freed_bytes:
        kept, freed = quantity(result.kept_bytes), quantity(result.freed_bytes)
        say(f"{kept}B of models and embeddings kept (those of the front), {freed}B freed")
    if result.shortfall:
        say(result.shortfall)
    place = shlex.quote(str(out))
    say(f"Next: effir-ray pareto {place}{_front_options(space)}; effir-ray report {place}")


def _front_options(space: Any) -> str:
    """With what ``pareto`` shows the front that the study chose."""
    from effir_ray.results.schema import DEFAULT_OBJECTIVES, OBJECTIVES_ACROSS_BACKBONES

    usual = DEFAULT_OBJECTIVES if len(space.backbone_names) == 1 else OBJECTIVES_ACROSS_BACKBONES
    options = "" if space.objectives == usual else f" --objectives {','.join(space.objectives)}"
    if space.constraints:
        options += f" --where {shlex.quote(' AND '.join(space.constraints))}"
    return options


def _say_work(work: Work) -> None:
    from effir_ray.search.work import REACHED, named_gpus

    say(
        f"To compute for dev: about {work.flops / 1e15:.3g} PFLOP, {' or '.join(named_gpus(work))} "
        f"(one GPU, at {REACHED:.0%} of its bfloat16 peak)"
    )
    if work.uncounted:
        say(
            f"Not in that: {' and '.join(work.uncounted)}, of which nobody has counted the steps of an epoch "
            "or the documents; give steps: or a sample to see them"
        )
    if work.gpu_bytes:
        say(
            f"Each GPU of the largest training holds {quantity(work.gpu_bytes)}B of weights, gradients and "
            "optimizer states, and activations"
        )


def _show_preview(space: Path, as_json: bool) -> None:
    from effir_ray import SearchSpace
    from effir_ray.config import load_yaml

    loaded = load_yaml(space, SearchSpace)  # mistakes in it are told before anything heavy is imported
    from effir_ray import preview_search

    preview = preview_search(loaded)
    several = len(preview.backbones) > 1
    if as_json:
        show_json(preview)
        return
    show_table(
        [
            *(["backbone"] if several else []),
            "schedule",
            "parameters",
            "of full",
            "FLOPs a document",
            "of full",
            "stages to run",
            "stages shared",
        ],
        [
            (
                *([trial.backbone] if several else []),
                trial.schedule,
                quantity(trial.parameters),
                f"{trial.parameter_ratio:.1%}",
                quantity(trial.flops_per_document),
                f"{trial.flops_ratio:.1%}",
                _counted(trial.new_stages),
                _counted(trial.shared_stages),
            )
            for trial in preview.trials
        ],
        title=f"{preview.study}: {', '.join(preview.backbones)} on {preview.dataset}",
    )
    stages = ", ".join(f"{name} x{count}" for name, count in preview.stages.items())
    say(f"{len(preview.trials)} schedules, {preview.sampled} more proposed by {preview.sampler}; {stages}")
    if preview.shapes:
        say(f"Up to {preview.shapes} more are shapes of unequal widths that a solver finds")
    if preview.priors:
        say(f"The sampler begins with {preview.priors} that were good elsewhere (priors)")
    if len(preview.rungs) > 1:
        begin, *on = preview.rungs
        shares = [loaded.halving.factor**place for place in range(len(on), 0, -1)]
        parts = [f"1/{share}" for share in shares[1:]] + ["all"]
        further = ", ".join(f"{count} do {part}" for count, part in zip(on, parts, strict=True))
        if loaded.strategy == "elastic":
            say(f"Elastic: {begin} begin, cut models after one training of all; of their own steps {further}")
        else:
            say(f"Halving: {begin} trainings do 1/{shares[0]} of their steps; of these {further}")
    if preview.excluded:
        say(f"Left out: {preview.excluded} combinations that do not fit their backbone or the constraints")
    _say_work(preview.work)
    if len(loaded.seeds) > 1:
        others = ", ".join(map(str, loaded.seeds[1:]))
        say(f"The front and the full model are measured with seed {others} too, which comes on top")
    peak, end = quantity(preview.peak_bytes), quantity(preview.end_bytes)
    say(f"On disk: about {peak}B at the peak, {end}B in the end (keep: {loaded.keep})")


def _counted(names: Sequence[str]) -> str:
    """``"embeddings x2"``: of several data sets each has its own."""
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in Counter(names).items())


class Keep(StrEnum):
    front = "front"
    none = "none"


def clean(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", parser=study_place, help="Folder or URI of a study.", show_default=False
        ),
    ],
    keep: Annotated[
        Keep, typer.Option(help="Whose models stay: those of the front, or nobody's.")
    ] = Keep.front,
    as_json: AsJson = False,
) -> None:
    """Delete the models and embeddings of a study's trials. Rows and scores stay.

    A study does so by itself, as `keep` in its search space says; this is for one with `keep: all`, or that
    is not needed as a whole any more. What the study still has to do stays possible: models that wait for
    their test scores are kept.

    \b
    [bold]Examples[/bold]
    effir-ray clean runs/smollm2                 # keeps the front's
    effir-ray clean runs/smollm2 --keep none
    """
    from effir_ray import clean as run_clean

    done = run_clean(run, keep=keep.value)
    if as_json:
        show_json(done)
        return
    say(f"{quantity(done.freed_bytes)}B freed, {quantity(done.kept_bytes)}B of models and embeddings kept")


def repeat(
    results: Results,
    trial: Annotated[
        str, typer.Option(help="trial_id of a row; see `effir-ray pareto`.", show_default=False)
    ],
    out: Annotated[Path, out_option("Folder for the new rows and stages.")],
    split: Annotated[
        str | None, typer.Option(help="dev or test; all that were measured when left out.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Run the trial of a row again from what the row says, and compare the scores.

    \b
    [bold]Examples[/bold]
    effir-ray repeat runs/demo --trial 3f2a9c01d4e5 --out runs/again
    """
    from effir_ray import repeat as run
    from effir_ray.progress import show_progress

    with show_progress():
        pairs = run(results, trial, out, split=split, address=address)
    if as_json:
        show_json(pairs)
        return
    _show_repetition(pairs)


def _show_repetition(pairs: Any) -> None:
    show_table(
        ["split", "schedule", "nDCG@10 then", "nDCG@10 now", "difference"],
        [
            (
                old.split,
                old.schedule,
                old.ndcg_at_10,
                new.ndcg_at_10,
                (new.ndcg_at_10 or 0) - (old.ndcg_at_10 or 0),
            )
            for old, new in pairs
        ],
    )
