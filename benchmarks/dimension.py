"""How long embeddings need to be: MiniLM's, projected and not trained, on whole test sets.

    python benchmarks/dimension.py --data DATA --texts squad                           # zero-shot
    python benchmarks/dimension.py --data DATA                                         # what will be searched

DATA holds BEIR folders. The axes that stay are those of the embeddings of the documents of ``--texts``, and
of their titles or first sentences; without it of each corpus's own. No query of a split, no judgement. Scored
are all test queries of ``--test`` over whole corpora; the full model stands beside. Corpora are embedded
once, by the full model, and projected: what a compressed checkpoint gives. One row a score in OUT/rows; what
is there already is not done again. Printed besides: milliseconds that searching took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import known, measure_once

from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.dimension import MOST_TEXTS, axes_of, embedding_axes
from effir_ray.compression.pipeline import load_to_measure
from effir_ray.compression.schedule import Schedule
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.evaluation.corpus_search import search_corpus
from effir_ray.evaluation.metrics import Scores, score_run
from effir_ray.models.loading import load_present
from effir_ray.progress import show_progress

LENGTH = 256  # tokens of a document: the limit of MiniLM


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A corpus in memory: its ids, and (n, d)."""

    ids: Sequence[str]
    rows: NDArray[np.float32]

    def shards(self) -> Iterator[NDArray[np.float32]]:
        yield self.rows


@dataclass(frozen=True, kw_only=True)
class Found:
    """``seconds``: of searching."""

    scores: Scores
    seconds: float


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    tests = [load_dataset(str(options.data / name)) for name in options.test]
    with show_progress():
        for dataset in tests:
            score(options, dataset, None)
            fitted = axes(options) if options.texts else own_axes(options, dataset)
            for size in options.sizes:
                score(options, dataset, fitted[:size], fitted=options.texts or dataset.name)
    report(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--texts", help="data set whose documents axes are fitted on, not each its own")
    parser.add_argument("--test", nargs="+", default=["scifact", "nfcorpus", "cranfield"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 192, 128, 64])
    parser.add_argument("--work", type=Path, default=Path("runs/dimension"))
    parser.add_argument("--out", type=Path, default=Path("results/dimension"))
    return parser.parse_args()


def axes(options: argparse.Namespace) -> NDArray[np.float32]:
    """Fitted on the documents of ``--texts`` once."""
    file = options.work / f"axes-{options.texts}.npy"
    if not file.is_file():
        examples = draw_examples(str(options.data / options.texts), MOST_TEXTS, 0)
        np.save(file, embedding_axes(load_to_measure(options.model), examples, max_length=LENGTH))
    found: NDArray[np.float32] = np.load(file)
    return found


def own_axes(options: argparse.Namespace, dataset: Dataset) -> NDArray[np.float32]:
    """Fitted on as many documents of what is searched, whose embeddings are there."""
    examples = draw_examples(str(options.data / dataset.name), MOST_TEXTS, 0)
    place = {name: number for number, name in enumerate(dataset.corpus.ids)}
    documents, _ = embedded(options, dataset)
    drawn = documents[[place[example.query_id] for example in examples]]
    encoder = Encoder(load_to_measure(options.model))
    asked = encoder.encode([example.query for example in examples], "query", max_length=LENGTH)
    return axes_of(drawn, asked)


def embedded(options: argparse.Namespace, dataset: Dataset) -> tuple[NDArray[np.float32], ...]:
    """Documents and test queries by the full model, (n, d) and (q, d); encoded once."""
    file = options.work / f"embeddings-{dataset.name}.npz"
    if not file.is_file():
        encoder, corpus = Encoder(load_to_measure(options.model)), dataset.corpus
        documents = encoder.encode(
            corpus.texts(corpus.ids), "document", max_length=LENGTH, progress=f"Encoding {dataset.name}"
        )
        queries = encoder.encode(list(dataset.queries("test").values()), "query")
        np.savez(file, documents=documents, queries=queries)
    with np.load(file) as found:
        return found["documents"], found["queries"]


def search(options: argparse.Namespace, dataset: Dataset, kept: NDArray[np.float32] | None) -> Found:
    documents, queries = (
        each if kept is None else normalised(each @ kept.T) for each in embedded(options, dataset)
    )
    began = time.perf_counter()
    run = search_corpus(
        list(dataset.queries("test")), queries, Embedded(ids=dataset.corpus.ids, rows=documents)
    )
    seconds = time.perf_counter() - began
    return Found(scores=score_run(run, dataset.qrels("test")), seconds=seconds)


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def score(
    options: argparse.Namespace, dataset: Dataset, kept: NDArray[np.float32] | None, **fitted: Any
) -> None:
    schedule = Schedule(dimension=0 if kept is None else len(kept))
    measure_once(
        options.out,
        {
            "benchmark": "dimension",
            "backbone": options.model,
            "schedule": schedule.model_dump(mode="json"),
            "data": dataset.fingerprint,
            "document_length": LENGTH,
            **fitted,
        },
        lambda: search(options, dataset, kept),
        backbone=options.model,
        dataset=dataset,
        split="test",
        schedule=schedule,
        plan=load_present(options.model).model_copy(update={"dimension": schedule.dimension or None}),
    )


def report(options: argparse.Namespace) -> None:
    """nDCG@10 on every data set, and the mean beside the full model's; milliseconds are of searching."""
    scores: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in known(options.out):
        fitted = json.loads(row["trial"]).get("fitted", "")
        where = "itself" if fitted == row["dataset"] else fitted
        scores.setdefault((where, -row["index_bytes"]), {})[row["dataset"]] = row
    full = next(found for (fitted, _), found in scores.items() if not fitted)
    print(f"{'dimensions':10} {'fitted on':10} {' '.join(f'{name:>10}' for name in full)}  of full")
    for (fitted, size), found in sorted(scores.items()):
        cells = " ".join(f"{found[name]['ndcg_at_10']:10.4f}" if name in found else " " * 10 for name in full)
        share = sum(row["ndcg_at_10"] for row in found.values()) / sum(
            full[name]["ndcg_at_10"] for name in found
        )
        seconds = sum(row["wall_seconds"] for row in found.values())
        print(f"{-size // 4_000_000:10} {fitted:10} {cells}  {share:.1%}  {1000 * seconds:.0f} ms")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"dimension: {error}")
