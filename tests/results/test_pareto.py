"""The front: checked against its definition."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effir_ray.errors import InputError
from effir_ray.results.pareto import costs_of, front, non_dominated, objectives_for, on_front


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
            "document_ms": [5.0, 2.5, 3.0, 1.0, 1.0, 2.5],
            "backbone": ["one"] * 6,
            "hardware": ["a CPU"] * 6,
        }
    )


def test_front_drops_dominated_failed_and_unmeasured_rows_and_keeps_ties() -> None:
    kept = front(table(), {"ndcg_at_10": "max", "parameters": "min"})
    assert kept["name"].to_pylist() == ["full", "small", "twin"]


def test_default_objectives_are_those_that_were_measured() -> None:
    assert objectives_for(table()) == {"ndcg_at_10": "max", "parameters": "min"}
    assert objectives_for(table(), ("parameters",)) == {"parameters": "min"}


def test_between_backbones_speed_is_milliseconds() -> None:
    mixed = table().set_column(6, "backbone", pa.array(["one", "two"] * 3))
    assert list(objectives_for(mixed)) == ["ndcg_at_10", "parameters", "document_ms"]
    with pytest.raises(InputError, match=r"'document_speedup' compares .* 2 backbones \(one, two\)"):
        objectives_for(mixed, ("ndcg_at_10", "document_speedup"))


def test_speed_on_two_kinds_of_hardware_is_no_objective() -> None:
    mixed = table().set_column(7, "hardware", pa.array(["a CPU", "a GPU"] * 3))
    with pytest.raises(
        InputError, match=r"'document_ms' was measured on 2 kinds .*--where \"hardware = 'a CPU'"
    ):
        objectives_for(mixed, ("ndcg_at_10", "document_ms"))
    assert list(objectives_for(mixed)) == ["ndcg_at_10", "parameters"]  # no speed among them


def test_unknown_objectives_name_the_choices() -> None:
    with pytest.raises(InputError, match=r"'speed'.*document_ms"):
        objectives_for(table(), ("speed",))
    with pytest.raises(InputError, match="'name' is not a measured column"):
        front(table(), {"name": "max"})
    with pytest.raises(InputError, match="at least one objective"):
        front(table(), {})


NOISY = {"ndcg_at_10": "max", "parameters": "min", "document_speedup": "max"}


def timed(*rows: tuple[float, int, float, float | None, float | None]) -> pa.Table:
    names = ("ndcg_at_10", "parameters", "document_speedup", "document_speedup_low", "document_speedup_high")
    columns = zip(*rows, strict=True)
    return pa.table({name: pa.array(column) for name, column in zip(names, columns, strict=True)})


def test_a_speed_within_noise_keeps_no_worse_model_on_the_front() -> None:
    """Of the second, which is smaller and better, the third is not surely faster; the fourth is."""
    rows = timed(
        (0.7, 100, 1.0, 1.0, 1.0),
        (0.6, 50, 1.5, 1.4, 1.6),
        (0.5, 50, 1.6, 1.5, 1.7),
        (0.4, 50, 1.9, 1.8, 2.0),
    )
    assert on_front(rows, NOISY).tolist() == [True, True, False, True]
    assert non_dominated(costs_of(rows, NOISY)).all()


def test_intervals_of_scores_take_nothing_off_the_front() -> None:
    """They are over queries, which are the same for all models."""
    rows = timed((0.6, 100, 1.0, 1.0, 1.0), (0.58, 80, 1.3, 1.29, 1.31), (0.55, 60, 1.8, 1.79, 1.81))
    low, high = (pa.array([score + end for score in (0.6, 0.58, 0.55)]) for end in (-0.05, 0.05))
    rows = rows.append_column("ndcg_at_10_low", low).append_column("ndcg_at_10_high", high)
    assert on_front(rows, NOISY).all()


def test_speeds_without_an_interval_are_taken_as_they_are() -> None:
    rows = timed((0.6, 50, 1.5, None, None), (0.5, 50, 1.6, None, None), (0.5, 50, 1.5, None, None))
    assert on_front(rows, NOISY).tolist() == [True, True, False]


def test_of_models_that_only_speed_tells_apart_the_faster_stays() -> None:
    rows = timed((0.6, 50, 1.5, 1.4, 1.6), (0.6, 50, 1.55, 1.4, 1.7))
    assert on_front(rows, {"document_speedup": "max"}).tolist() == [False, True]
    assert on_front(rows, NOISY).tolist() == [False, True]


@given(
    arrays(np.float64, st.tuples(st.integers(1, 8), st.just(3)), elements=st.integers(0, 3).map(float)),
    st.integers(0, 2),
)
def test_what_noise_takes_off_the_front_is_beaten_by_one_that_stays(costs: np.ndarray, width: int) -> None:
    quality, size, speed = (10 - costs[:, 0]) / 10, costs[:, 1], 10 - costs[:, 2]
    rows = pa.table(
        {
            "ndcg_at_10": quality,
            "parameters": size,
            "document_speedup": speed,
            "document_speedup_low": speed - width / 2,
            "document_speedup_high": speed + width / 2,
        }
    )
    exact, kept = non_dominated(costs), on_front(rows, NOISY)
    assert kept.any() and not (kept & ~exact).any()
    for row in np.flatnonzero(exact & ~kept):
        rivals = [
            other
            for other in np.flatnonzero(kept)
            if quality[other] >= quality[row]
            and size[other] <= size[row]
            and (quality[other] > quality[row] or size[other] < size[row])
            and speed[other] + width / 2 >= speed[row] - width / 2
        ]
        assert rivals
