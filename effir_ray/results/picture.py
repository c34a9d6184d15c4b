"""The front as a still picture (SVG or PNG) for documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from effir_ray.files import whole
from effir_ray.results.pareto import on_front
from effir_ray.results.schema import Direction, dataset_in_short
from effir_ray.results.selection import chosen_rows, with_test_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FRONT, _OTHER, _INK = "#0a58ca", "#6e7781", "#1b1f24"


def draw_front(table: pa.Table, out: Path) -> Path:
    """nDCG@10 against parameters, the front in colour, test scores of the front as open marks below it.

    The split is chosen as ``pareto`` does: dev where there is one. ``out`` appears complete or not at all;
    the plots of a notebook that calls this are left alone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = chosen_rows(table)
    objectives: dict[str, Direction] = {"ndcg_at_10": "max", "parameters": "min"}
    best = on_front(rows, objectives)
    records = with_test_scores(rows, table).to_pylist()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "effir-ray", "font.size": 11}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        _draw(axes, records, best.tolist())
        first = records[0]
        backbones = ", ".join(dict.fromkeys(record["backbone"] for record in records))
        axes.set_title(
            f"{backbones} on {dataset_in_short(first['dataset'])}, {first['split']} queries", loc="left"
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        kind = out.suffix.removeprefix(".")
        with whole(out) as aside:
            figure.savefig(aside, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out


def _draw(axes: Axes, records: list[dict[str, Any]], best: list[bool]) -> None:
    front = sorted((r for r, kept in zip(records, best, strict=True) if kept), key=lambda r: r["parameters"])
    others = [r for r, kept in zip(records, best, strict=True) if not kept]
    axes.step(
        [_millions(r) for r in front],
        [r["ndcg_at_10"] for r in front],
        where="post",
        color=_FRONT,
        linewidth=1.5,
        label="Pareto front",
        zorder=1,
    )
    for group, color, suffix in ((front, _FRONT, ", on the front"), (others, _OTHER, "")):
        for trained, marker, label in ((False, "o", "as compressed"), (True, "D", "trained after")):
            points = [r for r in group if r["recovered"] is trained and r["parameters"] is not None]
            if points:
                axes.scatter(
                    [_millions(r) for r in points],
                    [r["ndcg_at_10"] for r in points],
                    color=color,
                    marker=marker,
                    s=42,
                    label=label + suffix,
                    zorder=2,
                )
    tested = [r for r in [*front, *others] if r["test_ndcg_at_10"] is not None]
    if tested and tested[0]["split"] != "test":
        axes.scatter(
            [_millions(r) for r in tested],
            [r["test_ndcg_at_10"] for r in tested],
            facecolors="none",
            edgecolors=_FRONT,
            marker="s",
            s=36,
            label="the same on test queries",
            zorder=2,
        )
    full = [r for r in others if r["schedule"] == "full" and not r["recovered"]]
    if records[0].get("bm25_ndcg_at_10") is not None:
        axes.axhline(
            records[0]["bm25_ndcg_at_10"], color=_OTHER, linestyle="--", linewidth=1, label="BM25", zorder=1
        )
    axes.margins(x=0.12, y=0.1)
    _label(axes, front + full)
    axes.set_xlabel("Parameters without the LM head, millions")
    axes.set_ylabel("nDCG@10")
    axes.set_axisbelow(True)
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False, fontsize=9)


def _label(axes: Axes, named: list[dict[str, Any]]) -> None:
    """Names of points, on the empty side of the staircase, where they do not touch each other."""
    axes.autoscale_view()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for record in sorted(named, key=lambda r: -r["ndcg_at_10"]):
        x, y = (_millions(record) - left) / (right - left), (record["ndcg_at_10"] - low) / (high - low)
        if any(abs(x - other) < 0.14 and abs(y - place) < 0.05 for other, place in placed):
            continue
        placed.append((x, y))
        axes.annotate(
            record["schedule"],
            (_millions(record), record["ndcg_at_10"]),
            xytext=(-5, 6),
            textcoords="offset points",
            ha="right",
            color=_INK,
            fontsize=9,
        )


def _millions(record: dict[str, Any]) -> float:
    return float(record["parameters"]) / 1e6
