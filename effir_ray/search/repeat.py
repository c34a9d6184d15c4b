"""Repeating a trial from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effir_ray.cluster.connection import connect
from effir_ray.config import parse
from effir_ray.errors import InputError
from effir_ray.readers import parse_json
from effir_ray.results import store
from effir_ray.results.schema import TrialRow
from effir_ray.search.folder import STAGES
from effir_ray.search.space import TrialConfig
from effir_ray.search.trial import run_trial
from effir_ray.stages import StageStore


def repeat(
    results: Sequence[Path | str],
    trial: str,
    out: Path | str,
    *,
    split: str | None = None,
    address: str | None = None,
) -> list[tuple[TrialRow, TrialRow]]:
    """Do the trial of these rows once more, every stage anew in ``out``: (row then, row now) for each split.

    ``trial`` is a trial id, which may be shortened as long as one trial matches. Scores come out the same;
    speeds are measured anew. Raises InputError when there is no such row, it failed, or ``out`` is not empty.
    """
    folder = Path(out).resolve()
    originals = _find(results, trial, split)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; a repetition starts from nothing, choose another --out")
    connect(address)
    stages = StageStore(folder / STAGES)
    pairs = []
    for original in originals:
        place = f"the row of trial {original.trial_id}"
        config = parse(parse_json(original.trial, place), TrialConfig, source=place)
        repeated = run_trial(
            config, stages, split="test" if original.split == "test" else "dev", study=original.study
        )
        store.append(folder, [repeated])
        pairs.append((original, repeated))
    return pairs


def _find(results: Sequence[Path | str], trial: str, split: str | None) -> list[TrialRow]:
    rows = [
        row
        for row in store.trial_rows(store.latest(store.read(results)))
        if row.trial_id.startswith(trial) and split in (None, row.split)
    ]
    if not rows:
        place = ", ".join(map(str, results))
        where = f" on split {split}" if split else ""
        raise InputError(f"{place}: no trial '{trial}'{where}; effir-ray pareto shows the ids there are")
    found = sorted({row.trial_id for row in rows})
    if len(found) > 1:
        raise InputError(f"'{trial}' fits {len(found)} trials ({', '.join(found)}); give more digits")
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        raise InputError(f"trial {found[0]} failed ({failed[0].reason}): there are no scores to compare with")
    return rows
