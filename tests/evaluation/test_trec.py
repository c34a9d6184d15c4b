from pathlib import Path

import numpy as np
import pytest

from effir_ray.errors import InputError
from effir_ray.evaluation.trec import read_run, write_run


def test_a_run_survives_writing_and_reading(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    run = {"q1": {f"d{i}": float(s) for i, s in enumerate(scores)}, "q2": {"d1": 0.5, "d0": 0.5}}
    write_run(run, tmp_path / "run.trec", tag="my model")
    read = read_run(tmp_path / "run.trec")
    assert {q: {d: np.float32(s) for d, s in hits.items()} for q, hits in read.items()} == run
    assert list(read["q2"]) == ["d1", "d0"]
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert lines[0].split()[3] == "1"
    assert lines[-1] == "q2 Q0 d0 2 0.5 my_model"


def test_an_id_with_spaces_stays_one_field(tmp_path: Path) -> None:
    write_run({"q 1": {"My file.pdf": 1.0}}, tmp_path / "run.trec", tag="m")
    assert read_run(tmp_path / "run.trec") == {"q%201": {"My%20file.pdf": 1.0}}


@pytest.mark.parametrize(
    ("line", "message"),
    [("q Q0 d 1 x tag", "expected query-id"), ("q Q0 d 1", "expected query-id"), ("q Q0 a 2 1 tag", "twice")],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "run.trec").write_text(f"q Q0 a 1 2.0 tag\n{line}\n")
    with pytest.raises(InputError, match=f"run.trec:2: .*{message}"):
        read_run(tmp_path / "run.trec")
