"""Configuration errors name the file, the line, the field and the nearest right key."""

from pathlib import Path

import pytest

from effir_ray.compression.schedule import Schedule
from effir_ray.config import Config, load_yaml
from effir_ray.errors import InputError


class Study(Config):
    name: str
    schedules: tuple[Schedule, ...] = ()


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "name: a\nschedules:\n- drop_mlpp: 3\n",
            "3: unknown key 'schedules.0.drop_mlpp'; did you mean 'drop_mlp'?",
        ),
        ("name: a\nzzz: 3\n", "2: unknown key 'zzz'; known keys: name, schedules"),
        ("schedules: []\n", "name: Field required"),
        (
            "name: a\nschedules:\n- width_reduction: 1.5\n",
            "3: schedules.0.width_reduction: Input should be less than 1",
        ),
        ("name: a\nschedules:\n- drop_mlp: [1, 1]\n", "names a layer twice"),
        ("- a\n", "expected a mapping of settings, found a list"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_mistakes_are_located(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as raised:
        load_yaml(file, Study)
    assert str(raised.value).startswith(str(file))
    assert message in str(raised.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_yaml(tmp_path / "none.yaml", Study)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_yaml(tmp_path / "binary.yaml", Study)


def test_valid_yaml_becomes_typed_objects(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: a\nschedules:\n- {drop_mlp: 16, drop_attention: [3, 5], width_reduction: 0.3}\n")
    schedule = load_yaml(file, Study).schedules[0]
    assert schedule.drop_attention == (3, 5)
    assert schedule.name == "16MA[3,5]-w30"
