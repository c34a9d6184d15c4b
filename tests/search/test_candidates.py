"""What a trial may be, and the axes of a sampler: widths of layers, which are a list in a scalar's place."""

import pytest

from effir_ray.compression.schedule import Schedule
from effir_ray.search.candidates import Candidate, Parameters
from tests.helpers.search_examples import small_space


def test_widths_that_say_nothing_change_no_id() -> None:
    """Ids of trials of before there were widths."""
    assert "layer_widths" not in Schedule(drop_mlp=1).model_dump()
    space, candidate = small_space(), Candidate(drop_mlp=1, width_reduction=0.5)
    assert space.trial(candidate).id == "c21d2ab0d02d"
    widths = space.trial(Candidate(layer_widths="64,64,64,48"))
    assert widths.id == space.trial(Candidate(layer_widths=(64, 64, 64, 48))).id
    assert widths.id != space.trial(Candidate(layer_widths="64,64,48,64")).id
    assert type(widths).read(widths.model_dump_json(), "a row").id == widths.id


def test_how_neurons_are_ranked_matters_where_widths_are_given() -> None:
    same = Candidate(width_method="random", width_multiple=16)
    assert same.canonical() == Candidate()
    widths = same.model_copy(update={"layer_widths": (64,) * 4})
    assert widths.canonical() == widths


def test_widths_are_choices_of_a_sampler() -> None:
    axes = Parameters(layer_widths=[[], [64, 64, 48, 48], "64,64,64,64"]).axes
    assert axes["layer_widths"].values() == ("", "64,64,48,48", "64,64,64,64")
    for given, message in (
        ({"layer_widths": {"low": 0, "high": 64}}, "give a list of choices"),
        ({"layer_widths": ["64,?"]}, "layer_widths: '64,\\?' is not possible: expected the neurons"),
        ({"layer_widths": ["64,64"], "width_reduction": [0.0, 0.5]}, "exclude each other: vary one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            Parameters(**given)
