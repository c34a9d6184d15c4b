"""Which settings of a search matter for which objective."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from effir_ray.results.schema import DEFAULT_OBJECTIVES, DIRECTIONS

_ENOUGH = 10  # trials; of fewer, the share of one setting says nothing
_MOST = 2000  # of more, an even part: the best tenth of so many already tells settings apart


def effects(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the dev rows of every study and data set among ``rows``: the settings that differ between its
    trials, their value in each trial, and their share in what makes a trial one of the best tenth in an
    objective (PED-ANOVA, Watanabe, Bansal and Hutter 2023). Nothing of studies of fewer than ten trials.
    """
    studies: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["split"] == "dev":
            studies.setdefault((row["study"], row["dataset"]), []).append(row)
    found = []
    for (study, dataset), group in studies.items():
        settings = varying_settings([json.loads(row["trial"] or "{}") for row in group])
        if len(group) > _MOST:
            places = [place * (len(group) - 1) // (_MOST - 1) for place in range(_MOST)]
            group, settings = (
                [group[place] for place in places],
                {name: [column[place] for place in places] for name, column in settings.items()},
            )
        if len(group) < _ENOUGH or len(settings) < 2:
            continue
        measured = [name for name in DEFAULT_OBJECTIVES if all(row[name] is not None for row in group)]
        shares = _shares(settings, {name: [row[name] for row in group] for name in measured})
        found.append({"study": study, "dataset": dataset, "shares": shares})
    return found


def varying_settings(trials: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """``schedule.drop_mlp`` -> its value in every trial, for settings that differ between them; no seeds.

    A part that only some trials have, as ``recovery``, is a setting itself, none or given; what stands in it
    counts where two trials that have it differ, also in whether it stands there.
    """
    flat = [dict(_leaves(trial, "")) for trial in trials]
    having = [{parent for name in trial for parent in _parents(name)} for trial in flat]
    found = {}
    names = dict.fromkeys(name for trial in flat for name in trial)
    parts = {parent for name in names for parent in _parents(name)}
    for name in names:
        place = name.rpartition(".")[0]
        present = [
            trial.get(name) for trial, own in zip(flat, having, strict=True) if name in trial or place in own
        ]
        part = name in parts
        if not name.endswith("seed") and (part or any(value != present[0] for value in present)):
            found[name] = [_value(name, trial, part) for trial in flat]
    return found


def _value(name: str, trial: dict[str, Any], part: bool) -> Any:
    given = part and any(leaf.startswith(f"{name}.") for leaf in trial)
    return "given" if given else trial.get(name)


def _parents(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _shares(settings: dict[str, list[Any]], measured: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Objective -> setting -> its share, all together 1; nothing where all values are alike."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    columns = {name: parameter(column) for name, column in settings.items()}
    distributions = {name: distribution for name, (distribution, _) in columns.items()}
    costs = [[-v if DIRECTIONS[name] == "max" else v for v in values] for name, values in measured.items()]
    found: dict[str, dict[str, float]] = {name: {} for name in measured}
    if not measured:
        return found
    study = optuna.create_study(directions=["minimize"] * len(measured))  # in memory
    study.add_trials(
        optuna.create_trial(
            params={name: column[number] for name, (_, column) in columns.items()},
            distributions=distributions,
            values=[values[number] for values in costs],
        )
        for number in range(len(costs[0]))
    )
    with _importance() as importance:
        for number, name in enumerate(measured):
            if min(costs[number]) < max(costs[number]):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that low is good, and of many equal values
                    shares = importance.get_param_importances(
                        study,
                        evaluator=importance.PedAnovaImportanceEvaluator(),
                        target=partial(_cost, number),
                    )
                found[name] = {setting: float(share) for setting, share in shares.items()}
    return found


@contextmanager
def _importance() -> Iterator[Any]:
    """``optuna.importance`` without scikit-learn, which is half of a report's time and only fANOVA's; whoever
    imports it afterwards has all of it."""
    import optuna

    name, forest = "optuna.importance", "sklearn"
    if name in sys.modules or forest in sys.modules:
        yield importlib.import_module(name)
        return
    before = vars(optuna).get("importance")
    sys.modules[forest] = None  # type: ignore[assignment]  # Python's own way to say: not to be found
    try:
        yield importlib.import_module(name)
    finally:
        del sys.modules[forest]
        for module in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[module]
        vars(optuna)["importance"] = before


def _cost(number: int, trial: Any) -> float:
    return float(trial.values[number])


def parameter(column: list[Any]) -> tuple[Any, list[Any]]:
    """One setting as Optuna takes it: a number where all its values are, else one of several texts."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kinds = {type(value) for value in column}
    if kinds == {int}:
        return IntDistribution(min(column), max(column)), column
    if kinds <= {int, float}:
        return FloatDistribution(min(column), max(column)), [float(value) for value in column]
    texts = [json.dumps(value) for value in column]
    return CategoricalDistribution(list(dict.fromkeys(texts))), texts
