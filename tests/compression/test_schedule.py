"""What a schedule says: how it is written, what it is called, and what it cannot say."""

from pathlib import Path
from typing import Any

import pytest

from effir_ray.compression.schedule import Schedule
from effir_ray.config import load_yaml, parse
from effir_ray.errors import InputError


@pytest.mark.parametrize(
    ("written", "widths", "name"),
    [
        ("'64,64,64,48'", (64, 64, 64, 48), "w[64x3,48]"),
        ("[128, 64, 64, 128]", (128, 64, 64, 128), "w[128,64x2,128]"),
        ("'64,'", (64,), "w[64]"),
        ("''", (), "full"),
    ],
)
def test_widths_are_written_as_a_list_or_in_one_word(
    written: str, widths: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    (tmp_path / "schedule.yaml").write_text(f"layer_widths: {written}\n")
    found = load_yaml(tmp_path / "schedule.yaml", Schedule)
    assert (found.layer_widths, found.name, found.narrows) == (widths, name, bool(widths))
    assert Schedule.model_validate_json(found.model_dump_json()) == found


def test_different_widths_are_called_differently() -> None:
    lists = [(64, 64, 48), (64, 48, 48), (64, 48), (48, 64, 64), (6464, 48), (64, 6448), (2,) * 2, (2, 2, 2)]
    assert len({Schedule(layer_widths=each).name for each in lists}) == len(lists)
    whole = Schedule(drop_mlp=(1,), drop_attention=1, layer_widths=(64, 0), vocabulary=300, dimension=8)
    assert whole.name == "M[1]1A-w[64,0]-v300-d8"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_widths": "64,all"}, "layer_widths: expected the neurons that each layer keeps, such as"),
        ({"layer_widths": 64}, "layer_widths: Input should be a valid tuple"),
        ({"layer_widths": [64, -8]}, "layer_widths.1: Input should be greater than or equal to 0"),
        ({"layer_widths": [64, 2**30]}, "layer_widths.1: Input should be less than or equal to"),
        ({"layer_widths": [8] * 5000}, "layer_widths: Tuple should have at most 1024 items"),
        ({"layer_widths": [64, 8.5]}, "layer_widths.1: .* fractional part"),
        ({"layer_widths": [64], "width_reduction": 0.5}, "give width_reduction or layer_widths, not both"),
    ],
)
def test_what_is_no_list_of_widths(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        parse(given, Schedule, source="options of compress")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
