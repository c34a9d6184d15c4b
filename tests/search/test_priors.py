"""A search begins with what was good before, in its own terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import depths, dry_run, load_backbones
from effir_ray.search.priors import suggestions
from effir_ray.search.proposals import Proposals
from effir_ray.search.space import SearchSpace
from tests.helpers.search_examples import row, small_space

AXES = {"drop_mlp": {"low": 0, "high": 4}, "drop_block": ["1,", "0,1", 0, 1, 2], "recover": [True, False]}


@pytest.fixture
def earlier(tmp_path: Path) -> str:
    """Of a model of eight blocks, of which one compressed model is beaten by another."""
    space = small_space(recovery={"steps": 2})
    scores = {
        Candidate(): (0.9, 100),
        Candidate(drop_mlp=4, recover=True): (0.8, 80),
        Candidate(drop_mlp=6): (0.3, 85),
        Candidate(drop_block=(0, 1)): (0.6, 70),
    }
    rows = [
        row(space.trial(candidate), score, parameters=size).model_copy(
            update={"blocks": 8, "recovered": candidate.recover}
        )
        for candidate, (score, size) in scores.items()
    ]
    tested = rows[2].model_copy(update={"split": "test", "ndcg_at_10": 1.0})
    store.append(tmp_path / "earlier", [*rows, tested])
    return str(tmp_path / "earlier")


def begin(space: SearchSpace) -> list[dict[str, object]]:
    return suggestions(space, depths(load_backbones(space)))


def test_the_front_of_a_deeper_model_is_tried_at_the_same_relative_depth(earlier: str) -> None:
    space = small_space(parameters=AXES, trials=8, priors=[earlier], recovery={"steps": 2})
    assert begin(space) == [
        {"drop_mlp": 2, "drop_block": 0, "recover": True},
        {"drop_mlp": 0, "drop_block": 1, "recover": False},
    ]
    assert begin(space.model_copy(update={"trials": 2})) == begin(space)[:1]
    assert begin(space.model_copy(update={"priors": ()})) == []
    assert dry_run(space).priors == 2


def test_of_a_model_as_deep_the_same_layers_go(earlier: str) -> None:
    (first,) = (row for row in store.trial_rows(store.read(earlier)) if row.schedule == "B[0,1]")
    store.append(earlier, [first.model_copy(update={"blocks": 4, "study": "another"})])
    space = small_space(parameters=AXES, trials=20, priors=[earlier], recovery={"steps": 2})
    assert {"drop_mlp": 0, "drop_block": "0,1", "recover": False} in begin(space)


def test_widths_of_layers_are_those_of_models_as_deep(tmp_path: Path) -> None:
    """What is narrower by no known share says nothing of a share, and of another depth nothing of widths."""
    known = row(
        small_space().trial(Candidate(layer_widths="64,64,8,8", drop_attention=2)), 0.8, parameters=80
    )
    store.append(tmp_path / "earlier", [known.model_copy(update={"blocks": 4})])
    priors = [str(tmp_path / "earlier")]

    def begun(**axes: object) -> list[dict[str, object]]:
        return begin(small_space(parameters={"drop_attention": [0, 1, 2], **axes}, trials=8, priors=priors))

    widths = ["", "64,64,8,8", "64,64,64,64"]
    assert begun(layer_widths=widths) == [{"drop_attention": 2, "layer_widths": "64,64,8,8"}]
    assert begun(layer_widths=widths[::2]) == [{"drop_attention": 2}]
    assert begun(width_reduction=[0.0, 0.5]) == [{"drop_attention": 2}]
    store.append(tmp_path / "earlier", [known.model_copy(update={"blocks": 8, "study": "another"})])
    assert {"drop_attention": 1} in begun(layer_widths=widths)


def test_the_papers_table_is_known() -> None:
    axes = {"drop_mlp": {"low": 0, "high": 4}, "width_reduction": [0.0, 0.25], "recover": [True]}
    space = small_space(parameters=axes, trials=40, priors=["published"], recovery={"steps": 2})
    found = begin(space)
    # EffiR-16M-width-30 of Mistral-7B's 32 blocks
    assert {"drop_mlp": 2, "width_reduction": 0.25, "recover": True} in found
    assert {"drop_mlp": 1, "width_reduction": 0.0, "recover": True} in found


def test_they_are_the_first_that_the_sampler_proposes_also_after_a_kill(earlier: str, tmp_path: Path) -> None:
    settings = {"parameters": AXES, "trials": 6, "recovery": {"steps": 2}, "schedules": [{"drop_mlp": 3}]}
    space = small_space(priors=[earlier], **settings)
    study = Proposals(space, tmp_path, [], load_backbones(space))
    done = []
    for _ in range(3):
        request = study.next()
        assert request is not None
        done.append(request.config.name)
        study.finished(row(request.config, 0.5, parameters=10))
    assert done == ["full", "3M", "2M+ft"]
    again = Proposals(space, tmp_path, study.rows.values(), load_backbones(space))  # type: ignore[arg-type]
    following = again.next()
    assert following is not None and following.config.name == "1B"
    assert len(again.study.get_trials()) == len(study.study.get_trials())
    before = len(again.study.get_trials())
    more = space.model_copy(update={"priors": (earlier, "published")})  # they may be others when it goes on
    third = Proposals(more, tmp_path, list(again.rows.values()), load_backbones(space))
    assert len(third.study.get_trials()) > before


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    priors = [str(tmp_path / "nowhere")]
    with pytest.raises(InputError, match="nowhere"):
        dry_run(small_space(parameters=AXES, trials=2, priors=priors, recovery={"steps": 2}))
