"""``python benchmarks/results_at_scale.py``: CPU seconds and memory of pareto and report over a million rows,
and how long a browser takes for a page of 5,000.

Rows are drawn: quality grows with size, speed falls with it, both with noise. Each command is a process of
its own, start included. ``--rows 100000`` for a tenth; everything is done in a temporary folder. The page
needs Chromium (and ``pip install playwright``); without one its times are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
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


def draw(folder: Path, count: int) -> None:
    """By a process of its own: a command's peak begins with the memory of who starts it."""
    process = multiprocessing.get_context("spawn").Process(target=write_rows, args=(folder, count))
    process.start()
    process.join()
    assert process.exitcode == 0


def measure(*arguments: str) -> tuple[float, float]:
    """CPU seconds and GiB at the peak of one command."""
    process = subprocess.Popen([sys.executable, "-m", "effir_ray", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def time_page(chromium: str, page: Path) -> dict[str, float]:
    """Least of three: from opening the file until the front is drawn, and from an action until what follows
    from it is painted."""
    from playwright.sync_api import sync_playwright

    painted = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))"
    actions = {
        "choose a model": "choose(shown().front[0].key)",
        "colours by backbone": "(e => { e.value = 'backbone'; e.dispatchEvent(new Event('change')); })(by)",
    }
    found: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(3):
            opened = browser.new_page(viewport={"width": 1400, "height": 1000})
            start = time.perf_counter()
            opened.goto(page.as_uri())
            opened.wait_for_selector("#plot .main-svg")
            opened.evaluate(painted)
            found.setdefault("open", []).append(time.perf_counter() - start)
            for what, action in actions.items():
                start = time.perf_counter()
                opened.evaluate(action)
                opened.evaluate(painted)
                found.setdefault(what, []).append(time.perf_counter() - start)
            opened.close()
    return {what: min(times) for what, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch) / "study"
        draw(study, rows)
        print(f"{rows:,} rows\n\n| command | CPU seconds | GiB |\n|---|---|---|")
        reports = [["report", str(study), "--out", f"{scratch}/r.{kind}"] for kind in ("html", "svg")]
        for command in (["pareto", str(study)], *reports):
            seconds, sizes = zip(*(measure(*command) for _ in range(3)), strict=True)
            kind = Path(command[-1]).suffix
            print(f"| {command[0]} {kind} | {min(seconds):.1f} | {max(sizes):.2f} |")
        small = Path(scratch) / "5000"
        draw(small, 5000)
        measure("report", str(small), "--out", f"{scratch}/page.html")
        chromium = next(
            filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
        )
        if chromium is not None:
            print("\n| page of 5,000 models | seconds |\n|---|---|")
            for what, took in time_page(chromium, Path(scratch) / "page.html").items():
                print(f"| {what} | {took:.2f} |")


if __name__ == "__main__":
    main()
