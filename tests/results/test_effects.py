"""Which settings matter: found where they do, and what counts as a setting."""

import json
import subprocess
import sys
from typing import Any

import numpy as np

from effir_ray.results.effects import effects, parameter, varying_settings


def test_settings_are_what_differs() -> None:
    recovery = {"steps": 40, "lora": None, "seed": 0}
    trials: list[dict[str, Any]] = [
        {"seed": 0, "schedule": {"drop_mlp": 1, "criterion": "cosine"}, "recovery": None},
        {"seed": 1, "schedule": {"drop_mlp": [1, 2], "criterion": "cosine"}, "recovery": recovery},
        {"seed": 2, "schedule": {"drop_mlp": 1, "criterion": "cosine"}, "recovery": recovery | {"steps": 80}},
    ]
    assert varying_settings(trials) == {
        "schedule.drop_mlp": [1, [1, 2], 1],
        "recovery": [None, "given", "given"],
        "recovery.steps": [None, 40, 80],
    }
    assert varying_settings(trials[1:2]) == {}


def test_widths_of_layers_are_one_setting() -> None:
    schedules = [{"width_reduction": 0.0, "layer_widths": [64, 8]}, {"width_reduction": 0.5}]
    found = varying_settings([{"schedule": schedule} for schedule in schedules])
    assert found == {"schedule.width_reduction": [0.0, 0.5], "schedule.layer_widths": [[64, 8], None]}
    _, values = parameter(found["schedule.layer_widths"])
    assert values == ["[64, 8]", "null"]


def rows(count: int) -> list[dict[str, Any]]:
    """nDCG@10 follows from the number of MLPs alone, the size from the width alone; text says nothing."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        drop, width, kind = int(random.integers(6)), float(random.random()), ["a", "b"][random.integers(2)]
        schedule = {"drop_mlp": drop, "width_reduction": width, "importance": kind}
        measured = {
            "ndcg_at_10": 0.8 - 0.1 * drop,
            "parameters": int(1e6 * (1 - width)),
            "document_speedup": None,
        }
        trial = json.dumps({"schedule": schedule})
        known = {"study": "s", "dataset": "d", "status": "ok", "split": "dev"}
        found.append({**known, "trial": trial, **measured})
    return found


def test_where_a_trial_stopped_is_a_setting_though_the_others_do_not_have_it() -> None:
    stopped, whole = {"recovery": {"steps": 9, "stop_after": 3}}, {"recovery": {"steps": 9}}
    found = varying_settings([stopped, whole, {"recovery": None}])
    assert found["recovery.stop_after"] == [3, None, None]
    assert "recovery.steps" not in found


def test_the_setting_that_decides_has_the_largest_share() -> None:
    (found,) = effects(rows(80))
    assert found["shares"].keys() == {"ndcg_at_10", "parameters"}
    for objective, decisive in (
        ("ndcg_at_10", "schedule.drop_mlp"),
        ("parameters", "schedule.width_reduction"),
    ):
        shares = found["shares"][objective]
        assert max(shares, key=shares.__getitem__) == decisive and shares[decisive] > 0.7
        assert abs(sum(shares.values()) - 1) < 1e-9


def test_few_trials_and_equal_values_say_nothing() -> None:
    assert effects(rows(9)) == []
    same = [row | {"ndcg_at_10": 0.5} for row in rows(12)]
    assert effects(same)[0]["shares"]["ndcg_at_10"] == {}


_SHARED = """
import sys
from tests.results.test_effects import rows
from effir_ray.results.effects import effects
first = effects(rows(60))[0]["shares"]
assert "sklearn" not in sys.modules
from optuna.importance import FanovaImportanceEvaluator
import optuna
study = optuna.create_study()
study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=8)
print(optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))
assert "sklearn" in sys.modules and effects(rows(60))[0]["shares"] == first
"""


def test_no_forest_is_loaded_and_none_is_kept_from_others() -> None:
    done = subprocess.run([sys.executable, "-c", _SHARED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'x': " in done.stdout
