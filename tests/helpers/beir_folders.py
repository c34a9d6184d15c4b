"""Small BEIR folders."""

import json
from pathlib import Path

HEADER = "query-id\tcorpus-id\tscore\n"


def write_lines(path: Path, *records: object) -> Path:
    """One JSON line a record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_folder(folder: Path, *, documents: int = 40, queries: int = 30) -> Path:
    """Query i asks for document i; a train and a test split; the last query is not judged."""
    (folder / "qrels").mkdir(parents=True)
    write_lines(
        folder / "corpus.jsonl",
        *({"_id": f"d{i}", "title": f"T{i}", "text": f"text {i} é"} for i in range(documents)),
    )
    write_lines(
        folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"query {i}"} for i in range(queries + 1))
    )
    rows = [f"q{i}\td{i}\t1\n" for i in range(queries)]
    (folder / "qrels/train.tsv").write_text(HEADER + "".join(rows[:20]))
    (folder / "qrels/test.tsv").write_text(HEADER + "".join(rows[20:]))
    return folder


def write_graded_folder(folder: Path) -> Path:
    """Query i of 40 asks for document i, more for the one after it, and not for the next; all in train."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "Part", "text": f"text {i}"} for i in range(40)]
    write_lines(folder / "corpus.jsonl", *documents)
    write_lines(folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"query {i}"} for i in range(40)))
    judged = "".join(
        f"q{i}\td{i}\t1\nq{i}\td{(i + 1) % 40}\t2\nq{i}\td{(i + 2) % 40}\t0\n" for i in range(40)
    )
    (folder / "qrels" / "train.tsv").write_text(HEADER + judged)
    return folder
