"""Fields of a model folder's JSON files; the wrong ones are in ``test_bad_inputs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effir_ray.models import settings
from effir_ray.models.loading import read_config
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


_LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}


@pytest.mark.parametrize(
    "more",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "torch_dtype": "bfloat16"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "dtype": "torch.float32"},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        {"global_rope_theta": 160000.0, "local_attention": 128, "classifier_dropout": 0.0},
        {"quantization_config": None, "num_labels": 3, "attention_dropout": 0, "classifier_dropout": None},
    ],
)
def test_what_published_models_say_is_taken(more: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA | more))
    found = settings.model_file(tmp_path / "config.json")
    assert found == {name: value for name, value in (_LLAMA | more).items() if name != "num_labels"}


def test_what_a_headless_model_has_no_use_for_is_not_looked_at(tmp_path: Path) -> None:
    others = {
        "attn_implementation": 5,
        "_attn_implementation": "x",
        "id2label": 5,
        "label2id": [],
        "auto_map": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA | others))
    config = read_config(tmp_path)
    assert (config.hidden_size, config.num_labels) == (64, 2)
