"""A study's tables in the libraries that people use."""

from pathlib import Path

import pandas as pd
import polars as pl
import pytest

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.query import query
from effir_ray.results.results import SCHEMAS, Results
from effir_ray.results.schema import TrialRow


@pytest.fixture
def study(tmp_path: Path) -> Path:
    base = {"study": "s", "trial": "{}", "backbone": "b", "dataset": "d", "split": "dev", "blocks": 2}
    rows = [TrialRow(**base, trial_id=str(i), schedule=f"{i}M", ndcg_at_10=i / 10) for i in range(3)]
    store.append(tmp_path, rows)
    return tmp_path


def test_one_table_in_every_library(study: Path) -> None:
    trials = Results(study).trials
    frame = trials.to_pandas()
    assert isinstance(frame, pd.DataFrame) and frame["ndcg_at_10"].tolist() == [0.0, 0.1, 0.2]
    assert isinstance(trials.to_polars(), pl.DataFrame)
    assert trials.to_polars()["schedule"].to_list() == trials.to_arrow()["schedule"].to_pylist()


def test_results_and_sql_know_the_same_tables(study: Path) -> None:
    results = Results(str(study))
    for name, schema in SCHEMAS.items():
        if name == "query_scores":  # this study has kept none
            continue
        table = getattr(results, name).to_arrow()
        assert table.schema.names == schema.names
        assert query(study, f"SELECT * FROM {name}").num_rows == table.num_rows
    assert len(results.layers.arrow) == 6


def test_reading_is_late_and_says_what_is_missing(tmp_path: Path) -> None:
    results = Results(tmp_path / "nothing")
    assert len(results.published.arrow) == 788
    with pytest.raises(InputError, match="no such folder"):
        _ = results.trials
