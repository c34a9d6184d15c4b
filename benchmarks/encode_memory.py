"""Peak memory of corpus encoding as the corpus grows: a tiny random model over short synthetic documents.

    python benchmarks/encode_memory.py --documents 100000 1000000 3000000

Each size runs in a process of its own. Reported are the driver's and the worker's largest resident sizes:
both must stay under one bound. The worker's must not grow; the driver keeps an id and a file offset a
document. The table goes to results/encoding/memory.csv.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

BOUND = 1.5 * 2**30
"""Bytes that driver and worker may each use, whatever the corpus: libraries, model, shards in flight."""
SHARD_SIZE = 8192


def write_corpus(folder: Path, documents: int) -> None:
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(documents):
            file.write(json.dumps({"_id": f"d{i}", "text": f"cell {i % 997}"}) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "cell"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")


def measure(documents: int, results: multiprocessing.Queue) -> None:
    from effir_ray.compression.surgery import apply_plan
    from effir_ray.encoding.corpus_encoding import encode_corpus
    from effir_ray.models.checkpoint import save_checkpoint
    from effir_ray.models.plan import LayerPlan, Plan
    from effir_ray.models.retriever import load_retriever

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "data", documents)
        one_block = Plan(layers=(LayerPlan(), *[LayerPlan(attention=False, mlp=False)] * 3))
        save_checkpoint(apply_plan(load_retriever("random:llama"), one_block), folder / "model")
        started = time.perf_counter()
        encoded = encode_corpus(
            folder / "model",
            folder / "data",
            folder / "out",
            shard_size=SHARD_SIZE,
            workers=2,  # one would be the driver itself
            dtype="float16",
        )
        seconds = time.perf_counter() - started
        assert len(encoded) == documents
        worker = max(record.peak_bytes for record in encoded.records())
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((documents, seconds, driver, worker))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000, 3_000_000])
    parser.add_argument("--out", type=Path, default=Path("results/encoding/memory.csv"))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    lines = ["documents,seconds,driver_peak_bytes,worker_peak_bytes"]
    for documents in arguments.documents:
        results = context.Queue()
        process = context.Process(target=measure, args=(documents, results))
        process.start()
        row = results.get()
        process.join()
        lines.append(",".join(f"{value:.0f}" for value in row))
        print(lines[-1], flush=True)
        if max(row[2:]) > BOUND:
            raise SystemExit(f"{documents} documents need more than the stated {BOUND / 2**20:.0f} MiB")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
