"""``python benchmarks/workers.py DATA/nfcorpus``: what a second worker of one CPU core gains.

The whole corpus is encoded by one worker on one core and by two on two, and evaluated in the same way, one
after the other, ``--rounds`` times. Documents a second are those while shards were written; in a whole
evaluation is the start of Ray and of the workers, which one worker without a cluster does not need.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKERS = (1, 2)
SHARD = 256  # documents: enough of them that both workers end at about the same time


def main() -> None:
    options = arguments()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(WORKERS):
        sys.exit(f"workers: {len(cores)} cores; two are needed")
    rates: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for workers in WORKERS if number % 2 == 0 else WORKERS[::-1]:
                os.sched_setaffinity(0, cores[:workers])  # what is started inherits it
                words = ["--dataset", options.data, "--model", options.model, "--workers", str(workers)]
                out = Path(folder) / f"{number}-{workers}"
                run("encode", *words, "--out", str(out), "--shard-size", str(SHARD))
                rates[workers].append(documents_a_second(out))
                began = time.monotonic()
                run("evaluate", *words, "--out", str(out / "evaluated"))
                seconds[workers].append(time.monotonic() - began)
                print(
                    f"{workers} of one core: {rates[workers][-1]:7.1f} documents/s, "
                    f"evaluation {seconds[workers][-1]:6.1f} s",
                    flush=True,
                )
    print(f"documents a second: {ratio(rates[2], rates[1])} times as many with two")
    print(f"whole evaluation: {ratio(seconds[1], seconds[2])} times as fast with two")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="BEIR folder with a test split")
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def run(*words: str) -> None:
    command = [sys.executable, "-c", "from effir_ray.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def documents_a_second(out: Path) -> float:
    """From the start of the first shard to the end of the last."""
    records = {file: json.loads(file.read_text()) for file in out.glob("shards/*.json")}
    ends = {file: file.stat().st_mtime for file in records}
    begins = min(ends[file] - record["seconds"] for file, record in records.items())
    return float(sum(record["documents"] for record in records.values()) / (max(ends.values()) - begins))


def ratio(more: list[float], less: list[float]) -> str:
    found = [a / b for a, b in zip(more, less, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
