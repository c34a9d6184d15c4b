"""A model out of a study: its checkpoint, with a model card that says what it is."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined

from effir_ray import storage
from effir_ray.errors import InputError
from effir_ray.mirrors import Mirror
from effir_ray.models import family as families
from effir_ray.models.folder import REMOTE_CODE, read_spec
from effir_ray.models.loading import load_config
from effir_ray.models.onnx_file import ONNX, write_onnx
from effir_ray.provenance import __version__
from effir_ray.results import store
from effir_ray.results.hub import check_hub, push
from effir_ray.results.schema import TrialRow, dataset_in_short
from effir_ray.results.selection import pareto, rows_of_trial

CARD = "README.md"

_HUB = {
    "minilm-l6": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
}
"""Packaged backbones by their name on the hub, and their licence."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """``model`` is the new folder. ``remote_code``: it needs ``trust_remote_code=True``. ``address``: where
    it was sent to, if it was."""

    model: Path
    trial_id: str
    schedule: str
    remote_code: bool
    address: str = ""


def export(
    run: Path | str,
    out: Path | str,
    *,
    trial: str | None = None,
    pick: str | None = None,
    onnx: bool = False,
    repo: str | None = None,
) -> Export:
    """Copy a trial's model from the study in ``run`` to the new folder ``out``, with a model card.

    ``trial``: its id, which may be shortened; or ``pick``: one of the front, see ``pareto``. ``onnx``: an
    ONNX file besides, see ``write_onnx``. ``repo``: send the folder to this model repository of the hub.
    Raises InputError when the study has no such trial or has not kept its model, ``out`` is there already,
    the hub does not accept the token, or what is sent.
    """
    target = Path(out)
    if (trial is None) == (pick is None):
        raise InputError("export needs one of --trial ID and --pick knee|CONDITIONS")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: there is something already; choose a new folder")
    if repo is not None:
        check_hub(repo)  # before the work, not after
    if trial is None:
        trial = pareto(run, pick=pick)["trial_id"][0].as_py()
    table = store.latest(store.read(run))
    rows = [row for row in rows_of_trial(table, trial) if row.status == "ok"]
    if not rows:
        raise InputError(f"trial {trial} failed: there is no model")
    model = _kept(run, rows[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        new = Path(scratch) / "model"
        shutil.copytree(model, new)
        if onnx:
            write_onnx(new)
        same = store.trial_rows(table.filter(pc.equal(table["backbone"], rows[0].backbone)))
        full = _full(sorted(same, key=lambda row: row.seed == rows[0].seed))  # the last counts
        (new / CARD).write_text(card(rows, full, new), encoding="utf-8")
        if target.exists():
            target.rmdir()
        new.rename(target)
    return Export(
        model=target,
        trial_id=rows[0].trial_id,
        schedule=rows[0].schedule,
        remote_code=(target / REMOTE_CODE).exists(),
        address=push(target, repo) if repo else "",
    )


def card(rows: list[TrialRow], full: dict[tuple[str, str], TrialRow], model: Path) -> str:
    """The model card: metadata that the hub reads, and text.

    ``full``: data set and split -> the full model's row.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    row = next((row for row in rows if row.split == "dev"), rows[0])
    hub, licence = _HUB.get(row.backbone, (None, None))
    name = f"{(hub or Path(row.backbone).name).rpartition('/')[2].replace(':', '-')}-{row.schedule}"
    results = [
        EvalResult(
            task_type="Retrieval",
            dataset_type=dataset_in_short(each.dataset),
            dataset_name=dataset_in_short(each.dataset),
            dataset_split=each.split,
            metric_type="ndcg_at_10",
            metric_value=each.ndcg_at_10,
        )
        for each in rows
    ]
    data = ModelCardData(
        model_name=name,
        base_model=hub,
        license=licence,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "feature-extraction", "dense-retrieval", "pruned", "effir-ray"],
        eval_results=results,
    )
    template = files("effir_ray.results").joinpath("card.md").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        name=name,
        schedule=row.schedule,
        recovered=row.recovered,
        backbone=hub or row.backbone,
        backbone_link=f"https://huggingface.co/{hub}" if hub else "#where-it-comes-from",
        version=__version__,
        parameters="" if row.parameters is None else f"{row.parameters:,}",
        ratio="" if row.parameter_ratio is None else f"{row.parameter_ratio:.1%}",
        changes=_changes(json.loads(row.plan)),
        tokens=_left(json.loads(row.trial), "vocabulary"),
        dimension=_left(json.loads(row.trial), "dimension"),
        precision=json.loads(row.trial).get("precision") or "",
        scores=[_score(each, full.get((each.dataset, each.split))) for each in rows],
        speed=_speed(row),
        hardware=row.hardware,
        remote=", trust_remote_code=True" if (model / REMOTE_CODE).exists() else "",
        onnx=ONNX if (model / ONNX).exists() else "",
        max_length=_max_length(model),
        study=row.study,
        trial_id=row.trial_id,
        seed=row.seed,
        commit=row.git_commit,
        date=f"{row.created_at:%Y-%m-%d}",
        trial=json.dumps(json.loads(row.trial), indent=2, ensure_ascii=False),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _max_length(model: Path) -> int:
    """Tokens that a text is cut to."""
    return read_spec(model, families.get(load_config(model).model_type)).max_length


def _kept(run: Path | str, row: TrialRow) -> Path:
    model = Mirror.of(run).folder / row.model
    there = True
    if row.model and storage.is_uri(run):
        model = Mirror.to_read(str(run)).folder / row.model
        place = storage.join(str(run), row.model)
        there = storage.there(storage.join(place, "config.json"))
        if there:
            storage.bring(place, model)
    if not row.model or not there or not (model / "config.json").is_file():
        raise InputError(
            f"{run}: the model of trial {row.trial_id} is not there (a study keeps those of its front, see "
            f"keep: in its space); build it again: effir-ray repeat {run} --trial {row.trial_id} --out DIR"
        )
    return model


def _full(rows: list[TrialRow]) -> dict[tuple[str, str], TrialRow]:
    full = [row for row in rows if row.schedule == "full" and row.status == "ok"]
    return {(row.dataset, row.split): row for row in full}


def _left(trial: dict[str, Any], what: str) -> str:
    """How many are left of the vocabulary or of an embedding's dimensions, where some went."""
    left = (trial.get("schedule") or {}).get(what, 0)
    return f"{left:,}" if left else ""


def _changes(plan: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """A line for every layer of ``per_layer_config`` that is not as it was."""
    return [
        {
            "number": number,
            "attention": "dropped" if "attention" in layer.get("skip", ()) else "kept",
            "mlp": "dropped"
            if "mlp" in layer.get("skip", ())
            else f"{layer['intermediate_size']} neurons"
            if "intermediate_size" in layer
            else "kept",
        }
        for number, layer in sorted(plan.items(), key=lambda item: int(item[0]))
    ]


def _score(row: TrialRow, full: TrialRow | None) -> dict[str, str]:
    interval = "" if row.ndcg_at_10_low is None else f" ({row.ndcg_at_10_low:.3f}-{row.ndcg_at_10_high:.3f})"
    return {
        "dataset": dataset_in_short(row.dataset),
        "split": row.split,
        "sample": row.sample,
        "queries": "" if row.n_queries is None else str(row.n_queries),
        "ndcg": f"{row.ndcg_at_10:.4f}{interval}",
        "recall": _figure(row.recall_at_100),
        "full": _figure(None if full is None else full.ndcg_at_10),
        "bm25": _figure(row.bm25_ndcg_at_10),
    }


def _speed(row: TrialRow) -> str:
    if row.document_speedup is None:
        return ""
    if row.document_speedup_low is None or row.schema_version < 5:  # before: the range of the rounds
        return f"{row.document_speedup:.2f} times"
    return (
        f"{row.document_speedup:.2f} times (95 % interval {row.document_speedup_low:.2f} to "
        f"{row.document_speedup_high:.2f})"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
