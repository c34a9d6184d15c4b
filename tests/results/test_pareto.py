"""The front: checked against its definition."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effir_ray.errors import InputError
from effir_ray.results.pareto import front, non_dominated, objectives_for


@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.just(3)), elements=st.integers(0, 3).map(float)))
def test_a_point_is_kept_exactly_when_no_other_dominates_it(costs: np.ndarray) -> None:
    def dominated(point: np.ndarray) -> bool:
        return any(all(other <= point) and any(other < point) for other in costs)

    assert non_dominated(costs).tolist() == [not dominated(point) for point in costs]


def table() -> pa.Table:
    return pa.table(
        {
            "name": ["full", "small", "worse", "failed", "unmeasured", "twin"],
            "status": ["ok", "ok", "ok", "failed", "ok", "ok"],
            "ndcg_at_10": [0.6, 0.5, 0.4, 0.9, None, 0.5],
            "parameters": [100, 50, 60, 10, 10, 50],
            "document_speedup": pa.array([None] * 6, pa.float64()),
        }
    )


def test_front_drops_dominated_failed_and_unmeasured_rows_and_keeps_ties() -> None:
    kept = front(table(), {"ndcg_at_10": "max", "parameters": "min"})
    assert kept["name"].to_pylist() == ["full", "small", "twin"]


def test_default_objectives_are_those_that_were_measured() -> None:
    assert objectives_for(table()) == {"ndcg_at_10": "max", "parameters": "min"}
    assert objectives_for(table(), ("parameters",)) == {"parameters": "min"}


def test_unknown_objectives_name_the_choices() -> None:
    with pytest.raises(InputError, match=r"'speed'.*document_ms"):
        objectives_for(table(), ("speed",))
    with pytest.raises(InputError, match="'name' is not a measured column"):
        front(table(), {"name": "max"})
    with pytest.raises(InputError, match="at least one objective"):
        front(table(), {})
