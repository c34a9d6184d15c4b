"""The demonstration: a real search that fits a quarter of an hour on two cores, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effir_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

SPACE = Path(__file__).parents[1] / "search_spaces" / "demo.yaml"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """``front``: rows of the dev front with their test scores; ``report``: the HTML page."""

    front: pa.Table
    report: Path


def run_demo(out: Path | str, *, address: str | None = None) -> DemoResult:
    """Run ``search_spaces/demo.yaml`` into ``out`` (or go on with it) and write ``out/report.html``."""
    from effir_ray.results.report import report
    from effir_ray.results.selection import pareto
    from effir_ray.search.folder import STUDY_FILE
    from effir_ray.search.study import search

    if not SPACE.is_file():
        raise InputError(f"{SPACE}: no such file; the demonstration runs from a clone of the repository")
    folder = Path(out)
    search(SPACE, folder, resume=(folder / STUDY_FILE).exists(), address=address)
    page = report([folder], folder / "report.html")
    return DemoResult(front=pareto([folder]), report=page)
