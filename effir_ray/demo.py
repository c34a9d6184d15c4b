"""The demonstration: one real search, small enough for a laptop, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.results.report import report
from effir_ray.results.selection import pareto
from effir_ray.search.study import search

SPACE = Path(__file__).parents[1] / "search_spaces" / "demo.yaml"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """``front``: the rows of the Pareto front, chosen on dev queries; ``report``: the page to open."""

    front: pa.Table
    report: Path


def run_demo(out: Path, *, address: str | None = None) -> Demo:
    """Run or go on with ``search_spaces/demo.yaml`` in ``out``, and write ``out/report.html``."""
    if not SPACE.is_file():
        raise InputError(f"{SPACE}: not there; the demo runs from a clone of the repository")
    search(SPACE, out, resume=True, address=address)
    return Demo(front=pareto(out), report=report(out, out / "report.html"))
