"""What a condition says, and what is none."""

from __future__ import annotations

import pytest

from effir_ray.errors import InputError
from effir_ray.results.conditions import condition


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("parameters<=5e7", 5e7, True),
        ("parameters < 5e7", 5e7, False),
        ("ndcg_at_10 >= 0.45", 0.44, False),
        (" ndcg_at_10>0.45 ", 0.46, True),
        ("query_ms<=3", None, False),
    ],
)
def test_what_a_condition_says(text: str, value: float | None, met: bool) -> None:
    assert condition(text).holds(value) is met


def test_how_far_a_value_is_on_the_wrong_side_is_a_share_of_the_bound() -> None:
    assert condition("parameters<=100").violation(150) == 0.5
    assert condition("document_speedup>=2").violation(1.5) == 0.25
    assert condition("document_speedup>=2").violation(3) == -0.5
    assert condition("ndcg_at_10<=0").violation(0.5) == 0.5
    assert condition("parameters<=100").violation(None) > 0
    assert (
        condition("document_speedup>1").violation(1.0) > 0 >= condition("document_speedup>=1").violation(1.0)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters", "cannot read 'parameters'; expected a condition such as"),
        ("parameters == 3", "cannot read"),
        ("parameters <= 5e", "cannot read"),
        ("parameters <= 1e999", "cannot read"),
        ("schedule >= 1", "'schedule' is not measured; choose from ndcg_at_10, "),
    ],
)
def test_what_is_no_condition(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        condition(text)


def test_a_condition_is_written_as_sql_reads_it() -> None:
    assert str(condition("parameters<=22713216")) == "parameters <= 22713216.0"
