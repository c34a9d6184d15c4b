"""How many bytes a study takes: by hand for small numbers, and in a start that has no room."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from effir_ray.config import load_yaml
from effir_ray.errors import InputError
from effir_ray.search.dry_run import dry_run
from effir_ray.search.footprint import ModelSize, study_footprint
from effir_ray.search.space import SearchSpace
from effir_ray.search.study import search
from tests.helpers.search_examples import small_space

Usage = namedtuple("Usage", "total used free")
SPACES = Path(__file__).parents[2] / "search_spaces"


def size(parameters: int) -> ModelSize:
    return ModelSize(parameters=parameters, width=10, dimensions=10, stored=2)


ALL = 3 * 1_920 + 1_000 + (1_000 + 2_000)
HALF = (3 * 1_920 + 1_000 + 2_000) // 2


@pytest.mark.parametrize(
    ("keep", "stay", "end"),
    [
        # Embeddings of 24 documents, twice, of three trials; the cut model; the one that is trained, twice.
        ("all", ALL, ALL),
        ("front", HALF, HALF),
        ("none", HALF, 0),
    ],
)
def test_weights_optimizer_states_and_embeddings_are_counted(keep: str, stay: int, end: int) -> None:
    training = {"steps": 2, "batch_size": 4, "lora": None}
    schedules = [{"drop_mlp": 1}, {"drop_mlp": 2, "recover": True}]
    space = small_space(recovery=training, schedules=schedules, keep=keep)
    trials = [space.trial(candidate) for candidate in space.listed()]
    sizes = list(zip(trials, (size(1_000), size(500), size(500)), strict=True))
    found = study_footprint(space, {space.backbone: size(1_000)}, sizes)
    backbone = 1_000 * 2
    building = 1_920 + 1_000 + 2_000 + 4 * 500 * 3 * 4  # of the trained trial, with its checkpoints
    assert (found.peak, found.end) == (backbone + stay + building, backbone + end)


def test_shorter_embeddings_take_less_room() -> None:
    """Of an adapter's share of a model its hidden states decide, which are as wide as they were."""
    full, short = (
        dry_run(small_space(schedules=[schedule], keep="all"))
        for schedule in ({"drop_mlp": [1]}, {"drop_mlp": [1], "dimension": 16})
    )
    assert full.end_bytes - short.end_bytes == 2 * 24 * (64 - 16) * 4 - 16 * 64 * 4


def test_the_papers_grid_says_what_it_needs() -> None:
    space = load_yaml(SPACES / "mistral-7b.yaml", SearchSpace)
    need = {keep: dry_run(space.model_copy(update={"keep": keep})) for keep in ("all", "front", "none")}
    assert need["none"].end_bytes < need["front"].end_bytes < need["all"].end_bytes < need["all"].peak_bytes


def test_a_study_that_does_not_fit_the_disk_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(InputError, match=r"the study needs about .* GB at its peak .* are free") as refused:
        search(small_space(), tmp_path / "study")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "study").exists()
