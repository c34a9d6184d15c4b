"""Pages: everything is escaped but what a template calls safe."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from effir_ray.pages import render

EVIL = "</script><script>alert(1)</script>"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "somewhere_with_pages"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "style.css").write_text("b > i {}")
    (folder / "page.html").write_text(
        '<style>{{ asset("style.css") | safe }}</style>{{ title }}<script>{{ data | tojson }}</script>\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def test_text_is_escaped_data_stays_data_and_assets_are_as_they_are(package: str) -> None:
    page = render(package, "page.html", title=EVIL, data={"z": EVIL, "a": "é"})
    assert page.startswith("<style>b > i {}</style>&lt;/script&gt;")
    assert page.count("<script>") == page.count("</script>") == 1
    assert page.index('"z"') < page.index('"a"')  # in the order given
    assert "é" in page


def test_a_missing_value_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError, match="title"):
        render(package, "page.html", data={})
