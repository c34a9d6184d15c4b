"""The Optuna study of a folder: its database, its sampler and the distributions of its parameters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from effir_ray.errors import InputError
from effir_ray.results.effects import parameter, varying_settings
from effir_ray.results.schema import TrialRow
from effir_ray.search.candidates import Axis
from effir_ray.search.space import SearchSpace

STORAGE = "optuna.db"
_TESTED = "test_ndcg_at_10"


def open_study(space: SearchSpace, out: Path) -> optuna.Study:
    """The Optuna study in ``out``; optuna-dashboard opens it as ``sqlite:///OUT/optuna.db``."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Metric names and multivariate TPE count as experimental; nothing here depends on their details.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        storage=_url(out),
        study_name=study_name(space),
        directions=_directions(space),
        load_if_exists=True,
    )
    study.set_metric_names(list(space.objectives))
    # A resumed sampler must not begin again with the draws it made before.
    study.sampler = _sampler(space, space.seed + len(study.get_trials(deepcopy=False)))
    return study


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """A damaged database is an InputError of one line."""
    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{file}: not readable as Optuna's database ({reason}); move it away and --resume: it is made "
            "anew of the rows"
        ) from None


def study_name(space: SearchSpace) -> str:
    """One study for each thing that is compared: what was trained equally long."""
    if space.strategy == "independent":
        return space.name
    if space.strategy == "elastic":
        return f"{space.name}, after {space.elastic.steps or 'all'} elastic steps"
    return f"{space.name}, first of {space.halving.rungs} rungs by {space.halving.factor}"


def _url(out: Path) -> str:
    """Not pasted together: what follows a "?" in a path would be read as options."""
    return URL.create("sqlite", database=str(out / STORAGE)).render_as_string()


def _directions(space: SearchSpace) -> list[str]:
    better = {"max": "maximize", "min": "minimize"}
    return [better[direction] for direction in space.directions.values()]


def _sampler(space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    if space.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, space.trials // 4)))
    if space.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if space.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    return optuna.samplers.RandomSampler(seed=seed)


def all_trials(space: SearchSpace) -> str:
    """Under this name the database has every trial of the study, for people to look at."""
    return f"{space.name}, all trials"


def write_all_trials(space: SearchSpace, out: Path, rows: Sequence[TrialRow]) -> None:
    """Put every dev trial of ``rows``, with what it scored on test, into a study of its own in ``out``'s
    database, in the place of what was there.

    The study that the sampler learns from lacks trials that its parameters cannot express, and what has ended
    in it can be told no test score.
    """
    tested = {row.trial_id: row.ndcg_at_10 for row in rows if row.split == "test"}
    dev = sorted((row for row in rows if row.split == "dev"), key=lambda row: row.created_at)
    settings = varying_settings([json.loads(row.trial) for row in dev])
    columns = {name: parameter(column) for name, column in settings.items()}
    storage = optuna.storages.get_storage(_url(out))
    name = all_trials(space)
    if name in (known.study_name for known in storage.get_all_studies()):
        there = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        found = {(t.user_attrs["trial_id"], t.user_attrs.get(_TESTED)) for t in there}
        if found == {(row.trial_id, tested.get(row.trial_id)) for row in dev}:
            return
        optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(storage=storage, study_name=name, directions=_directions(space))
    study.set_metric_names(list(space.objectives))
    for number, row in enumerate(dev):
        measured = [getattr(row, objective) for objective in space.objectives]
        study.add_trial(
            ended_trial(
                row,
                values=None if None in measured else [float(value) for value in measured],
                params={name: column[number] for name, (_, column) in columns.items()},
                distributions={name: kind for name, (kind, _) in columns.items()},
                tested=tested.get(row.trial_id),
            )
        )


def ended_trial(
    row: TrialRow,
    *,
    values: list[float] | None,
    params: dict[str, Any],
    distributions: dict[str, Any],
    constraints: dict[str, float] | None = None,
    tested: float | None = None,
    **attributes: Any,
) -> FrozenTrial:
    """The trial of ``row`` as Optuna keeps it, with the times when it began and ended; without ``values`` it
    failed. ``tested``: what it scored on test; ``attributes`` go beside its schedule and id."""
    began = row.created_at - timedelta(seconds=row.wall_seconds or 0.0)
    known = {
        "schedule": row.schedule,
        "trial_id": row.trial_id,
        "reason": row.reason,
        _TESTED: tested,
        **attributes,
    }
    trial = optuna.trial.create_trial(
        state=TrialState.FAIL if values is None else TrialState.COMPLETE,
        values=values,
        params=params,
        distributions=distributions,
        constraints=constraints,
        user_attrs={name: value for name, value in known.items() if value not in (None, "")},
    )
    # Optuna's own times are local ones without a zone.
    trial.datetime_start, trial.datetime_complete = (
        moment.astimezone().replace(tzinfo=None) for moment in (began, row.created_at)
    )
    return trial


def distribution(axis: Axis) -> Any:
    if axis.choices is not None:
        return CategoricalDistribution(axis.choices)
    if axis.integral:
        return IntDistribution(axis.low, axis.high, step=axis.step or 1)
    return FloatDistribution(axis.low, axis.high, step=axis.step)
