"""The Optuna study of a folder: its database, its sampler and the distributions of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from effir_ray.errors import InputError
from effir_ray.search.space import Axis, SearchSpace

STORAGE = "optuna.db"


def open_study(space: SearchSpace, out: Path) -> optuna.Study:
    """The Optuna study in ``out``; optuna-dashboard opens it as ``sqlite:///OUT/optuna.db``."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Metric names and multivariate TPE count as experimental; nothing here depends on their details.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = _study(space, out)
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


def _study(space: SearchSpace, out: Path) -> optuna.Study:
    better = {"max": "maximize", "min": "minimize"}
    return optuna.create_study(
        # Not pasted together: what follows a "?" in a path would be read as options.
        storage=URL.create("sqlite", database=str(out / STORAGE)).render_as_string(),
        study_name=space.name,
        directions=[better[direction] for direction in space.directions.values()],
        load_if_exists=True,
    )


def _sampler(space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    if space.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, space.trials // 4)))
    if space.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if space.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    return optuna.samplers.RandomSampler(seed=seed)


def distribution(axis: Axis) -> Any:
    if axis.choices is not None:
        return CategoricalDistribution(axis.choices)
    if axis.integral:
        return IntDistribution(axis.low, axis.high, step=axis.step or 1)
    return FloatDistribution(axis.low, axis.high, step=axis.step)
