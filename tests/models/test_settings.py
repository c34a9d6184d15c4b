"""Fields of a model folder's JSON files; the wrong ones are in ``test_bad_inputs``."""

from __future__ import annotations

import pytest

from effir_ray.models import settings
from effir_ray.models.random_models import random_config


@pytest.mark.parametrize("pattern", ["q_proj", "layers.0.mlp", r"layers\.\d+\.mlp\..*", "(?:up|down)_proj"])
def test_plain_patterns_of_adapters_are_taken(pattern: str) -> None:
    settings.check_pattern(pattern)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "modernbert"])
def test_no_model_is_taken_for_larger_than_it_is(family: str) -> None:
    from effir_ray.models.architecture import build_on_meta

    config = random_config(family)
    parameters = sum(parameter.numel() for parameter in build_on_meta(config).parameters())
    assert 0.3 * parameters < settings._at_least(config) <= parameters
