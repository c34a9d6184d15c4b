"""The strict readers: what they take, and what they refuse; the bad files are in ``test_bad_inputs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effir_ray.errors import InputError
from effir_ray.readers import parse_json, parse_yaml, read_json, read_json_object, read_text


def test_yaml_of_every_plain_kind_is_read() -> None:
    text = "a: 1\nb: 1.5\nc: yes\nd: null\ne: [x, 'y: z']\nf: &g {h: i}\nj: *g\nk: {<<: *g, l: m}\n"
    data, node = parse_yaml(text, "file")
    assert data == {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": None,
        "e": ["x", "y: z"],
        "f": {"h": "i"},
        "j": {"h": "i"},
        "k": {"h": "i", "l": "m"},
    }
    assert node.value[1][0].start_mark.line == 1


def test_json_of_every_kind_is_read(tmp_path: Path) -> None:
    value = {"a": [1, -2.5, True, None, "x"], "b": {"c": {}}}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(value), encoding="utf-8")
    assert read_json_object(tmp_path / "a.json") == value
    assert parse_json(b'{"a": 1e300}', "line") == {"a": 1e300}
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == [1]
    with pytest.raises(InputError, match="expected a JSON object"):
        read_json_object(tmp_path / "a.json")


def test_files_are_ordinary_small_and_text(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x" * 100)
    assert read_text(file, limit=100) == "x" * 100
    with pytest.raises(InputError, match="larger than"):
        read_text(file, limit=99)
    with pytest.raises(InputError, match="it is a folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="device"):
        read_text(Path("/dev/zero"))
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "a\0b")


@pytest.mark.parametrize(
    "text", ['["\\ud800"]', '{"a": {"b\\uDFFF": 1}}', b'["\xed\xa0\x80"]', '["\\ud83d x"]']
)
def test_half_a_character_is_refused(text: str | bytes) -> None:
    """It could be neither printed nor written."""
    with pytest.raises(InputError, match=r"half of a surrogate pair|not UTF-8"):
        parse_json(text, "line")
    if isinstance(text, str):
        with pytest.raises(InputError, match=r"file:1: .*half of a surrogate pair"):
            parse_yaml(f"a: {text}", "file")
    assert parse_json('["\\ud83d\\ude00", "\\\\ud800"]', "line") == ["\U0001f600", "\\ud800"]
