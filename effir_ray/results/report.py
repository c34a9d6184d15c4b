"""One self-contained page with an interactive Pareto plot and a sortable table; or the front as a picture."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.pages import render
from effir_ray.results import store
from effir_ray.results.page_data import page_data
from effir_ray.results.picture import draw_front
from effir_ray.results.tables import Damaged, Folders


def report(folders: Folders, out: Path | str, *, damaged: Damaged | None = None) -> Path:
    """Write the rows of ``folders`` to ``out``: ``.html`` an interactive page, ``.svg``, ``.png`` a picture.

    The page needs no network: plotly.js, data and styles are inside. ``damaged`` hears of files that cannot
    be read, which are then left out. Raises InputError for another suffix or when no trial has succeeded.
    """
    target = Path(out)
    table = store.latest(store.read(folders, damaged=damaged))
    if target.suffix in (".svg", ".png"):
        return draw_front(table, target)
    if target.suffix != ".html":
        raise InputError(f"{target}: a report is written as .html, .svg or .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page(table, folders, damaged))
    return target


def page(table: pa.Table, folders: Folders, damaged: Damaged | None = None) -> str:
    """The HTML of a report. Rows of a table hold only text and numbers, and are escaped."""
    from plotly.offline import get_plotlyjs  # slow, and a picture needs none of it

    data = page_data(table, folders, damaged=damaged)
    if not data["rows"]:
        raise InputError(f"no successful trial among the {len(table)} rows; nothing to report")
    studies = ", ".join(dict.fromkeys(row["study"] for row in data["rows"]))
    return render(
        "effir_ray.results",
        "page/report.html",
        title=f"Pareto front of {studies}",
        plotly=get_plotlyjs(),
        data=data,
    )
