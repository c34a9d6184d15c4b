"""The figures of an analysis, as SVG text a paper can use: one column is 3.3 in, a page 6.8 in wide."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from effir_ray.compression.analysis.summary import Analysis
from effir_ray.compression.schedule import UNITS, Criterion, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

PAGE = 6.8  # inches
LABELS: dict[Unit, str] = {"attention": "Attention", "mlp": "MLP", "block": "Block"}
COLOURS: dict[Unit, str] = {"attention": "#0072b2", "mlp": "#d55e00", "block": "#555555"}  # Okabe and Ito
MARKERS: dict[Unit, str] = {"attention": "o", "mlp": "s", "block": "D"}
NUMBERED = 40  # layers up to which every cell carries its number
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "effir-ray",  # the same figure is the same file
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """``draw`` makes its figure in STYLE, whatever the caller's matplotlib settings."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def dropping_order(analysis: Analysis, criterion: Criterion) -> str:
    """Heat map, a row a group, a column a layer: in which order sublayers go (the paper's figure 2a)."""
    order = [[row.order for row in analysis.group(criterion, unit)] for unit in UNITS]
    figure = _figure(1.45)
    panel = figure.subplots()
    # Row by row: 1 (dropped first, light) to n (dropped last, dark).
    image = panel.imshow(order, cmap="YlGnBu", aspect="auto", vmin=1, vmax=analysis.layers)
    _cells(panel, analysis.layers)
    if analysis.layers <= NUMBERED:
        for y, row in enumerate(order):
            for x, place in enumerate(row):
                dark = place > 0.6 * analysis.layers
                panel.text(x, y, str(place), ha="center", va="center", fontsize=6, color="w" if dark else "k")
    bar = figure.colorbar(image, ax=panel, pad=0.015, fraction=0.03)
    bar.set_ticks([1, analysis.layers], labels=["first", "last"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    panel.set_title(f"Dropping order by {criterion} importance", fontsize=8, loc="left")
    return _svg(figure)


@_styled
def importance(analysis: Analysis, criterion: Criterion) -> str:
    """Importance of every sublayer against its layer, a line a group."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(2.1)
    panel = figure.subplots()
    for unit in UNITS:
        values = [row.importance for row in analysis.group(criterion, unit)]
        panel.plot(values, color=COLOURS[unit], marker=MARKERS[unit], ms=3, lw=1, label=LABELS[unit])
    panel.set(xlabel="Layer", ylabel=f"Importance ({criterion})", xlim=(-0.5, analysis.layers - 0.5))
    if all(row.importance > 0 for unit in UNITS for row in analysis.group(criterion, unit)):
        panel.set_yscale("log")  # the first and last layers are an order of magnitude above the others
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure)


@_styled
def shares(analysis: Analysis) -> str:
    """What of the full model's parameters and FLOPs each group makes up."""
    rows = [
        "Parameters",
        f"FLOPs, {analysis.query_tokens} tokens",
        f"FLOPs, {analysis.document_tokens} tokens",
    ]
    fields = ("parameter_share", "query_flop_share", "document_flop_share")
    figure = _figure(1.3)
    panel = figure.subplots()
    left = [0.0] * len(rows)
    for unit in ("attention", "mlp"):
        group = analysis.group(analysis.criteria[0], unit)
        widths = [100 * sum(getattr(row, field) for row in group) for field in fields]
        bars = panel.barh(rows, widths, left=left, color=COLOURS[unit], label=LABELS[unit], height=0.62)
        panel.bar_label(bars, fmt="%.1f", label_type="center", color="w", fontsize=7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    rest = [max(0.0, 100 - start) for start in left]
    panel.barh(rows, rest, left=left, color="#cccccc", label="Embeddings and final norm", height=0.62)
    panel.invert_yaxis()
    panel.set(xlim=(0, 100), xlabel="% of the full model")
    panel.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure)


@_styled
def sizes(analysis: Analysis, criterion: Criterion) -> str:
    """Parameters and document FLOPs left when k sublayers of a group are dropped."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(2.3)
    titles = {
        "parameter_ratio": "Parameters",
        "document_flop_ratio": f"FLOPs, {analysis.document_tokens} tokens",
    }
    for panel, (field, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for unit in UNITS:
            rows = [row for row in analysis.sizes if (row.criterion, row.unit) == (criterion, unit)]
            panel.plot(
                [row.k for row in rows],
                [100 * getattr(row, field) for row in rows],
                color=COLOURS[unit],
                marker=MARKERS[unit],
                ms=3,
                lw=1,
                label=LABELS[unit],
            )
        panel.set(xlabel="Sublayers dropped, k", title=title, ylim=(0, 103))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", lw=0.4, color="#dddddd")
        panel.title.set_fontsize(8)
    figure.axes[0].set_ylabel("% of the full model")
    figure.axes[0].legend(frameon=False)
    return _svg(figure)


@_styled
def similarity(analysis: Analysis) -> str:
    """How near queries and documents are after every block (the paper's figures 6 and 7)."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(2.1)
    panel = figure.subplots()
    rows = analysis.similarities
    blocks = [row.blocks for row in rows]
    kinds = {"positive": ("answers the query", "#0072b2", "o"), "negative": ("does not", "#d55e00", "s")}
    for kind, (label, colour, marker) in kinds.items():
        mean, low, high = ([getattr(row, kind + part) for row in rows] for part in ("", "_low", "_high"))
        panel.plot(blocks, mean, color=colour, marker=marker, ms=3, lw=1, label=f"Document that {label}")
        panel.fill_between(blocks, low, high, color=colour, alpha=0.15, lw=0)
    panel.set(xlabel="Blocks passed", ylabel="Cosine with the query", xlim=(-0.5, len(rows) - 0.5))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure)


def _cells(panel: Axes, layers: int) -> None:
    """Group names, layer numbers, white lines between cells."""
    panel.set_yticks(range(len(UNITS)), [LABELS[unit] for unit in UNITS])
    step = 1 if layers <= NUMBERED else 4
    panel.set_xticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)], fontsize=6)
    panel.set_xticks([x - 0.5 for x in range(layers + 1)], minor=True)
    panel.set_yticks([y - 0.5 for y in range(len(UNITS) + 1)], minor=True)
    panel.grid(which="minor", color="w", lw=1)
    panel.tick_params(which="both", length=0)
    panel.spines[:].set_visible(False)
    panel.set_xlabel("Layer")


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(PAGE, height), layout="constrained")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
