"""Optuna's side of a study: the storage in the output folder, the sampler, the parameters' distributions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effir_ray.search.space import OBJECTIVES, Axis, SearchSpace

if TYPE_CHECKING:
    import optuna

STORAGE = "optuna.db"


def open_study(space: SearchSpace, out: Path) -> optuna.Study:
    """The Optuna study in ``out``; optuna-dashboard opens it as ``sqlite:///OUT/optuna.db``."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Metric names and multivariate TPE count as experimental; nothing here depends on their details.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        storage=f"sqlite:///{out.resolve() / STORAGE}",
        study_name=space.name,
        directions=["maximize" if direction == "max" else "minimize" for direction in OBJECTIVES.values()],
        load_if_exists=True,
    )
    study.set_metric_names(list(OBJECTIVES))
    # A resumed sampler must not begin again with the draws it made before.
    study.sampler = _sampler(space, space.seed + len(study.get_trials(deepcopy=False)))
    return study


def _sampler(space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    if space.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, space.trials // 4)))
    if space.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if space.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    return optuna.samplers.RandomSampler(seed=seed)


def distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.choices is not None:
        return CategoricalDistribution(axis.choices)
    if axis.integral:
        return IntDistribution(axis.low, axis.high, step=axis.step or 1)
    return FloatDistribution(axis.low, axis.high, step=axis.step)
