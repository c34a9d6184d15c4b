"""The page of an analysis: figures and tables in one file that needs nothing else."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from effir_ray.compression.analysis import figures
from effir_ray.compression.analysis.summary import Analysis
from effir_ray.compression.schedule import UNITS
from effir_ray.files import write_whole
from effir_ray.pages import render
from effir_ray.provenance import __version__


@dataclass(frozen=True, kw_only=True)
class Figure:
    """``data``: the SVG in base64."""

    name: str
    caption: str
    data: str


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A table as it is shown."""

    header: list[str]
    rows: list[tuple[str, ...]]


def write_page(analysis: Analysis, out: Path) -> None:
    """``out/analysis.html``, and every figure of it as ``out/<name>.svg``."""
    drawn = []
    for name, (caption, svg) in _figures(analysis).items():
        write_whole(out / f"{name}.svg", svg.encode())
        drawn.append(Figure(name=name, caption=caption, data=base64.b64encode(svg.encode()).decode()))
    page = render(
        "effir_ray.compression.analysis",
        "page.html",
        backbone=analysis.backbone,
        version=__version__,
        facts=_facts(analysis),
        figures=drawn,
        sublayers=_sublayers(analysis),
        sizes=_sizes(analysis),
    )
    write_whole(out / "analysis.html", page.encode())


def _figures(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """File name -> (caption, SVG)."""
    found = {
        "shares": (
            "What attention and MLP sublayers make up of the model. FLOPs are those of one text, embedding "
            "look-ups and norms not counted.",
            figures.shares(analysis),
        )
    }
    for criterion in analysis.criteria:
        found[f"order_{criterion}"] = (
            f"Dropping order by {criterion} importance; 1 goes first. Groups are ranked separately.",
            figures.dropping_order(analysis, criterion),
        )
        found[f"importance_{criterion}"] = (
            f"Importance of every sublayer by the criterion {criterion}; higher is kept.",
            figures.importance(analysis, criterion),
        )
    # Sizes at k differ between criteria only where layers differ (sliding windows); one figure will do.
    first = analysis.criteria[0]
    found["sizes"] = (
        f"Predicted size when the k least important sublayers of one group go (by {first} importance).",
        figures.sizes(analysis, first),
    )
    if analysis.similarities:
        found["similarity"] = (
            "Cosine of a query with a document that answers it and with one that does not, pooled after "
            "every block (0: token embeddings); bands hold the middle half of the pairs.",
            figures.similarity(analysis),
        )
    return found


def _facts(analysis: Analysis) -> dict[str, str]:
    return {
        "Layers": str(analysis.layers),
        "Parameters, without LM head": _short(analysis.parameters),
        f"FLOPs a query ({analysis.query_tokens} tokens)": _short(analysis.query_flops),
        f"FLOPs a document ({analysis.document_tokens} tokens)": _short(analysis.document_flops),
        "Calibration texts": f"{analysis.calibration_texts:,}",
        "Criteria": ", ".join(analysis.criteria),
    }


def _sublayers(analysis: Analysis) -> Cells:
    header = ["Layer"]
    columns: list[list[str]] = [[str(layer) for layer in range(analysis.layers)]]
    for criterion in analysis.criteria:
        for unit in UNITS:
            group = analysis.group(criterion, unit)
            header += [f"{figures.LABELS[unit]}, {criterion}", "order"]
            columns += [[f"{row.importance:.4f}" for row in group], [str(row.order) for row in group]]
    for unit in UNITS[:2]:
        group = analysis.group(analysis.criteria[0], unit)
        header += [f"{figures.LABELS[unit]}, % parameters", "% document FLOPs"]
        columns += [
            [f"{100 * row.parameter_share:.2f}" for row in group],
            [f"{100 * row.document_flop_share:.2f}" for row in group],
        ]
    return Cells(header=header, rows=list(zip(*columns, strict=True)))


def _sizes(analysis: Analysis) -> Cells:
    """By the first criterion; they differ between criteria only where layers differ in size."""
    header, columns = ["k"], [[str(k) for k in range(analysis.layers + 1)]]
    for unit in UNITS:
        rows = [row for row in analysis.sizes if (row.criterion, row.unit) == (analysis.criteria[0], unit)]
        header += [f"{figures.LABELS[unit]}: parameters", "%", "document FLOPs", "%"]
        columns += [
            [_short(row.parameters) for row in rows],
            [f"{100 * row.parameter_ratio:.1f}" for row in rows],
            [_short(row.document_flops) for row in rows],
            [f"{100 * row.document_flop_ratio:.1f}" for row in rows],
        ]
    return Cells(header=header, rows=list(zip(*columns, strict=True)))


def _short(number: int) -> str:
    """``7110660096`` -> ``7.11 G``."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
