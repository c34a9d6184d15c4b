"""The tables of studies, in Python: ``Results(folder).trials.to_pandas()``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa

from effir_ray.results import query_scores, store, study_tables
from effir_ray.results.published import PUBLISHED_SCHEMA, published
from effir_ray.results.tables import Damaged, Folders

if TYPE_CHECKING:
    import pandas
    import polars


@dataclass(frozen=True)
class Frame:
    """One table, in the library of the reader's choice."""

    arrow: pa.Table

    def to_arrow(self) -> pa.Table:
        return self.arrow

    def to_pandas(self) -> pandas.DataFrame:
        frame: pandas.DataFrame = self.arrow.to_pandas()
        return frame

    def to_polars(self) -> polars.DataFrame:
        """Needs the package polars."""
        import polars

        frame = polars.from_arrow(self.arrow)
        assert isinstance(frame, polars.DataFrame)
        return frame


class Results:
    """Every table of one study, or of several: each is read when it is first asked for.

    ``folders``: what searches wrote, or single Parquet files. ``damaged`` hears of files that cannot be read,
    which are then left out. Reading raises InputError for a place without results, and, without ``damaged``,
    for a file that cannot be read.
    """

    def __init__(self, folders: Folders, *, damaged: Damaged | None = None) -> None:
        self._folders, self._damaged = folders, damaged

    @cached_property
    def trials(self) -> Frame:
        """A row for every trial, data set, split and attempt."""
        return Frame(store.read(self._folders, damaged=self._damaged))

    @cached_property
    def query_scores(self) -> Frame:
        """What every query scored under every trial."""
        return Frame(query_scores.read(self._folders, damaged=self._damaged))

    @cached_property
    def layers(self) -> Frame:
        """What stays of every block of every trial: attention, and how many neurons."""
        return Frame(study_tables.layers(self.trials.arrow))

    @cached_property
    def importance(self) -> Frame:
        """How important the studies found every sublayer to be."""
        return Frame(study_tables.importance(self._folders, damaged=self._damaged))

    @cached_property
    def curves(self) -> Frame:
        """Every step of every training."""
        return Frame(study_tables.curves(self._folders, damaged=self._damaged))

    @cached_property
    def published(self) -> Frame:
        """The figures of the EffiR paper."""
        return Frame(published())


SCHEMAS: dict[str, pa.Schema] = {
    "trials": store.ROWS.schema,
    "query_scores": query_scores.QUERY_SCORES.schema,
    "layers": study_tables.LAYERS,
    "importance": study_tables.IMPORTANCE,
    "curves": study_tables.CURVES,
    "published": PUBLISHED_SCHEMA,
}
"""The tables of ``Results`` by name."""
