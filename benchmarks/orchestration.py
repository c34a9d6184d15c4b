"""``python benchmarks/orchestration.py``: what a search costs beside the work of its stages.

A study of 100 schedules of a tiny random model, without training. The time from one row to the next, less
what its trial spent in stages, is the cost of proposing, starting, locking, writing and counting. ``--trials
24`` for a quarter; everything is done in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import psutil

from effir_ray.results.results import Results
from effir_ray.search.space import SearchSpace
from effir_ray.search.study import search


def write_data(folder: Path, documents: int = 40) -> Path:
    """Query i asks for document i; a train, a dev and a test split."""
    (folder / "qrels").mkdir(parents=True)
    texts = [f"text number {number} of {documents}" for number in range(documents)]
    for name in ("corpus", "queries"):
        lines = [
            json.dumps({"_id": f"{name[0]}{i}", "title": "", "text": text}) for i, text in enumerate(texts)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    judged = [f"q{i}\tc{i}\t1" for i in range(documents)]
    for split, part in (("train", judged[:10]), ("dev", judged[10:25]), ("test", judged[25:])):
        (folder / "qrels" / f"{split}.tsv").write_text(
            "\n".join(["query-id\tcorpus-id\tscore", *part]) + "\n"
        )
    return folder


def space_of(trials: int, data: Path) -> SearchSpace:
    counts = product(range(4), range(4), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    schedules = [
        {"drop_mlp": mlp, "drop_attention": attention, "width_reduction": width, "width_method": "magnitude"}
        for mlp, attention, width in counts
    ]
    return SearchSpace.model_validate(
        {
            "name": "orchestration",
            "backbone": "random:llama",
            "dataset": str(data),
            "query_max_length": 16,
            "document_max_length": 32,
            "calibration_texts": 16,
            "timing": {"queries": 4, "documents": 4, "rounds": 1},
            "schedules": [schedule for schedule in schedules if any(list(schedule.values())[:3])][
                : trials - 1
            ],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "study"
        process = psutil.Process()
        search(space_of(trials, write_data(Path(scratch) / "data")), out)
        rows = Results(out).trials.to_pandas().sort_values("created_at")
        rows = rows[rows["split"] == "dev"]
        between = rows["created_at"].diff().dt.total_seconds().to_numpy()[1:]
        beside = between - rows["device_seconds"].to_numpy()[1:]
        half = len(beside) // 2
        print(
            "| trials | stages, s a trial | beside, s a trial | first half | second half | 95th percentile |"
        )
        print("|---|---|---|---|---|---|")
        figures = (
            rows["device_seconds"].mean(),
            *(np.mean(part) for part in (beside, beside[:half], beside[half:])),
        )
        print(
            f"| {len(rows)} | " + " | ".join(f"{x:.3f}" for x in (*figures, np.quantile(beside, 0.95))) + " |"
        )
        print(
            f"driver: {process.num_fds()} files open, {process.memory_info().rss / 2**20:.0f} MiB",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
