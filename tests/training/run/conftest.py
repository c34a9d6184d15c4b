"""What whole runs learn from, and one that nothing happens to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effir_ray.training.run.launcher import TrainResult, train
from tests.helpers.training_runs import settings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 80 short documents, each with a query that asks for its number."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "qrels").mkdir()
    documents = ({"_id": f"d{i}", "title": "", "text": f"entry {i} of {i * 7 % 80}"} for i in range(80))
    queries = ({"_id": f"q{i}", "text": f"which entry is number {i}"} for i in range(80))
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, numbers in (("train", range(60)), ("dev", range(60, 70)), ("test", range(70, 80))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train("random:llama", settings(dataset), tmp_path_factory.mktemp("whole") / "out")
