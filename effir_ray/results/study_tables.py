"""Tables that follow from a study's folder beside its rows: what stays of every layer, importance, learning.

``layers`` comes from the rows; ``importance`` and ``curves`` from the stages that a study keeps.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.readers import parse_json, read_json
from effir_ray.results.tables import Damaged, Folders, as_places

LAYERS = pa.schema(
    [
        pa.field("study", pa.string(), metadata={"description": "the row's study"}),
        pa.field("trial_id", pa.string(), metadata={"description": "the row's trial_id"}),
        pa.field("layer", pa.int64(), metadata={"description": "block of the full model, from 0"}),
        pa.field("attention", pa.bool_(), metadata={"description": "whether its attention stays"}),
        pa.field("mlp_neurons", pa.int64(), metadata={"description": "neurons that stay of its MLP"}),
    ]
)
IMPORTANCE = pa.schema(
    [
        pa.field("folder", pa.string(), metadata={"description": "the study's folder"}),
        pa.field("criterion", pa.string(), metadata={"description": "how importance was measured"}),
        pa.field("seed", pa.int64(), metadata={"description": "which texts it was measured on"}),
        pa.field("unit", pa.string(), metadata={"description": "attention, mlp or block"}),
        pa.field("layer", pa.int64(), metadata={"description": "block of the full model, from 0"}),
        pa.field("score", pa.float64(), metadata={"description": "importance; the least goes first"}),
    ]
)
CURVES = pa.schema(
    [
        pa.field("folder", pa.string(), metadata={"description": "the study's folder"}),
        pa.field("model", pa.string(), metadata={"description": "the trained model, as in trials.model"}),
        pa.field("step", pa.int64(), metadata={"description": "optimizer steps done"}),
        pa.field("loss", pa.float64(), metadata={"description": "of the step's batch"}),
        pa.field("learning_rate", pa.float64(), metadata={"description": "of the step"}),
        pa.field("dev_ndcg_at_10", pa.float64(), metadata={"description": "where dev was scored after it"}),
        pa.field("tokens_per_s", pa.float64(), metadata={"description": "tokens trained a second"}),
    ]
)
_UNITS = ("attention", "mlp", "block")


def layers(rows: pa.Table) -> pa.Table:
    """A line for every block of the model of every trial in ``rows``; of rows that say how many there are."""
    names = ["study", "trial_id", "plan", "blocks", "mlp_width"]
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for record in rows.select(names).to_pylist():
        if record["blocks"]:
            seen.setdefault((record["study"], record["trial_id"]), record)
    records = [
        {"study": study, "trial_id": trial, "layer": number, "attention": attention, "mlp_neurons": neurons}
        for (study, trial), record in seen.items()
        for number, (attention, neurons) in enumerate(kept(record))
    ]
    return pa.Table.from_pylist(records, schema=LAYERS)


def kept(row: dict[str, Any]) -> list[tuple[bool, int]]:
    """(whether attention stays, neurons of the MLP that stay) of every block of the full model."""
    changed = json.loads(row["plan"] or "{}")
    width = row["mlp_width"] or 0
    found = []
    for number in range(row["blocks"] or 0):
        change = changed.get(str(number), {})
        skipped = change.get("skip", ())
        neurons = 0 if "mlp" in skipped else change.get("intermediate_size", width)
        found.append(("attention" not in skipped, neurons))
    return found


def importance(folders: Folders, *, damaged: Damaged | None = None) -> pa.Table:
    """Every importance that the studies in ``folders`` measured."""
    records: list[dict[str, Any]] = []
    for folder in as_places(folders):
        for file in _finished(folder, "importance/*/importance.json"):
            with _told(damaged):
                scores, inputs = _measured(file)
                records += [
                    {
                        "folder": str(folder),
                        "criterion": scores["criterion"],
                        "seed": inputs.get("seed"),
                        "unit": unit,
                        "layer": layer,
                        "score": score,
                    }
                    for unit in _UNITS
                    for layer, score in enumerate(scores[unit])
                ]
    return _table(records, IMPORTANCE)


def curves(
    folders: Folders, *, models: Collection[str] | None = None, damaged: Damaged | None = None
) -> pa.Table:
    """Every step of the trainings of the studies in ``folders``, the last time it was done; ``models``: of
    these alone, named as in the rows."""
    records: list[dict[str, Any]] = []
    measured = [field.name for field in CURVES if field.name not in ("folder", "model")]
    for folder in as_places(folders):
        for file in _finished(folder, "*/*/history.jsonl"):
            model = (file.parent / "checkpoint").relative_to(folder).as_posix()
            if models is not None and model not in models:
                continue
            with _told(damaged):
                steps = {row["step"]: row for row in _steps(file)}
                records += [
                    {
                        "folder": str(folder),
                        "model": model,
                        **{name: steps[step].get(name) for name in measured},
                    }
                    for step in sorted(steps)
                ]
    return _table(records, CURVES)


def _finished(folder: Path, pattern: str) -> list[Path]:
    """Files of stages that are complete: others are being written."""
    files = sorted(folder.glob(f"stages/{pattern}"))
    return [file for file in files if (file.parent / "stage.json").exists()]


def _measured(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an importance stage measured, and from what."""
    scores = _dict(read_json(file), file)
    if not all(isinstance(scores.get(unit), list) for unit in _UNITS) or "criterion" not in scores:
        raise InputError(f"{file}: no importance of {', '.join(_UNITS)}; delete its folder and resume")
    stage = file.parent / "stage.json"
    return scores, _dict(_dict(read_json(stage), stage).get("inputs", {}), stage)


def _steps(file: Path) -> Iterator[dict[str, Any]]:
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        row = _dict(parse_json(line, f"{file}:{number}"), file)
        if not isinstance(row.get("step"), int):
            raise InputError(f"{file}:{number}: expected a step of a training, which has a number")
        yield row


def _dict(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected an object")
    return value


def _table(records: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist(records, schema=schema)
    except (pa.ArrowException, OverflowError) as error:
        places = ", ".join(dict.fromkeys(record["folder"] for record in records))
        reason = str(error).partition("\n")[0]
        raise InputError(f"{places}: a stage has values of another type ({reason})") from None


@contextmanager
def _told(damaged: Damaged | None) -> Iterator[None]:
    """What is wrong with a file ends the reading, or is told where somebody hears it."""
    try:
        yield
    except InputError as error:
        if damaged is None:
            raise
        damaged(str(error))
