"""How many tokens a retriever needs: MiniLM with fewer of them, nothing trained, on whole test sets.

    python benchmarks/vocabulary.py --data DATA --texts squad                          # zero-shot
    python benchmarks/vocabulary.py --data DATA --texts scifact nfcorpus cranfield     # what will be searched

DATA holds BEIR folders. The tokens that stay are those that the documents of ``--texts`` need most, and their
titles or first sentences; no query, no judgement. Scored are all test queries of ``--test`` over whole
corpora; the full model stands beside. One row a score in OUT/rows; what is there already is not done again.
Printed besides: how many of the tokens of the documents, and of the test queries, are among those that stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rows import known, measure_once

from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.vocabulary import choose_tokens, token_counts
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pairs import Pair, write_pairs
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.models.loading import load_config, load_text_side
from effir_ray.models.plan import Plan
from effir_ray.progress import show_progress
from effir_ray.stages import fingerprint

LENGTH = 256  # tokens of a document: the limit of MiniLM


def main() -> None:
    options = arguments()
    tests = [load_dataset(str(options.data / name)) for name in options.test]
    with show_progress():
        for dataset in tests:
            score(options, dataset, options.model, Schedule())
        texts = write_texts(options)
        calibration = Calibration(texts_from=str(texts), max_length=LENGTH)
        for size in options.sizes:
            schedule = Schedule(vocabulary=size)
            place = options.work / f"{'-'.join(options.texts)}-{size}"
            if not place.is_dir():
                compress(options.model, schedule, place, calibration=calibration)
            for dataset in tests:
                score(options, dataset, str(place), schedule, counted=options.texts, texts=fingerprint(texts))
    report(options)
    coverage(options, texts, tests)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--texts", nargs="+", default=["squad"], help="data sets whose documents are counted")
    parser.add_argument("--test", nargs="+", default=["scifact", "nfcorpus", "cranfield"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[16000, 8000, 4000])
    parser.add_argument("--work", type=Path, default=Path("runs/vocabulary"))
    parser.add_argument("--out", type=Path, default=Path("results/vocabulary"))
    return parser.parse_args()


def write_texts(options: argparse.Namespace) -> Path:
    file: Path = options.work / f"{'-'.join(options.texts)}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        write_pairs((pair for name in options.texts for pair in examples(options.data / name)), aside)
        aside.rename(file)
    return file


def score(
    options: argparse.Namespace, dataset: Dataset, model: str, schedule: Schedule, **counted: Any
) -> None:
    plan = Plan.full(load_config(options.model).num_hidden_layers)
    measure_once(
        options.out,
        {
            "benchmark": "vocabulary",
            "backbone": options.model,
            "schedule": schedule.model_dump(mode="json"),
            "data": dataset.fingerprint,
            "document_length": LENGTH,
            **counted,
        },
        lambda: evaluate(model, dataset),
        backbone=options.model,
        dataset=dataset,
        split="test",
        schedule=schedule,
        plan=plan.model_copy(update={"vocabulary": schedule.vocabulary or None}),
    )


def report(options: argparse.Namespace) -> None:
    """nDCG@10 on every data set, and the mean beside the full model's."""
    scores: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in known(options.out):
        counted = "+".join(json.loads(row["trial"]).get("counted", ()))
        key = (-row["parameters"], row["schedule"], counted)
        scores.setdefault(key, {})[row["dataset"]] = row["ndcg_at_10"]
    _, full = min(scores.items())
    print(f"{'tokens':8} {'counted in':28} parameters {' '.join(f'{name:>10}' for name in full)}  of full")
    for (parameters, schedule, counted), found in sorted(scores.items()):
        cells = " ".join(f"{found[name]:10.4f}" for name in full)
        share = sum(found.values()) / sum(full.values())
        print(f"{schedule:8} {counted:28} {-parameters / 1e6:9.2f}M {cells}  {share:.1%}")


def coverage(options: argparse.Namespace, texts: Path, tests: list[Dataset]) -> None:
    tokenizer, spec = load_text_side(options.model)
    here = token_counts(tokenizer, spec, draw_examples(str(texts), 10**7, 0), max_length=LENGTH)
    corpora = {name: examples(options.data / name) for name in options.test}
    documents = {
        name: token_counts(tokenizer, spec, some, max_length=LENGTH) for name, some in corpora.items()
    }
    together = sum(documents.values(), start=np.zeros_like(here))
    print(
        f"different tokens: {np.count_nonzero(here)} counted, {np.count_nonzero(together)} in what is scored"
    )
    for size in options.sizes:
        kept = choose_tokens(tokenizer, here, size)
        parts = [f"all documents {together[kept].sum() / together.sum():.1%}"]
        for dataset in tests:
            asked = tokenizer(list(dataset.queries("test").values()))["input_ids"]
            ids = np.array([token for query in asked for token in query])
            stays = np.isin(ids, kept).mean()
            parts.append(
                f"{dataset.name} queries {stays:.1%} (median {np.median([*map(len, asked)]):.0f} tokens)"
            )
        print(f"{size} tokens keep: {', '.join(parts)}")


def examples(dataset: Path) -> list[Pair]:
    return draw_examples(str(dataset), 10**7, 0)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"vocabulary: {error}")
