"""A whole evaluation beside sentence-transformers + beir: the same scores, and how long each takes.

    python benchmarks/evaluate.py DATA/scifact DATA/nfcorpus                 2 cores, MiniLM-L6: ten minutes
    python benchmarks/evaluate.py DATA/scifact --sample 50 500               one minute

For every data set, in turn: effir-ray in float32, bfloat16 (where the processor has that) and int8, and
beir's exact search over a SentenceTransformer of the same weights, all from texts to nDCG@10, models loaded
beforehand. One row each is written to OUT/evaluate.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from encode import BATCH, sentence_transformers

from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.cpu_kernels import build
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.hardware import detect
from effir_ray.models.retriever import load_retriever
from effir_ray.progress import show_progress


def has_bfloat16() -> bool:
    kernels = build().kernels
    return kernels is not None and kernels.has_bfloat16


def main() -> None:
    options = arguments()
    retriever = load_retriever(options.model)
    systems = {
        "effir-ray float32": ours(Encoder(retriever, precision="float32")),
        **({"effir-ray bfloat16": ours(Encoder(retriever, precision="bfloat16"))} if has_bfloat16() else {}),
        "effir-ray int8": ours(Encoder(retriever, precision="int8")),
        "sentence-transformers + beir": beir(sentence_transformers(retriever)),
    }
    rows = []
    for folder in options.data:
        dataset = load_dataset(folder)
        if options.sample:
            dataset = dataset.sample("test", queries=options.sample[0], documents=options.sample[1])
        for name, system in systems.items():
            started = time.perf_counter()
            ndcg = system(dataset)
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "system": name,
                    "model": options.model,
                    "dataset": dataset.name,
                    "documents": len(dataset.corpus),
                    "ndcg_at_10": ndcg,
                    "seconds": round(seconds, 2),
                    "hardware": detect().name,
                }
            )
            print(f"{dataset.name:30} {name:30} nDCG@10 {ndcg:.4f}  {seconds:7.1f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "evaluate.json").write_text(json.dumps(rows, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("data", nargs="+", help="BEIR folders with a test split")
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--sample", type=int, nargs=2, metavar=("QUERIES", "DOCUMENTS"))
    parser.add_argument("--out", type=Path, default=Path("results/evaluation"))
    return parser.parse_args()


def ours(encoder: Encoder) -> Any:
    def score(dataset: Dataset) -> float:
        with show_progress():
            return float(evaluate(encoder, dataset, split="test").scores.mean["ndcg@10"])

    return score


def beir(encode: Any) -> Any:
    """``encode``: list of texts -> embeddings (n, d). beir sorts documents by length and batches them."""
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    class Model:
        def encode_queries(self, queries: list[str], **options: Any) -> Any:
            return encode(queries)

        def encode_corpus(self, corpus: list[dict[str, str]], **options: Any) -> Any:
            return encode([f"{document['title']} {document['text']}".strip() for document in corpus])

    def score(dataset: Dataset) -> float:
        corpus = {d.id: {"title": d.title, "text": d.text} for d in dataset.corpus.iter_documents()}
        search = EvaluateRetrieval(
            DenseRetrievalExactSearch(Model(), batch_size=BATCH), score_function="cos_sim"
        )
        run = search.retrieve(corpus, dataset.queries("test"))
        ndcg, *_ = search.evaluate(dataset.qrels("test"), run, [10])
        return float(ndcg["NDCG@10"])

    return score


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"evaluate: {error}")
