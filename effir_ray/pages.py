"""HTML pages from the templates that lie in the packages they belong to (Jinja, everything escaped)."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, **values: Any) -> str:
    """The page ``template`` (a path inside ``package``) filled with ``values``.

    Text is escaped wherever a template puts it, but for what the template calls ``safe``: files of the
    package (our own styles and scripts), which ``asset(path)`` reads. ``value | tojson`` is data for a
    script. A value that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False}
    environment.globals["asset"] = lambda path: files(package).joinpath(path).read_text(encoding="utf-8")
    return environment.get_template(template).render(**values)
