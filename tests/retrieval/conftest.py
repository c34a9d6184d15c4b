import json
from collections.abc import Callable
from pathlib import Path

import pytest

HEADER = "query-id\tcorpus-id\tscore\n"


def _write_folder(folder: Path, *, documents: int = 40, queries: int = 30) -> Path:
    """A BEIR folder: query i asks for document i; a train and a test split."""
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for i in range(documents):
            print(json.dumps({"_id": f"d{i}", "title": f"T{i}", "text": f"text {i} é"}), file=file)
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for i in range(queries + 1):  # the last one is not judged
            print(json.dumps({"_id": f"q{i}", "text": f"query {i}"}), file=file)
    rows = [f"q{i}\td{i}\t1\n" for i in range(queries)]
    (folder / "qrels/train.tsv").write_text(HEADER + "".join(rows[:20]))
    (folder / "qrels/test.tsv").write_text(HEADER + "".join(rows[20:]))
    return folder


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """``write_folder(folder, documents=40, queries=30)`` writes a small BEIR folder."""
    return _write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _write_folder(tmp_path / "toy")
