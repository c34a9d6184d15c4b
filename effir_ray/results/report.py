"""One self-contained page with an interactive Pareto plot and a sortable table; or the front as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.pages import render
from effir_ray.results import store, tables
from effir_ray.results.page_data import page_data
from effir_ray.results.pareto import costs_of, non_dominated
from effir_ray.results.picture import draw_front
from effir_ray.results.schema import DIRECTIONS
from effir_ray.results.tables import Damaged, Folders


def report(folders: Folders, out: Path | str, *, damaged: Damaged | None = None) -> Path:
    """Write the rows of ``folders`` to ``out``: ``.html`` an interactive page, ``.svg``, ``.png`` a picture.

    The page needs no network: plotly.js, data and styles are inside. ``damaged`` hears of files that cannot
    be read, which are then left out. Of more than 6,000 rows only the fronts of nDCG@10 and any other column,
    the full and the tested models and an even part of the others are shown. Raises InputError for another
    suffix or when no trial has succeeded.
    """
    target = Path(out)
    if target.suffix in (".svg", ".png"):
        return draw_front(_rows(folders, damaged, _MOST_DRAWN)[0], target)
    table, total = _rows(folders, damaged, _MOST)
    if target.suffix != ".html":
        raise InputError(f"{target}: a report is written as .html, .svg or .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page(table, folders, damaged, total=total))
    return target


_MOST, _MOST_DRAWN = 6000, 2000  # rows: with more, a page is slow to open and a picture is a blot
_JUDGED = (*store.LATEST_COLUMNS, "sample", "contents", "schedule", *DIRECTIONS)


def _unheard(message: str) -> None:
    """Of a file that is told of when it is read as a whole."""


def _rows(folders: Folders, damaged: Damaged | None, most: int) -> tuple[pa.Table, int]:
    """The rows to show, and of how many: all, or of more than ``most`` every front, what was tested and an
    even part of others."""

    def attempt() -> tuple[pa.Table, int]:
        heard = None if damaged is None else _unheard
        narrow = store.latest(store.read(folders, columns=_JUDGED, damaged=heard, places=True))
        if len(narrow) > most:
            return tables.rows_at(narrow.take(_chosen(narrow, most)), store.ROWS), len(narrow)
        whole = store.read(folders, damaged=damaged)
        return store.latest(whole), len(narrow)

    return tables.settled(attempt)


def _chosen(table: pa.Table, most: int) -> pa.Array:
    """At most ``most`` indices into ``table``, in its order."""
    wanted = np.zeros(len(table), np.bool_)
    groups = np.zeros(len(table), np.int64)
    for name in ("dataset", "split", "sample", "contents"):  # scores of others are no comparison
        found, kinds = store.codes(table[name])
        groups = np.unique(groups * (kinds + 1) + found, return_inverse=True)[1] if kinds > 1 else groups
    tested = pc.and_(pc.equal(table["split"], "test"), pc.equal(table["status"], "ok"))
    ids = pc.unique(table["trial_id"].filter(tested))
    wanted |= np.asarray(pc.is_in(table["trial_id"], ids))
    wanted |= np.asarray(pc.fill_null(pc.equal(table["schedule"], "full"), False))
    measured = [name for name in DIRECTIONS if table[name].null_count < len(table)]
    for name in measured:
        costs = costs_of(table, {each: DIRECTIONS[each] for each in ("ndcg_at_10", name)})
        for number in np.unique(groups):
            group = np.flatnonzero(groups == number)
            wanted[group[non_dominated(costs[group])]] = True
    first, rest = np.flatnonzero(wanted)[:most], np.flatnonzero(~wanted)
    even = rest[np.linspace(0, len(rest) - 1, max(0, most - len(first))).astype(np.intp)]
    return pa.array(np.union1d(first, even))


def page(
    table: pa.Table, folders: Folders, damaged: Damaged | None = None, *, total: int | None = None
) -> str:
    """The HTML of a report of ``table``, of ``total`` rows that there are. Rows of a table hold only text and
    numbers, and are escaped."""
    from plotly.offline import get_plotlyjs  # slow, and a picture needs none of it

    data = page_data(table, folders, damaged=damaged) | {"total": len(table) if total is None else total}
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
