"""``python benchmarks/results_at_scale.py``: CPU seconds and memory of pareto and report over a million rows.

Rows are drawn: quality grows with size, speed falls with it, both with noise. Each command is a process of
its own, start included. ``--rows 100000`` for a tenth; everything is done in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from effir_ray.results.schema import ARROW_SCHEMA


def write_rows(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    share = random.random(count)
    columns: dict[str, object] = {
        "trial_id": [f"{number:012x}" for number in range(count)],
        "ndcg_at_10": 0.4 + 0.3 * np.sqrt(share) + random.normal(0, 0.01, count),
        "parameters": (1e7 + 1e7 * share).astype(np.int64),
        "document_speedup": 1 / (0.3 + 0.7 * share),
        "created_at": pa.array(np.arange(count) * 1000, pa.timestamp("us", tz="UTC")),
        "schema_version": np.full(count, 5),
        "attempt": np.ones(count, np.int64),
        "seed": np.zeros(count, np.int64),
        "recovered": np.zeros(count, np.bool_),
        "sample": ["all of dev"] * count,
        "split": ["dev"] * count,
        "status": ["ok"] * count,
    }
    kinds = [
        json.dumps({"schedule": {"drop_mlp": i, "width_reduction": j / 10}})
        for i in range(9)
        for j in range(6)
    ]
    columns["trial"] = np.array(kinds)[random.integers(len(kinds), size=count)].tolist()
    for name in ("plan", "contents", "versions"):
        columns[name] = ["{}"] * count
    for name in ("study", "schedule", "backbone", "dataset"):
        columns[name] = [name] * count
    arrays = [
        pa.array(columns[field.name]).cast(field.type)
        if field.name in columns
        else pa.nulls(count, field.type)
        for field in ARROW_SCHEMA
    ]
    (folder / "rows").mkdir(parents=True)
    pq.write_table(pa.table(arrays, schema=ARROW_SCHEMA), folder / "rows" / "drawn.parquet")


def measure(*arguments: str) -> tuple[float, float]:
    """CPU seconds and GiB at the peak of one command."""
    process = subprocess.Popen([sys.executable, "-m", "effir_ray", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch) / "study"
        write_rows(study, rows)
        print(f"{rows:,} rows\n\n| command | CPU seconds | GiB |\n|---|---|---|")
        reports = [["report", str(study), "--out", f"{scratch}/r.{kind}"] for kind in ("html", "svg")]
        for command in (["pareto", str(study)], *reports):
            seconds, sizes = zip(*(measure(*command) for _ in range(3)), strict=True)
            kind = Path(command[-1]).suffix
            print(f"| {command[0]} {kind} | {min(seconds):.1f} | {max(sizes):.2f} |")


if __name__ == "__main__":
    main()
