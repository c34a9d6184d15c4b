"""The shipped training settings are valid, and are what their comments say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from effir_ray import train
from effir_ray.cli._options import local_path
from effir_ray.config import load_yaml, parse
from effir_ray.errors import InputError
from effir_ray.training.config import LoraConfig, TrainConfig

FILES = sorted((Path(__file__).parents[2] / "search_spaces" / "train").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_settings_are_valid(file: Path) -> None:
    config = load_yaml(file, TrainConfig)
    assert config.hard_negatives >= 1
    assert config.negatives == "bm25"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_commands_write_to_a_folder(file: Path) -> None:
    (out,) = re.findall(r"effir-ray train .* --out (\S+)", file.read_text())
    assert local_path(out) == Path(out)


def test_a_uri_is_no_folder_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="storage_path"):
        train("random:llama", TrainConfig(dataset="stdlib"), "s3://bucket/run")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_papers_recipe_is_the_papers() -> None:
    (file,) = (file for file in FILES if file.stem == "mistral-7b-msmarco")
    config = load_yaml(file, TrainConfig)
    assert (config.epochs, config.temperature, config.hard_negatives) == (1.0, 0.02, 7)
    assert config.lora == LoraConfig(r=32, alpha=64)
    assert (config.learning_rate, config.query_max_length, config.document_max_length) == (1e-4, 512, 512)
    assert config.workers == 8


def test_workers_are_a_number_or_the_fewest_and_the_most() -> None:
    """Only numbers that give every worker an equal share of a batch run."""
    data = {"dataset": "d", "batch_size": 24, "zero_stage": 0}
    for given, numbers in ((3, (3,)), ([1, 8], (1, 2, 3, 4, 6, 8)), ([2, 2], (2,))):
        config = TrainConfig.model_validate({**data, "workers": given})
        assert config.numbers_of_workers == numbers
        assert config.model_dump(mode="json")["workers"] == given
        assert (config.fewest_workers, config.most_workers) == (numbers[0], numbers[-1])


@pytest.mark.parametrize(
    ("workers", "changes", "message"),
    [
        (0, {}, "workers: Input should be greater than or equal to 1"),
        ([0, 2], {}, "workers: Input should be greater than or equal to 1"),
        (
            [4, 2],
            {},
            r"workers: expected a number of workers, or two: the fewest and the most, as in \[1, 8\]",
        ),
        ([1, 2, 4], {}, "workers: expected a number of workers, or two"),
        ([1, 5], {}, "batch_size 24 does not split evenly over 5 workers; use a multiple of 5"),
        (
            [1, 4],
            {"zero_stage": 2},
            "workers from 1 to 4 need zero_stage: 0; at stage 2 each worker saves its",
        ),
    ],
)
def test_a_range_of_workers_that_cannot_be_is_one_clear_line(
    workers: Any, changes: dict[str, Any], message: str
) -> None:
    data = {"dataset": "d", "batch_size": 24, "zero_stage": 0, "workers": workers}
    with pytest.raises(InputError, match=message) as refused:
        parse(data | changes, TrainConfig, source="settings")
    assert ";" not in str(refused.value).partition("(found")[2]  # one error, not one a type


def test_info_nce_at_0_needs_something_in_its_place() -> None:
    with pytest.raises(InputError, match="info_nce is 0 and nothing takes its place"):
        parse({"dataset": "d", "info_nce": 0, "distillation": {"scores": 0}}, TrainConfig, source="settings")


def test_a_studys_teacher_is_known_in_a_study_alone(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {"dataset": "stdlib", "distillation": {"teacher": "base", "embedding": 1}}
    )
    with pytest.raises(InputError, match=r"distillation.teacher: 'base' is a study's own full model"):
        train("random:llama", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "setting",
    [
        {"storage_path": "s3://KEY:HID/DEN@bucket/runs"},
        {"dataset": "https://HIDDEN@host/pairs.jsonl"},
        {"held_out": ["scifact", "s3://KEY:HIDDEN@bucket/dev"]},
        {"dev": {"every": 1, "dataset": "s3://KEY:HIDDEN@bucket/dev"}},
        {"distillation": {"teacher": "hf://hf_HIDDENHIDDENHIDDEN@x", "embedding": 1}},
    ],
)
def test_credentials_are_refused_by_field_and_shown_nowhere(setting: dict[str, object]) -> None:
    """A training's settings are written to its folder, and to every row of a study."""
    data = {"dataset": "stdlib", **setting}
    field = next(iter(setting))
    with pytest.raises(InputError, match=rf"^settings: {field}.*environment") as refused:
        parse(data, TrainConfig, source="settings")
    assert "HID" not in str(refused.value)
    with pytest.raises(ValidationError) as of_python:
        TrainConfig.model_validate(data)
    assert "HID" not in str(of_python.value)
