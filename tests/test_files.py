"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from effir_ray.files import whole, write_whole


def test_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "é")
    write_whole(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    assert list(tmp_path.iterdir()) == [file]


def test_the_old_content_stays_when_writing_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with pytest.raises(ValueError, match="half"), whole(file) as aside:
        aside.write_text("ne")
        assert file.read_text() == "old"
        raise ValueError("half")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
